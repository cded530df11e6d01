"""
Runs that survive: whatever ends a run, --resume goes on to the weights and metrics that it would
have had.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import step1_sft
import step2_reward
import step3_ppo
from conftest import clean_environment
from data import load_tokenizer
from ranks import run_ranks
from support import checkpoints, log as log_module, processes
from support.flags import UsageError
from support.toy import toy_rows
from test_ppo import small_models

FOLDERS = {step1_sft: "sft", step2_reward: "reward", step3_ppo: "actor"}


def inputs(folder):
    small_models("opt", folder, load_tokenizer("tiny"))
    rows = [json.dumps(row) for row in toy_rows()[:400] if row["rejected"]]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "ds.json").write_text(json.dumps({
        "gradient_clipping": 1.0, "zero_optimization": {"stage3_param_persistence_threshold": 0}}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    inputs(folder)
    return folder


def config(stage, folder, out, ranks=1, **flags):
    """
    The stage on small models, 7 steps of 4 rows whatever the number of ranks, a checkpoint every 3.
    """
    common = dict(
        output_dir=str(folder / out), data_path=[str(folder / "rows.jsonl")],
        deepspeed_config=str(folder / "ds.json"), data_split="1,1,1", max_steps=7, save_steps=3,
        max_eval_samples=4, max_seq_len=96, max_prompt_seq_len=80, max_answer_seq_len=8,
        per_device_train_batch_size=4 // ranks, weight_decay=1.0)
    if stage is step3_ppo:
        common |= dict(
            actor_model_name_or_path=str(folder / "actor"),
            critic_model_name_or_path=str(folder / "reward"), enable_ema=True,
            actor_learning_rate=1e-3, critic_learning_rate=1e-3,
            per_device_generation_batch_size=8 // ranks, ppo_epochs=2, kl_target=1.0)
    else:
        model = "actor" if stage is step1_sft else "reward"
        common |= dict(model_name_or_path=str(folder / model), learning_rate=1e-3)
    return stage.Config(**common | flags)


def train(stage, *arguments, **flags):
    processes.seed_everything(1234)  # as the start of a process does
    stage.main(config(stage, *arguments, **flags))


def result(folder):
    """All that a run leaves but its times: weights by file and name, the logs, summary."""
    weights = {}
    for file in folder.glob("*/model.safetensors"):
        for name, tensor in load_file(file).items():
            weights[file.parent.name, name] = tensor
    timeless = []
    logs = ("metrics", "evaluations", "samples")
    for file in sorted(file for name in logs for file in folder.glob(f"*/{name}.jsonl")):
        for line in file.read_text().splitlines():
            timeless.append({
                name: value for name, value in json.loads(line).items()
                if not name.startswith(("time/", "tokens_per_second", "memory"))})
    summary = json.loads((folder / "summary.json").read_text())
    numbers = {section: {name: value for name, value in summary[section].items()
                         if name != "seconds"}
               for section in summary if section in ("sft", "reward", "ppo")}
    return weights, timeless, numbers


def assert_same(one, other):
    """Bitwise."""
    assert one[1:] == other[1:] and one[0].keys() == other[0].keys() and one[0]
    for name in one[0]:
        assert torch.equal(one[0][name], other[0][name]), name


def stop_at(monkeypatch, step, how):
    """`how()` runs in the middle of this step, once its metrics are logged."""
    log = log_module.MetricsLog.__call__

    def logged(self, now, values):
        log(self, now, values)
        if now == step:
            how()

    monkeypatch.setattr(log_module.MetricsLog, "__call__", logged)


LORA = dict(lora_dim=2, only_optimize_lora=True)


@pytest.mark.parametrize("stage, zero_stage, dtype, flags", [
    pytest.param(step1_sft, 2, "fp32", {}, id="sft-2"),
    pytest.param(step2_reward, 3, "fp32", {}, id="reward-3"),
    pytest.param(step3_ppo, 0, "fp32", {}, id="ppo-0"),
    pytest.param(step3_ppo, 3, "fp32", {}, id="ppo-3"),
    pytest.param(step1_sft, 2, "bf16", {}, id="sft-2-bf16"),
    pytest.param(step3_ppo, 0, "bf16", {}, id="ppo-0-bf16"),
    pytest.param(step3_ppo, 3, "bf16", {}, id="ppo-3-bf16"),
    pytest.param(step2_reward, 0, "bf16", LORA, id="reward-0-bf16-lora"),
    pytest.param(step3_ppo, 2, "fp32", LORA, id="ppo-2-lora"),
    pytest.param(step3_ppo, 3, "bf16", LORA, id="ppo-3-bf16-lora")])
def test_stop_then_resume_is_the_uninterrupted_run(stage, zero_stage, dtype, flags, folder,
                                                   process_group, monkeypatch, capsys):
    """By SIGTERM, or by the SIGINT of Ctrl-C where nothing is sharded."""
    name = f"{FOLDERS[stage]}-{zero_stage}-{dtype}-{len(flags)}"
    if dtype == "bf16":
        settings = {**json.loads((folder / "ds.json").read_text()), "bf16": {"enabled": True}}
        (folder / "bf16.json").write_text(json.dumps(settings))
        flags = dict(flags, deepspeed_config=str(folder / "bf16.json"))
    flags = dict(flags, zero_stage=zero_stage)
    default = signal.getsignal(signal.SIGINT)
    number = signal.SIGTERM if zero_stage else signal.SIGINT
    train(stage, folder, name + "-whole", **flags)
    with monkeypatch.context() as patch:
        stop_at(patch, 5, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit, match="143"):
            train(stage, folder, name, **flags)
    assert "checkpoint-5 is saved" in capsys.readouterr().out
    if "lora_dim" in flags:
        checkpoint = folder / name / FOLDERS[stage] / "checkpoint-5"
        for file in checkpoint.rglob("*model_states.pt"):
            saved = torch.load(file, weights_only=False)["module"]
            assert not any(".base." in weight for weight in saved), "frozen, and loaded again"
    train(stage, folder, name, **flags, resume=True)
    assert "5 of 7 steps are done" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) == default
    assert_same(result(folder / (name + "-whole")), result(folder / name))


def checkpoints_of(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def test_a_cut_checkpoint_is_skipped_and_the_run_is_still_the_same(folder, process_group,
                                                                   monkeypatch, capsys):
    train(step1_sft, folder, "cut-whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 7, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(step1_sft, folder, "cut")
    sft = folder / "cut" / "sft"
    assert checkpoints_of(sft) == ["checkpoint-3", "checkpoint-6"]
    cut(sft / "checkpoint-6" / "model" / "mp_rank_00_model_states.pt")
    (sft / "checkpoint-7.tmp").mkdir()  # a save that was killed
    train(step1_sft, folder, "cut", resume=True)
    out = capsys.readouterr().out
    assert ("checkpoint-6 is skipped, it is not complete: model/mp_rank_00_model_states.pt has"
            in out)
    assert "3 of 7 steps are done" in out
    assert_same(result(folder / "cut-whole"), result(folder / "cut"))
    assert checkpoints_of(sft) == ["checkpoint-3", "checkpoint-6"]

    # finished: left alone with the same flags, whatever the unimportant ones; run again when what
    # it read has changed
    before = (sft / "model.safetensors").stat().st_mtime_ns
    train(step1_sft, folder, "cut", resume=True, save_steps=2, logging_steps=1)
    assert "done already" in capsys.readouterr().out
    assert (sft / "model.safetensors").stat().st_mtime_ns == before
    for flags, named in (
            (dict(learning_rate=2e-3), "--learning_rate 0.001, and now it is 0.002"),
            (dict(seed=1), "--seed 1234, and now it is 1"),
            (dict(zero_stage=2), "--zero_stage (or the JSON's) 0"),
            (dict(per_device_train_batch_size=2),
             "gradient_accumulation_steps x processes 4, and now it is 2")):
        with pytest.raises(UsageError) as refused:
            train(step1_sft, folder, "cut", resume=True, **flags)
        assert named in str(refused.value) and "checkpoint-6" in str(refused.value)
    rows = folder / "rows.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("cold", "damp", 1))
    try:
        with pytest.raises(UsageError, match="checksum"):
            train(step1_sft, folder, "cut", resume=True)
    finally:
        rows.write_text(text)

    # what a run read counts, not what its files have become since
    with monkeypatch.context() as patch:
        def append():
            rows.write_text(text + "\n" + text.splitlines()[0])
        stop_at(patch, 2, append)
        stop_at(patch, 5, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(step1_sft, folder, "appended")
    try:
        with pytest.raises(UsageError, match="checksum"):
            train(step1_sft, folder, "appended", resume=True)
    finally:
        rows.write_text(text)

    # none that is complete: from the beginning, and nothing of the old run survives the first new
    # checkpoint
    for path in sft.glob("checkpoint-*"):
        (path / "manifest.json").unlink()
    (sft / "run_config.json").unlink()
    train(step1_sft, folder, "cut", resume=True, save_steps=2, save_total_limit=1)
    assert "no complete checkpoint" in capsys.readouterr().out
    assert checkpoints_of(sft) == ["checkpoint-6"]
    assert_same(result(folder / "cut-whole"), result(folder / "cut"))


def test_a_run_may_be_moved_as_a_whole(folder, process_group, tmp_path):
    """
    An earlier stage's model below --output_dir is the same wherever that lies; another model is
    not.
    """
    resolved = {}
    for place in ("here", "there"):
        shutil.copytree(folder / "actor", tmp_path / place / "sft")
        for name in (f"{place}/sft", "here/sft"):
            flags = config(
                step1_sft, tmp_path, place, model_name_or_path=str(tmp_path / name),
                data_path=[str(folder / "rows.jsonl")], deepspeed_config=str(folder / "ds.json"))
            resolved[place, name] = checkpoints.resolved_config(flags, "sft")
    here = resolved["here", "here/sft"]
    assert checkpoints.changed_flag(here, resolved["there", "there/sft"]) is None
    assert "model_name_or_path" in checkpoints.changed_flag(here, resolved["there", "here/sft"])


def test_a_full_disk_ends_in_a_sentence_and_spoils_nothing(folder, process_group, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    small = (100_000, limits[1])  # bytes: the metrics fit, the weights do not
    train(step2_reward, folder, "full-whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, small))
        try:
            with pytest.raises(UsageError) as full:
                train(step2_reward, folder, "full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reward = folder / "full" / "reward"
    assert "checkpoint-6 could not be written: [Errno 27] File too large" in str(full.value)
    assert "checkpoint-3 is as it was" in str(full.value)
    assert checkpoints_of(reward) == ["checkpoint-3"]
    train(step2_reward, folder, "full", resume=True)
    assert_same(result(folder / "full-whole"), result(folder / "full"))


def two_ranks(rank, ranks, folder, cases):
    """Each case as a whole, and again until SIGTERM to one of the ranks in step 5."""
    for stage, name, flags in cases:
        stage = list(FOLDERS)[stage - 1]
        train(stage, folder, name + "-whole", ranks, **flags)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):
            stop_at(patch, 5, lambda: rank == 1 and os.kill(os.getpid(), signal.SIGTERM))
            train(stage, folder, name, ranks, **flags)


def go_on(rank, ranks, folder, cases):
    for stage, name, flags in cases:
        train(list(FOLDERS)[stage - 1], folder, f"{name}-{ranks}", ranks, resume=True, **flags)


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one_and_with_four(folder, process_group, capsys):
    # the likeliest token only, and one minibatch a rollout: with sampling, and in another order,
    # rows draw other noise on other ranks
    ppo = dict(top_p=1e-6, gradient_accumulation_steps=2)
    cases = [(1, "ranks-sft-2", dict(zero_stage=2)),
             (1, "ranks-lora-3", dict(zero_stage=3, lora_dim=2, only_optimize_lora=True)),
             (2, "ranks-reward-3", dict(zero_stage=3)),
             (3, "ranks-ppo-0", dict(zero_stage=0, **ppo)),
             (3, "ranks-ppo-3", dict(zero_stage=3, **ppo))]
    run_ranks(2, two_ranks, folder, cases)
    for _, name, _ in cases:
        for ranks in (1, 4):
            shutil.copytree(folder / name, folder / f"{name}-{ranks}")
    go_on(0, 1, folder, cases)
    assert capsys.readouterr().out.count("is of 2 processes, now 1") == len(cases)
    run_ranks(4, go_on, folder, cases)
    for _, name, _ in cases:
        for ranks in (1, 4):
            whole = result(folder / (name + "-whole"))
            resumed = result(folder / f"{name}-{ranks}")
            # Samples are rank 0's share alone, which is another with other ranks.
            numbers = [[line for line in logs if "answer" not in line]
                       for logs in (resumed[1], whole[1])]
            for line, expected in zip(*numbers, strict=True):
                assert line == pytest.approx(expected, rel=1e-3, abs=1e-4), (name, ranks)
            torch.testing.assert_close(resumed[0], whole[0], atol=2e-6, rtol=0)
    named = ("per_device_train_batch_size x gradient_accumulation_steps x processes 4, "
             "and now it is 8")
    with pytest.raises(UsageError, match=named):
        train(step1_sft, folder, "ranks-sft-2", 1, resume=True, zero_stage=2,
              per_device_train_batch_size=8)


def test_killed_processes():
    """kill_and_resume.py in small: SIGKILL to all ranks, then to one of two, at random moments."""
    script = Path(__file__).with_name("kill_and_resume.py")
    command = [sys.executable, str(script), "--stage", "1", "--times", "2", "--steps", "7"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
