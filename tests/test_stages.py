"""The whole chain by the command a user types, two steps a stage, and what it leaves behind."""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import step1_sft
import step2_reward

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
       "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(*command, cwd, **env):
    done = subprocess.run([str(part) for part in command], cwd=cwd, env={**ENV, **env}, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """output/ of `run_all.sh tiny cpu`, shortened."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "stdout").write_text(run(
        "bash", ROOT / "run_all.sh", "tiny", "cpu", "--max_steps", "2", "--max_eval_samples", "8",
        "--max_answer_seq_len", "8", cwd=folder,
        STEP3_ARGS="--per_device_generation_batch_size 8 --per_device_train_batch_size 4 --enable_ema"))
    return folder / "output"


def test_leaves_the_promised_folders_and_numbers(output):
    for name in ("sft", "reward", "actor", "critic", "actor_ema"):
        files = {file.name for file in (output / name).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                "chat_template.jinja"} <= files, (name, files)
    summary = json.loads((output / "summary.json").read_text())
    assert ({"seconds", "perplexity", "gold"} <= set(summary["sft"])
            and {"seconds", "accuracy"} <= set(summary["reward"]))
    assert {"seconds", "score", "kl", "gold"} <= set(summary["ppo"])
    assert ((summary["model"], summary["hardware"], summary["seed"]) == ("tiny", "cpu", 1234)
            and summary["versions"] and summary["config"])
    lines = [json.loads(line) for line in (output / "actor" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"objective/kl", "objective/scores", "objective/entropy", "ppo/policy/clipfrac", "time/generate",
            "time/score", "time/train", "tokens_per_second", "memory_gb", "memory/weights_aliased_gb",
            "memory/weights_copied_gb",
            "memory/kv_cache_gb"} <= set(lines[0])
    assert abs(lines[0]["objective/kl"]) < 1e-4 and abs(lines[0]["ppo/policy/ratio"] - 1) < 1e-5
    assert "perplexity" in (output.parent / "stdout").read_text().split("held-out result")[-1]
    seconds = summary["clock"]
    assert list(seconds) == ["step1_sft", "step2_reward", "step3_ppo", "run"]
    assert sum(seconds.values()) - seconds["run"] <= seconds["run"] + 3
    words = shlex.split(summary["command"])
    assert words[0] == ("STEP3_ARGS=--per_device_generation_batch_size 8 "
                        "--per_device_train_batch_size 4 --enable_ema")
    assert words[1:7] == ["bash", "run_all.sh", "tiny", "cpu", "--max_steps", "2"]
    assert summary["commands"]["ppo"].startswith("python step3_ppo.py --deepspeed_config ")
    assert "=== report: output/report.html\n" in (output.parent / "stdout").read_text()
    assert "State: <span" in (output / "report.html").read_text()


OURS = ("run_all.sh: ", "=== ", "device ", "data: ", "step ", "held-out rows at ", "  for example: ",
        "correlation ", "better ", "preflight: ", "doctor: ", "stage ", "sft ", "reward ", "ppo ",
        "all ", "Talk to it: ", "report: ")


def test_a_run_prints_its_own_lines_alone_and_few(output):
    lines = (output.parent / "stdout").read_text().splitlines()
    foreign = [line for line in lines if line and not line.startswith(OURS)
               and " model, 1.0M parameters" not in line and " prompts x 1 answer(s), " not in line]
    assert not foreign and len(lines) < 60
    # The preset's flags and the user's: the echo has each once, the last.
    for line in lines:
        if " of 3: " in line:
            flags = [word for word in line.split() if word.startswith("--")]
            assert len(flags) == len(set(flags)) and "--max_steps 2 " in line


def test_a_dry_run_plans_all_three_stages_and_writes_nothing(tmp_path):
    checkout, place = tmp_path / "a checkout", tmp_path / "here"  # with a space in its name
    checkout.symlink_to(ROOT), place.mkdir()
    text = run("bash", checkout / "run_all.sh", "tiny", "cpu", "--dry_run", cwd=place)
    assert text.count("memory plan") == 3 and not list(place.iterdir())


def test_folders_load_in_a_process_without_this_repo(output, tmp_path):
    """
    No missing or unexpected keys, and the same logits and score as ours, computed here by LanguageModel and
    RewardModel.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from support.models import LanguageModel, RewardModel, last_token
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
sft, reward, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(sft)
texts = [tokenizer.apply_chat_template([{"role": "user", "content": q}, {"role": "assistant", "content": a}],
                                       tokenize=False)
         for q, a in (("What is the opposite of hot?", "Cold."), ("Hello!", "Hello! How can I help you?"))]
batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, padding_side="right")
results = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
for name, auto, path in (("lm", AutoModelForCausalLM, sft), ("score", AutoModelForSequenceClassification, reward)):
    model, info = auto.from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    results[name] = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach()
torch.save(results, out)
"""
    run(sys.executable, "-c", script, output / "actor", output / "reward", tmp_path / "results.pt", cwd=tmp_path,
        PYTHONPATH="")
    theirs = torch.load(tmp_path / "results.pt")
    ids, mask = theirs["input_ids"], theirs["attention_mask"]
    with torch.no_grad():
        logprobs, _ = LanguageModel(AutoModelForCausalLM.from_pretrained(output / "actor"))(ids, mask, mask[:, 1:])
        values = RewardModel(AutoModelForSequenceClassification.from_pretrained(output / "reward"))(ids, mask)
    expected = theirs["lm"][:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs, expected * mask[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last_token(values, mask), theirs["score"].squeeze(1), atol=1e-5, rtol=1e-5)
    # scored at EOS
    assert (ids[0, mask[0].bool()][-1] == AutoTokenizer.from_pretrained(output / "reward").eos_token_id)


def test_the_saved_weights_are_the_trained_ones(output):
    """Two steps moved the actor away from the SFT model, and its average less far."""
    from transformers import AutoModelForCausalLM
    sft, actor, ema = (AutoModelForCausalLM.from_pretrained(output / name).state_dict()
                       for name in ("sft", "actor", "actor_ema"))
    moved = sum((actor[name] - sft[name]).abs().sum() for name in sft)
    averaged = sum((ema[name] - sft[name]).abs().sum() for name in sft)
    assert 0 < averaged < 0.1 * moved


def test_chat_answers_once_and_in_a_conversation(output):
    once = run(sys.executable, ROOT / "chat.py", "--path", output / "actor",
               "--prompt", "What is the opposite of hot?", "--max_new_tokens", "8", cwd=output)
    assert once.strip()
    done = subprocess.run([sys.executable, str(ROOT / "chat.py"), "--path", str(output / "actor"),
                           "--max_new_tokens", "8"], env=ENV, text=True,
                          input="Hello!\n/reset\nHello!\n", capture_output=True, timeout=120)
    assert done.returncode == 0 and "(a new conversation)" in done.stdout
    answers = [part.split("\nHuman:")[0].strip() for part in done.stdout.split("Assistant: ")[1:]]
    # /reset forgot the first exchange; end of input ends the program
    assert len(answers) == 2 and answers[0] == answers[1]


@pytest.mark.parametrize("start", [("torchrun", "--standalone", "--nproc_per_node=2"), (sys.executable,)],
                         ids=["torchrun", "python"])
def test_a_stage_starts_without_the_deepspeed_launcher(start, tmp_path):
    command = [Path(sys.executable).parent / start[0], *start[1:]] if start[0] == "torchrun" else start
    text = run(*command, ROOT / "step1_sft.py", "--max_steps", "2", "--per_device_train_batch_size", "4",
               "--max_eval_samples", "4", "--max_answer_seq_len", "4", cwd=tmp_path)
    assert (f"x {2 if start[0] == 'torchrun' else 1} processes" in text
            and (tmp_path / "output/sft/model.safetensors").exists())


@pytest.mark.parametrize("stage, folder, flags", [(step1_sft, "sft", {}), (step2_reward, "actor", dict(dpo=True))],
                         ids=["sft", "dpo"])
def test_prompts_too_long_to_sample_do_not_cost_the_model(stage, folder, flags, model_folders, process_group, tmp_path):
    """Training allows --max_seq_len, the samples at its end only --max_prompt_seq_len."""
    rows = [{"prompt": f"What is {i}?", "chosen": "A number.", "rejected": "Go."} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stage.main(stage.Config(model_name_or_path=model_folders["lm"], data_path=[str(tmp_path / "pairs.jsonl")],
                            output_dir=str(tmp_path), max_seq_len=64, max_prompt_seq_len=2, max_answer_seq_len=8,
                            max_steps=1, deepspeed_config=str(ROOT / "configs" / "cpu.json"), **flags))
    assert (tmp_path / folder / "model.safetensors").exists()
    assert json.loads((tmp_path / "summary.json").read_text())[folder if not flags else "dpo"]
