"""
What a run leaves for people to read: evaluations and samples in files, the live line of a terminal,
monitors by stage, model cards; and that none of it changes what is trained.
"""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import step1_sft
import step2_reward
import step3_ppo
from conftest import ROOT, clean_environment
from support import terminal
from support.checkpoints import checksum
from support.log import MetricsLog, place_in_run
from support.metrics import Answer, has_ended
from support.terminal import clock
from test_resume import assert_same, inputs, result, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    inputs(folder)
    return folder


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -----------------------------------------------------------------------------
# evaluations and samples

NAMES = {step1_sft: ("sft", {"eval/perplexity"}),
         step2_reward: ("reward", {"eval/accuracy", "eval/loss", "eval/score_std"}),
         step3_ppo: ("actor", {"eval/score", "eval/kl"})}


@pytest.mark.parametrize("stage", NAMES)
def test_evaluations_while_it_trains_change_nothing(stage, folder, process_group):
    """The same weights and metrics, bit for bit, as without them."""
    name, keys = NAMES[stage]
    plain = f"plain-{name}"
    watched = f"watched-{name}"
    train(stage, folder, plain, save_steps=0)
    train(stage, folder, watched, save_steps=0, eval_steps=2)
    found = lines_of(folder / watched / name / "evaluations.jsonl")
    first = [0] if stage is step3_ppo else []
    assert [line["step"] for line in found] == first + [2, 4, 6, 7]
    assert all(keys <= line.keys() for line in found)
    assert found[-1] == lines_of(folder / plain / name / "evaluations.jsonl")[-1]
    for out in (plain, watched):
        (folder / out / name / "evaluations.jsonl").unlink()
        (folder / out / name / "samples.jsonl").unlink(missing_ok=True)
    assert_same(result(folder / plain), result(folder / watched))


def test_samples_are_what_was_asked_and_answered(folder, process_group):
    train(step3_ppo, folder, "samples", save_steps=0, eval_steps=4)
    samples = lines_of(folder / "samples/actor/samples.jsonl")
    assert [line["step"] for line in samples] == 4 * [0] + 4 * [4] + 4 * [7]
    prompts = [json.dumps(line["prompt"]) for line in samples]
    assert prompts[:4] == prompts[4:8] == prompts[8:] and len(set(prompts)) > 1
    held = lines_of(folder / "samples/actor/evaluations.jsonl")
    for number, line in enumerate(held):
        part = samples[4 * number:4 * number + 4]
        for name in ("score", "kl"):
            mean = sum(sample[name] for sample in part) / 4
            assert line[f"eval/{name}"] == pytest.approx(mean, abs=1e-5)
    assert held[0]["eval/kl"] == pytest.approx(0, abs=1e-5) and abs(held[-1]["eval/kl"]) > 1e-3
    assert all(isinstance(line["ended"], bool) for line in samples)


def test_an_answer_has_ended_with_its_last_real_token_alone():
    class Rollout:
        tokens = torch.tensor([[7, 7, 3, 2, 0], [7, 7, 3, 4, 5], [7, 7, 2, 4, 5], [7, 7, 9, 0, 0]])
        mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]])

    assert has_ended(Rollout, 2).tolist() == [True, False, False, False]
    assert has_ended(Rollout, [2, 9]).tolist() == [True, False, False, True]


def test_a_sample_is_one_line_of_a_terminal():
    class Record:
        prompt = [{"role": "user", "content": "Why?\n" + 40 * "really "}]

    shown = str(Answer(Record, "Because\n\n" + 50 * "so ", True))
    assert "\n" not in shown and len(shown) < 100 and "Because so" in shown


def test_a_log_goes_on_behind_its_checkpoint(tmp_path, process_group):
    """What was written after the checkpoint goes, a torn line and the last evaluation too."""
    log = MetricsLog(tmp_path, 6, 1, [])
    for step in range(1, 7):
        log(step, {"loss": 1.0 * step})
        log.evaluation(step, {"score": 2.0 * step}, [], 0.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    log = MetricsLog(tmp_path, 6, 1, [], done=4)
    log(5, {"loss": 50.0})
    losses = [(line["step"], line["loss"]) for line in lines_of(tmp_path / "metrics.jsonl")]
    assert losses == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    assert [line["step"] for line in lines_of(tmp_path / "evaluations.jsonl")] == [1, 2, 3, 4]
    log = MetricsLog(tmp_path, 5, 1, [], done=5)  # after its last step, before the stage ended
    log.evaluation(5, {"score": 0.0}, [], 0.0)
    scores = [(line["step"], line["eval/score"]) for line in lines_of(tmp_path / "evaluations.jsonl")]
    assert scores == [(1, 2), (2, 4), (3, 6), (4, 8), (5, 0)]


# -----------------------------------------------------------------------------
# the terminal

@pytest.mark.parametrize("seconds, shown", [(0, "0:00"), (75.4, "1:15"), (3675, "1:01:15")])
def test_the_clock(seconds, shown):
    assert clock(seconds) == shown


def test_the_time_that_is_left_of_the_run(monkeypatch):
    """Stage 1 has taken 30 of its 40 s: a unit of planned work is 10 s, and 5 units follow."""
    monkeypatch.setenv("RUN_STAGES", "1/3 4.0 3.0 2.0")
    assert place_in_run("sft", 30, 10) == ("sft 1/3", "0:10 left, run 1:00")
    monkeypatch.setenv("RUN_STAGES", "3/3 4.0 3.0 2.0")
    assert place_in_run("actor", 30, 10) == ("actor 3/3", "0:10 left, run 0:10")
    monkeypatch.setenv("RUN_STAGES", "2/3")  # a stage without a plan
    assert place_in_run("reward", 30, 10) == ("reward 2/3", "0:10 left")
    monkeypatch.delenv("RUN_STAGES")
    assert place_in_run("reward", 30, 10) == ("reward", "0:10 left")


def test_evaluations_count_in_the_time_that_is_left(tmp_path, process_group):
    log = MetricsLog(tmp_path, 100, 0, [], steps_an_evaluation=3.0)
    assert log._seconds_left(40, 2.0) == 60 * 2 + 3 * 2
    log = MetricsLog(tmp_path, 100, 0, [], steps_an_evaluation=3.0, eval_steps=20)
    assert log._seconds_left(40, 2.0) == 60 * 2 + 3 * 3 * 2  # after 60 and 80, and at the end
    log.evaluation(40, {}, [], seconds=7.0)
    assert log._seconds_left(40, 2.0) == 60 * 2 + 3 * 7
    assert log._seconds_left(100, 2.0) == 7


def in_terminal(columns, *command, **options):
    """-> exit code, and what the command wrote to a terminal of so many columns."""
    main, worker = pty.openpty()
    fcntl.ioctl(worker, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(command, stdout=worker, stderr=worker, **options)
    os.close(worker)
    written = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux says so where the other end is closed
            break
        if not part:
            break
        written += part
    os.close(main)
    return process.wait(), written.decode(errors="replace")


def rows_of_screen(written):
    """
    What a terminal shows in the end, and every text that a live line has had. Understood are \\r,
    \\n and "erase to the end of the line".
    """
    rows = [""]
    live = []
    for part in re.split(r"(\r\n|\r|\n)", written):
        if part in ("\r\n", "\n"):
            rows.append("")
        elif part == "\r":
            rows[-1] = ""
        elif part:
            rows[-1] += part.replace("\x1b[K", "")
            if part.endswith("\x1b[K") and len(part) > len("\x1b[K"):
                live.append(part.replace("\x1b[K", ""))
    return rows, live


@pytest.mark.parametrize("columns", [80, 40])
def test_the_live_line_of_a_terminal(columns, folder, tmp_path):
    code, written = in_terminal(
        columns, sys.executable, ROOT / "step1_sft.py", "--data_path", folder / "rows.jsonl",
        "--max_steps", "25", "--max_eval_samples", "16", "--max_answer_seq_len", "8",
        "--eval_steps", "10", cwd=tmp_path,
        env={**clean_environment(), "RUN_STAGES": "1/3 4.0 3.0 2.0"})
    rows, live = rows_of_screen(written)
    assert code == 0, written
    steps = [line for line in live if re.match(r"sft 1/3  \d+/25  0:\d\d left, run \d", line)]
    assert len(steps) >= 3 and all(len(line) < columns for line in live)
    if columns == 80:
        assert re.search(r"steps/s  loss +\d\.\d+  lr", steps[-1])
    assert any(line.startswith("held-out rows: batch 1 of") for line in live)
    # The last state stays; what else was printed stands in lines of its own.
    assert [row for row in rows if row.startswith("sft 1/3  25/25")]
    assert len([row for row in rows if row.startswith("sft 1/3")]) == 1
    assert [row for row in rows if row.startswith("held-out rows at step 10: perplexity ")]
    assert not any(row.startswith("step   ") for row in rows)  # the lines of a file


def test_a_terminal_that_is_gone_ends_no_run(monkeypatch):
    class Gone:
        def isatty(self):
            return True

        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Gone())
    terminal.show_live("step 1", force=True)
    terminal.clear_live()
    terminal.show_live("step 2", force=True)
    terminal.keep_live()


def test_a_file_has_no_live_line(folder, run_script):
    code, output = run_script("step1_sft.py", "--data_path", folder / "rows.jsonl", "--max_steps",
                              "3", "--max_eval_samples", "4", "--max_answer_seq_len", "8")
    assert code == 0 and "\r" not in output and "\x1b" not in output
    assert [line[:12] for line in output.splitlines() if line[:5] == "step "] == [
        "step     1/3", "step     3/3", "step 1 done "]


def test_libraries_are_quiet_unless_asked(folder, run_script):
    flags = ["--data_path", folder / "rows.jsonl", "--max_steps", "1", "--max_eval_samples", "4",
             "--max_answer_seq_len", "8"]
    quiet = {"DS_ACCELERATOR": "cpu"}
    code, output = run_script("step1_sft.py", *flags, env=quiet)
    assert code == 0 and "[INFO]" not in output and "Warning" not in output
    code, output = run_script("step1_sft.py", *flags, "--verbose", "--overwrite_output_dir",
                              env=quiet)
    assert code == 0 and "[INFO]" in output


# -----------------------------------------------------------------------------
# monitors

def test_tensorboard_has_the_stages_apart_and_held_out_numbers(folder, process_group):
    """Read back from the event files: every number of the metrics and of the evaluations."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    ds_config = json.loads((folder / "ds.json").read_text())
    ds_config |= {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True}}
    (folder / "watched.json").write_text(json.dumps(ds_config))
    for stage in NAMES:
        train(stage, folder, "monitored", save_steps=0, eval_steps=3,
              deepspeed_config=str(folder / "watched.json"))
    out = folder / "monitored"
    assert {path.name for path in (out / "tensorboard").iterdir()} == {"sft", "reward", "ppo"}
    for section, name in (("sft", "sft"), ("reward", "reward"), ("ppo", "actor")):
        read = events.EventAccumulator(str(out / "tensorboard" / section))
        read.Reload()
        written = {}
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            for line in lines_of(out / name / file):
                step = line.pop("step")
                for tag, value in line.items():
                    written.setdefault(tag, []).append((step, value))
        assert set(read.Tags()["scalars"]) == set(written)
        for tag, values in written.items():
            found = [(event.step, event.value) for event in read.Scalars(tag)]
            assert [step for step, _ in found] == [step for step, _ in values], tag
            assert [v for _, v in found] == pytest.approx([v for _, v in values], rel=1e-5), tag
        assert any(tag.startswith("eval/") for tag in written)
        assert list((out / "csv_monitor" / section).rglob("*.csv"))


# -----------------------------------------------------------------------------
# model cards

def test_every_saved_folder_has_its_card(folder, process_group):
    for stage in NAMES:
        train(stage, folder, "cards", save_steps=0)
    numbers = json.loads((folder / "cards/summary.json").read_text())
    for name, section, loader in (
            ("sft", "sft", AutoModelForCausalLM), ("actor", "ppo", AutoModelForCausalLM),
            ("actor_ema", "ppo", AutoModelForCausalLM),
            ("reward", "reward", AutoModelForSequenceClassification),
            ("critic", "ppo", AutoModelForSequenceClassification)):
        text = (folder / "cards" / name / "README.md").read_text()
        _, head, body = text.split("---\n", 2)
        assert yaml.safe_load(head) == {"library_name": "transformers"}  # no folders of this machine
        # An average and a critic are not evaluated by themselves.
        own = numbers[section] if name not in ("actor_ema", "critic") else {}
        assert ("held-out result" in body) == bool(own)
        for key, value in own.items():
            [row] = [row for row in body.splitlines() if row.startswith(f"| {key} |")]
            assert float(row.split("|")[2]) == pytest.approx(value, rel=1e-3, abs=1e-4)
        start = "reward" if name in ("reward", "critic") else "actor"  # of the small models
        assert f"* started from: `{folder / start}`" in body
        # The lines by which it says that it is loaded.
        code = re.search(r"```python\n(.*?)```", body, re.DOTALL).group(1)
        names = {}
        exec(code, names)
        assert isinstance(names["model"], torch.nn.Module) and loader.__name__ in code
        assert len(AutoTokenizer.from_pretrained(folder / "cards" / name)) == len(names["tokenizer"])


def test_a_card_names_a_model_and_data_of_a_hub(tmp_path):
    from support.model_card import write_model_cards
    (tmp_path / "sft").mkdir()
    config = step1_sft.Config(output_dir=str(tmp_path), data_path=["Dahoas/rm-static:default", "toy"])
    write_model_cards(config, "sft", {"perplexity": 3.25, "gold": None}, "facebook/opt-125m")
    text = (tmp_path / "sft/README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "library_name": "transformers", "base_model": "facebook/opt-125m",
        "datasets": ["Dahoas/rm-static"]}
    assert "| perplexity | 3.25 |" in text and "gold" not in text


def test_what_is_written_beside_a_model_is_no_part_of_it(folder, process_group, tmp_path):
    """A later stage's --resume compares the model that it starts from by its checksum."""
    train(step1_sft, folder, "beside", max_steps=1, save_steps=0)
    model = folder / "beside/sft"
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    for name in ("README.md", "evaluations.jsonl", "samples.jsonl", "metrics.jsonl"):
        (copy / name).write_text("another\n")
    assert checksum(copy) == checksum(model)
    (copy / "config.json").write_text("{}")
    assert checksum(copy) != checksum(model)


def test_a_dpo_policy_leaves_step_3_without_a_reward_model(tmp_path, monkeypatch, capsys):
    """Said by run_all.sh before its first stage, not after its second."""
    from support import run_all
    monkeypatch.chdir(tmp_path)
    small = ["--data_path", "toy", "--max_steps", "2"]
    with pytest.raises(SystemExit):
        run_all.check("cpu", [
            "step1_sft", "--model_name_or_path", "tiny", *small, "--",
            "step2_reward", "--model_name_or_path", "output/sft", "--dpo", *small, "--",
            "step3_ppo", "--actor_model_name_or_path", "output/sft",
            "--critic_model_name_or_path", "output/reward", *small])
    assert "run_all.sh: error: --dpo makes the actor itself" in capsys.readouterr().err


def test_infinite_nats_are_no_perplexity(process_group):
    """They end the run before a model is saved; large but finite ones do not."""
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long),
             "attention_mask": torch.ones(1, 3, dtype=torch.long),
             "loss_mask": torch.ones(1, 3), "weight": torch.ones(1)}
    for nats, expected in ((float("inf"), float("inf")), (2000.0, pytest.approx(1.014e304, rel=1e-3))):
        def model(ids, mask, loss_mask):
            return torch.full((1, 2), -nats), None
        assert step1_sft.perplexity(model, [batch]) == expected
