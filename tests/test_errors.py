"""
Bad input ends at once, in one sentence that says what came, what is accepted and the way out, with a code that is not 0
and no traceback.

Each case is a command line. They run in one process that imports the stages once and forks for each, since the imports
take longer than they do.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT, clean_environment

CASES = {  # name: (command line, what the sentence must name)
    # data
    "missing path": ("step1_sft.py --data_path missing.jsonl", ["missing.jsonl does not exist", "--data_path"]),
    "missing hub name": ("step1_sft.py --data_path nobody/nothing", ["nobody/nothing", "hub"]),
    "malformed JSON": ("step1_sft.py --data_path malformed.jsonl", ["malformed.jsonl, line 3", "not JSON"]),
    "malformed JSON list": ("step1_sft.py --data_path malformed.json", ["malformed.json, line 3", "not JSON"]),
    "not objects": ("step1_sft.py --data_path numbers.json", ["numbers.json", "object"]),
    "other file type": ("step1_sft.py --data_path notes.txt", ["notes.txt", ".jsonl"]),
    "cut gzip": ("step1_sft.py --data_path cut.jsonl.gz", ["cut.jsonl.gz cannot be read"]),
    "no parquet": ("step1_sft.py --data_path no.parquet", ["no.parquet cannot be read"]),
    "ragged CSV": ("step1_sft.py --data_path ragged.csv", ["ragged.csv", "row 2", "fields"]),
    "wrong columns": ("step1_sft.py --data_path columns.jsonl",
                      ["columns.jsonl", "ask, reply", "prompt, chosen, rejected"]),
    "not text": ("step1_sft.py --data_path nulls.jsonl", ["nulls.jsonl, row 2"]),
    "empty file": ("step1_sft.py --data_path empty.jsonl", ["empty.jsonl is empty"]),
    "empty CSV": ("step1_sft.py --data_path empty.csv", ["empty.csv is empty"]),
    "folder without train": ("step1_sft.py --data_path folder", ["folder", "train"]),
    "no pairs for stage 2": ("step2_reward.py --model_name_or_path tiny --data_path answers.jsonl",
                             ["0 of 20 rows", "rejected"]),
    "no pairs in any source": ("step2_reward.py --model_name_or_path tiny --data_path answers.jsonl more.jsonl",
                               ["answers.jsonl, more.jsonl", "a chosen and a rejected answer"]),
    "one prompt only": ("step1_sft.py --data_path one.jsonl", ["one.jsonl", "different questions"]),
    "nothing left by the split": ("step1_sft.py --data_path answers.jsonl --data_split 0,1,1",
                                  ["--data_split 0,1,1", "stage 1"]),
    "malformed split": ("step1_sft.py --data_split 2,4", ["--data_split 2,4", "three numbers"]),
    "weights that do not fit": ("step1_sft.py --data_weights 1 2", ["--data_weights", "1 source"]),
    "prompts too long": ("step1_sft.py --data_path answers.jsonl --max_seq_len 3", ["--max_seq_len 3", "longer"]),
    "prompts too long for PPO": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                 "--data_path answers.jsonl --max_prompt_seq_len 3",
                                 ["--max_prompt_seq_len 3", "longer"]),
    "too few rows": ("step1_sft.py --data_path answers.jsonl --per_device_train_batch_size 64",
                     ["do not fill", "--per_device_train_batch_size"]),
    "too few prompts": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD --data_path "
                        "answers.jsonl BATCH --per_device_generation_batch_size 64",
                        ["do not fill", "lower --per_device_generation_batch_size"]),
    "no answers at all": ("step1_sft.py --data_path prompts.jsonl SMALL", ["0 of 20 rows", "its columns are prompt"]),
    "nothing to evaluate": ("step1_sft.py --data_path answers.jsonl --max_eval_samples 0", ["--max_eval_samples 0"]),
    "a template that is no file": ("step1_sft.py --chat_template nowhere.jinja", ["--chat_template nowhere.jinja"]),
    "a template that is no Jinja": ("step1_sft.py --data_path answers.jsonl SMALL --chat_template {%broken",
                                    ["chat template"]),
    "python data.py": ("data.py --data_path missing.jsonl", ["missing.jsonl does not exist"]),
    # models
    "a folder with a letter missing": ("step1_sft.py --data_path answers.jsonl SMALL --model_name_or_path folder/sf",
                                       ["folder/sf: no such folder", "notes.txt"]),
    "no such model": ("step1_sft.py --model_name_or_path nowhere", ["nowhere", "tokenizer"]),
    "folder without weights": ("step1_sft.py --data_path answers.jsonl SMALL --model_name_or_path no_weights",
                               ["no_weights", "weights"]),
    "folder without config": ("step1_sft.py --data_path answers.jsonl SMALL --model_name_or_path no_config",
                              ["no_config", "config.json"]),
    "cut weights": ("step1_sft.py --data_path answers.jsonl SMALL --model_name_or_path cut_weights",
                    ["cut_weights", "weights"]),
    "a causal LM as reward model": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path LM "
                                    "--data_path answers.jsonl BATCH",
                                    ["no reward model", "score.weight"]),
    "a reward model as actor": ("step3_ppo.py --actor_model_name_or_path REWARD --critic_model_name_or_path REWARD "
                                "--data_path answers.jsonl BATCH",
                                ["no language model"]),
    "another vocabulary": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path other_words "
                           "--data_path answers.jsonl BATCH",
                           ["other_words", "tokenizer"]),
    "longer than the model": ("step1_sft.py --data_path answers.jsonl SMALL --model_name_or_path LM --max_seq_len 512",
                              ["512 tokens", "128 positions", "--max_seq_len"]),
    "answers longer than the model": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                      "--data_path answers.jsonl BATCH --max_prompt_seq_len 64 "
                                      "--max_answer_seq_len 128",
                                      ["192 tokens", "128 positions", "--max_answer_seq_len"]),
    "no layer of that name": ("step1_sft.py --data_path answers.jsonl SMALL --lora_dim 4 --lora_module_name nowhere",
                              ["--lora_module_name nowhere"]),
    "LoRA on the head": ("step1_sft.py --data_path answers.jsonl SMALL --model_name_or_path LM --lora_dim 4 "
                         "--lora_module_name lm_head", ["--lora_module_name lm_head", "head"]),
    "LoRA alone without LoRA": ("step1_sft.py --data_path answers.jsonl SMALL --only_optimize_lora",
                                ["--only_optimize_lora", "--lora_dim"]),
    "chat with nobody": ("chat.py --path nowhere", ["--path nowhere"]),
    "chat with a folder without weights": ("chat.py --path no_weights", ["--path no_weights"]),
    "chat with a reward model": ("chat.py --path REWARD --prompt Hello", ["--path", "language model"]),
    # flags
    "unknown flag": ("step1_sft.py --learning_rat 1", ["--learning_rat", "did you mean --learning_rate"]),
    "another stage's flag": ("step1_sft.py --kl_coef 0.1", ["--kl_coef", "STEP3_ARGS"]),
    "no number": ("step1_sft.py --max_steps ten", ["--max_steps", "ten"]),
    "missing DeepSpeed config": ("step1_sft.py --deepspeed_config nowhere.json", ["nowhere.json", "configs"]),
    "malformed DeepSpeed config": ("step1_sft.py --deepspeed_config malformed.json",
                                   ["malformed.json, line 3", "not JSON"]),
    "DeepSpeed config that is a list": ("step1_sft.py --deepspeed_config list.json", ["list.json", "object"]),
    "a section of another name": ("step1_sft.py --deepspeed_config misspelt.json",
                                  ["misspelt.json", "'tensorbord'", "'tensorboard'"]),
    "a monitor without its package": ("step1_sft.py --deepspeed_config comet.json",
                                      ["comet.json", "pip install comet_ml"]),
    "a flag of TRL's": ("step3_ppo.py --beta 0.1", ["--beta", "--kl_coef"]),
    "several unknown flags": ("step1_sft.py --lora_rank 8 --max_length 9",
                              ["--lora_rank; here that is --lora_dim", "--max_seq_len"]),
    "ZeRO stage 7": ("step1_sft.py --zero_stage 7", ["--zero_stage 7", "0, 1, 2"]),
    "batch of 0": ("step1_sft.py --per_device_train_batch_size 0", ["--per_device_train_batch_size 0", "at least 1"]),
    "log every 0 steps": ("step1_sft.py --logging_steps 0", ["--logging_steps 0", "at least 1"]),
    "unknown schedule": ("step1_sft.py --data_path answers.jsonl SMALL --lr_scheduler_type zigzag",
                         ["--lr_scheduler_type", "zigzag", "cosine"]),
    "a schedule with settings of its own": ("step1_sft.py --lr_scheduler_type warmup_stable_decay",
                                            ["--lr_scheduler_type", "warmup_stable_decay", "cosine"]),
    "negative learning rate": ("step1_sft.py --data_path answers.jsonl SMALL --learning_rate -1",
                               ["--learning_rate -1"]),
    "batches that do not divide": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                   "--data_path answers.jsonl "
                                   "--per_device_generation_batch_size 6 --per_device_train_batch_size 4",
                                   ["--per_device_generation_batch_size 6", "--per_device_train_batch_size 4"]),
    "the stages before were not run": ("step3_ppo.py --data_path answers.jsonl BATCH", ["output/sft", "run_all.sh"]),
    "nor were they in another folder": ("step2_reward.py --data_path answers.jsonl --output_dir runs/1",
                                        ["runs/1/sft", "run_all.sh"]),
    "a KL to steer to, and nothing to steer by": (
        "step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD --data_path answers.jsonl "
        "BATCH --kl_coef 0 --kl_target 6", ["--kl_target", "--kl_coef"]),
    "a reward file without the function's name": (
        "step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD --data_path answers.jsonl "
        "BATCH --reward_fn fn.py", ["fn.py:function"]),
    "no steps": ("step1_sft.py --data_path answers.jsonl --max_steps 0", ["--max_steps 0"]),
    "a negative clip": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                        "--data_path answers.jsonl BATCH --cliprange -1", ["--cliprange -1"]),
    "DPO without beta": ("step2_reward.py --model_name_or_path LM --data_path answers.jsonl --dpo --dpo_beta 0",
                         ["--dpo_beta 0"]),
    "a discount over 1": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                          "--data_path answers.jsonl BATCH --gamma 5", ["--gamma 5.0", "from 0 to 1"]),
    "negative weight decay": ("step1_sft.py --data_path answers.jsonl SMALL --weight_decay -1", ["--weight_decay -1"]),
    "temperature 0": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                      "--data_path answers.jsonl BATCH --temperature 0",
                      ["--temperature 0.0", "over 0"]),
    "top_p 0": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                "--data_path answers.jsonl BATCH --top_p 0", ["--top_p 0.0"]),
    "no epochs of PPO": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                         "--data_path answers.jsonl BATCH --ppo_epochs 0",
                         ["--ppo_epochs 0", "at least 1"]),
    "an advantage that needs a group": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                        "--data_path answers.jsonl BATCH --advantage rloo",
                                        ["--advantage rloo", "--num_generations"]),
    "an advantage of another name": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                     "--data_path answers.jsonl BATCH --advantage ppo",
                                     ["--advantage", "ppo", "rloo"]),
    "a reward file that is missing": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                      "--data_path answers.jsonl BATCH --reward_fn nowhere.py:f",
                                      ["nowhere.py", "--reward_fn"]),
    "no text to mix in": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                          "--data_path answers.jsonl BATCH --unsupervised_data_path nowhere.txt", ["nowhere.txt"]),
    "text for less than a step": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                  "--data_path answers.jsonl BATCH --unsupervised_data_path long.txt --max_seq_len 64",
                                  ["--unsupervised_data_path", "chunks of --max_seq_len 64"]),
    "too little text to mix in": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                  "--data_path answers.jsonl BATCH --unsupervised_data_path notes.txt",
                                  ["notes.txt"]),
    "output where none can be": ("step1_sft.py --data_path answers.jsonl SMALL --output_dir /proc/nope",
                                 ["--output_dir /proc/nope"]),
    "output that is a file": ("step1_sft.py --data_path answers.jsonl SMALL --output_dir notes.txt",
                              ["notes.txt", "--output_dir"]),
}
SMALL = "--per_device_train_batch_size 2 --max_seq_len 64 --max_prompt_seq_len 32 --max_answer_seq_len 8 --max_steps 1"
BATCH = ("--per_device_generation_batch_size 4 --per_device_train_batch_size 4 --max_prompt_seq_len 32 "
         "--max_answer_seq_len 8 --max_steps 1")

DRIVER = """
import json, os, runpy, sys, time, traceback
sys.path.insert(0, sys.argv[1])
import chat, support.toy, step1_sft, step2_reward, step3_ppo
import transformers.models.opt.modeling_opt
support.toy.toy_tokenizer()  # made once, not once a case
for name, (script, *flags) in json.load(open("commands.json")).items():
    started = time.time()
    child = os.fork()
    if child == 0:
        out = os.open("out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.argv, code = [script, *flags], 0
        try:
            runpy.run_path(os.path.join(sys.path[0], script), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else (print(end.code), 1)[1]
        except BaseException:
            code = traceback.print_exc() or 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({name: [code, time.time() - started, open("out", errors="replace").read()]}), flush=True)
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, model_folders, tokenizer):
    """A folder with everything that a user can get wrong."""
    folder = tmp_path_factory.mktemp("errors")
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(20)]
    lines = [json.dumps(row) for row in rows]
    compressed = gzip.compress("\n".join(map(str, range(10_000))).encode())
    for name, content in {
            "answers.jsonl": "\n".join(lines), "more.jsonl": "\n".join(lines),
            "malformed.jsonl": "\n".join([*lines[:2], '{"prompt": "a",', *lines]),
            "malformed.json": '[\n{"prompt": "a"},\n{"prompt" "b"}]', "numbers.json": "[1, 2]",
            "list.json": "[1, 2]", "misspelt.json": '{"tensorbord": {"enabled": true}}',
            "comet.json": '{"comet": {"enabled": true}}', "notes.txt": "Hello!", "long.txt": 60 * "Hello! ",
            "cut.jsonl.gz": compressed[:len(compressed) // 2], "no.parquet": "Hello!",
            "ragged.csv": 'prompt,response\nHi,Hello\nHi,Hello, you\n',
            "prompts.jsonl": "\n".join(json.dumps({"prompt": row["prompt"]}) for row in rows),
            "columns.jsonl": '{"ask": "Hi", "reply": "Hello"}',
            "nulls.jsonl": lines[0] + '\n{"prompt": null, "response": "x"}\n', "empty.jsonl": "\n",
            "empty.csv": "prompt,response\n", "one.jsonl": "\n".join(lines[:1] * 20),
            "folder/notes.txt": "Hello!"}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, missing in (("no_weights", "model.safetensors"), ("no_config", "config.json")):
        shutil.copytree(model_folders["lm"], folder / name)
        (folder / name / missing).unlink()
    shutil.copytree(model_folders["lm"], folder / "cut_weights")
    os.truncate(folder / "cut_weights" / "model.safetensors", 5000)
    shutil.copytree(model_folders["reward"], folder / "other_words")
    vocabulary = json.loads((folder / "other_words" / "tokenizer.json").read_text())
    (folder / "other_words" / "tokenizer.json").write_text(json.dumps({
        **vocabulary, "added_tokens": vocabulary["added_tokens"] + [
            {"id": len(tokenizer), "content": "<another>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}]}))
    return folder


@pytest.fixture(scope="module")
def outcomes(workplace, model_folders):
    """name of a case -> (exit code, seconds without imports, output)"""
    commands = {name: [model_folders[word.lower()] if word in ("LM", "REWARD") else word
                       for word in line.replace("BATCH", BATCH).replace("SMALL", SMALL).split()]
                for name, (line, _) in CASES.items()}
    (workplace / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run([sys.executable, "-c", DRIVER, str(ROOT)], cwd=workplace, env=clean_environment(),
                          stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    return {name: outcome for line in done.stdout.splitlines() if line.startswith("{")
            for name, outcome in json.loads(line).items()}


def assert_one_sentence(code, output, script, named):
    assert code not in (0, None) and code > 0, output[-2000:]
    assert "Traceback" not in output, output[-2000:]
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"{script}: error: "), output[-2000:]
    assert "[-h]" not in output and len(last) < 700, "one sentence, not the whole manual"
    for word in named:
        assert word in last, (word, last)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_sentence(outcomes, name):
    line, named = CASES[name]
    code, seconds, output = outcomes[name]
    assert_one_sentence(code, output, line.split()[0], named)
    assert seconds < 10, "at once; nothing is trained or waited for before"


# -----------------------------------------------------------------------------
# as a user types them

def test_a_stage_by_its_command_line(run_script):
    code, output = run_script("step1_sft.py", "--data_path", "missing.jsonl")
    assert code == 2
    assert_one_sentence(code, output, "step1_sft.py", ["missing.jsonl"])


@pytest.mark.parametrize("flags, named", [
    (["gigantic", "cpu"], ["MODEL 'gigantic'", "tiny", "opt-1.3b"]),
    (["tiny", "gpu9"], ["HARDWARE 'gpu9'", "cpu, 1gpu, 1node, multinode"]),
    (["./nowhere", "cpu"], ["./nowhere", "no such folder"]), (["tiny", "multinode"], ["HOSTFILE"]),
    (["tiny"], ["run_all.sh MODEL HARDWARE"]), ([], ["run_all.sh MODEL HARDWARE"])])
def test_run_all_refuses_before_it_installs_anything(run_script, tmp_path, flags, named):
    """A python3 that does nothing but say so: what is wrong with the words is known without it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\necho python3 was started\nexit 1\n")
    (tmp_path / "bin" / "python3").chmod(0o755)
    code, output = run_script("run_all.sh", *flags, env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                                                         "HOSTFILE": "/nowhere"})
    assert_one_sentence(code, output, "run_all.sh", named)
    assert "python3 was started" not in output


def test_run_all_says_which_python_it_needs(tmp_path):
    """In a fresh checkout, where the only python3 is too old to install anything with."""
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text('#!/bin/sh\n[ "$1" != --version ] || echo Python 3.9.1\nexit 1\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    done = subprocess.run(["bash", tmp_path / "run_all.sh", "tiny", "cpu"], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})
    assert_one_sentence(done.returncode, done.stdout, "run_all.sh", ["Python 3.9.1", "3.11"])
    assert not (tmp_path / ".venv").exists()


def test_run_all_checks_all_stages_before_the_first(run_script):
    code, output = run_script("run_all.sh", "tiny", "cpu", env={"STEP3_ARGS": "--kl_coeff 0"})
    assert_one_sentence(code, output, "step3_ppo.py", ["--kl_coeff", "did you mean --kl_coef?"])


def test_run_all_keeps_the_stages_together(run_script):
    """They read each other's models below one --output_dir."""
    code, output = run_script("run_all.sh", "tiny", "cpu", env={"STEP1_ARGS": "--output_dir elsewhere"})
    assert_one_sentence(code, output, "run_all.sh", ["--output_dir", "all three stages"])
