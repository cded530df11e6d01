"""
What a run leaves on the disk: nothing is overwritten without a word, nothing half-written passes
for a model, two runs do not share a folder, and a run that is told to stop saves first.
"""

import errno
import fcntl
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import save_file

import step1_sft
import step2_reward
from conftest import ROOT, clean_environment
from support import checkpoints, log, models, processes, run_all
from support.flags import UsageError, exit_on_usage_error
from test_resume import assert_same, checkpoints_of, cut, inputs, result, stop_at, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small models and rows for `train`, which writes into folders below."""
    folder = tmp_path_factory.mktemp("saved")
    inputs(folder)
    return folder


def told(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def tell_in(patch, module, name):
    """A SIGTERM comes in the middle of that function of a stage."""
    function = getattr(module, name)

    def told_first(*arguments, **options):
        told()
        return function(*arguments, **options)

    patch.setattr(module, name, told_first)


# -----------------------------------------------------------------------------
# told to stop

def test_without_save_steps_a_run_told_to_stop_saves_too(folder, process_group, monkeypatch,
                                                         capsys):
    train(step1_sft, folder, "unsaved-whole", save_steps=0)
    with monkeypatch.context() as patch:
        stop_at(patch, 4, told)
        with pytest.raises(SystemExit, match="143"):
            train(step1_sft, folder, "unsaved", save_steps=0)
    said = capsys.readouterr().out
    assert "checkpoint-4 is saved, --resume goes on from it" in said
    train(step1_sft, folder, "unsaved", save_steps=0, resume=True)
    assert "4 of 7 steps are done" in capsys.readouterr().out
    assert_same(result(folder / "unsaved-whole"), result(folder / "unsaved"))


def test_a_second_ctrl_c_ends_at_once(folder, process_group, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    handlers = []

    def ctrl_c():
        told(signal.SIGINT)
        handlers.append(signal.getsignal(signal.SIGINT))

    with monkeypatch.context() as patch:
        stop_at(patch, 2, ctrl_c)
        with pytest.raises(SystemExit, match="143"):
            train(step1_sft, folder, "twice", save_steps=0)
    assert handlers == [signal.SIG_DFL]
    assert "a second Ctrl-C ends the run at once" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) == before


TWO_SIGNALS = """
import os, signal
from support.checkpoints import StopSignal
StopSignal().watch()
try:
    os.kill(os.getpid(), signal.SIGINT)
except SystemExit:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit:
        pass
"""


def test_two_signals_before_the_first_step_are_one_exit():
    """A Ctrl-C goes to all processes of a terminal, and DeepSpeed's launcher adds a SIGTERM."""
    ended = subprocess.run([sys.executable, "-c", TWO_SIGNALS], cwd=ROOT, timeout=300,
                           env=clean_environment())
    assert ended.returncode == 143


def test_before_the_first_step_nothing_is_left(folder, process_group, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        tell_in(patch, step1_sft, "load_language_model")
        with pytest.raises(SystemExit, match="143"):
            train(step1_sft, folder, "early")
    assert "before a step was done: the same command with --resume" in capsys.readouterr().out
    assert not (folder / "early" / "sft").exists()


@pytest.mark.parametrize("moment", ["perplexity", "save_model", "sample_answers"])
def test_after_the_last_step_the_model_is_saved_first(moment, folder, process_group, monkeypatch,
                                                      capsys):
    name = f"late-{moment}"
    train(step1_sft, folder, name + "-whole", save_steps=0)
    with monkeypatch.context() as patch:
        tell_in(patch, step1_sft, moment)
        with pytest.raises(SystemExit, match="143"):
            train(step1_sft, folder, name, save_steps=0)
    said = capsys.readouterr().out
    assert "is done and its model saved, --resume leaves it as it is" in said
    assert_same(result(folder / (name + "-whole")), result(folder / name))
    left = {path.name for path in (folder / name / "sft").iterdir()}
    assert not any(name.startswith((".", "checkpoint")) for name in left)
    train(step1_sft, folder, name, resume=True)
    assert "done already" in capsys.readouterr().out


# A rank in small, and what DeepSpeed's launcher starts: a child, and below it a rank. The child notes
# a signal that it gets itself, and hands on the rank's exit code.
RANK = """#!/bin/bash
case "$*" in *step1_sft.py*) ;; *) echo 29500; exit ;; esac
trap "echo the rank saves; sleep 1; exit CODE" TERM
touch running
for i in {1..300}; do sleep 0.1; done
"""
LAUNCHER = """#!/bin/bash
bash -c 'trap "echo the child was told" TERM
         python3 step1_sft.py &
         wait $!; wait $!; exit $?'
exit $?
"""


@pytest.mark.parametrize("hardware", ["cpu", "1node"])  # without the launcher, and with it
@pytest.mark.parametrize("rank_code, code, said", [
    (143, 143, "run_all.sh: step1_sft.py was stopped; the same line with --resume goes on"),
    (2, 2, "run_all.sh: error: step1_sft.py failed; its last lines above say why")],
    ids=["saved", "could-not-save"])
def test_run_all_hands_a_signal_to_the_ranks_and_says_so(hardware, rank_code, code, said, tmp_path):
    """Twice, because an impatient scheduler may. Exit code 2 of a rank: it could not save."""
    (tmp_path / "bin").mkdir()
    for name, text in (("deepspeed", LAUNCHER), ("python3", RANK.replace("CODE", str(rank_code)))):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {**clean_environment(), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    run = subprocess.Popen(["bash", ROOT / "run_all.sh", "tiny", hardware], cwd=tmp_path, text=True,
                           env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (tmp_path / "running").exists():
        time.sleep(0.05)
    run.terminate()
    time.sleep(0.3)
    run.terminate()
    output = run.communicate(timeout=20)[0]
    assert "the rank saves" in output and "the child was told" not in output
    assert output.strip().splitlines()[-1].startswith(said), output
    assert run.returncode == code


# -----------------------------------------------------------------------------
# full disks, deleted folders, dead ranks

def small_sft(folder, out, **flags):
    """The command line of a small SFT run."""
    flags = {"output_dir": out, "data_path": folder / "rows.jsonl", "data_split": "1,1,1",
             "model_name_or_path": folder / "actor", "deepspeed_config": folder / "ds.json",
             "max_seq_len": 96, "max_prompt_seq_len": 80, "max_answer_seq_len": 8,
             "max_eval_samples": 4, "per_device_train_batch_size": 4, **flags}
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def test_a_disk_that_is_full_for_the_log_is_a_sentence(folder, run_script):
    """/dev/full is a file of a full disk: it can be opened, and nothing can be written."""
    (folder / "log-full" / "sft").mkdir(parents=True)
    (folder / "log-full" / "sft" / "metrics.jsonl").symlink_to("/dev/full")
    code, output = run_script(
        "step1_sft.py", *small_sft(folder, folder / "log-full", max_steps=3, save_steps=1))
    assert code == 2 and "Traceback" not in output, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("step1_sft.py: error: rank 0: [Errno 28] No space left on device"), last
    assert "Make room. The same command with --resume goes on" in last


def test_a_checkpoint_that_has_no_room_says_so(tmp_path):
    """And not torch's "enforce fail at inline_container.cc", of which it was the cause."""
    writer = checkpoints.DurableWriter(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))  # bytes
    try:
        writer.save([torch.ones(30_000)], tmp_path / "random-0.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert writer.error == "[Errno 27] File too large"


def test_a_folder_that_was_deleted_is_a_sentence(folder, process_group, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda: shutil.rmtree(folder / "deleted" / "sft"))
        with pytest.raises(UsageError, match="checkpoint-3 could not be written: .*No such file"):
            train(step1_sft, folder, "deleted")
    train(step1_sft, folder, "deleted", resume=True)


def test_a_rank_that_is_gone_is_a_sentence_of_the_others(folder):
    """One of two processes is killed, as the system does where memory runs out."""
    command = [sys.executable, ROOT / "step1_sft.py",
               *small_sft(folder, folder / "gone", max_steps=9999)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in "01":
        environment = {**clean_environment(), "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT))
    log = folder / "gone" / "sft" / "metrics.jsonl"
    while ranks[1].poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    ranks[1].kill()
    ranks[1].communicate()
    output = ranks[0].communicate(timeout=60)[0]
    assert ranks[0].returncode == 1 and "Traceback" not in output, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("step1_sft.py: error: rank 0: another rank of this run is gone"), last


def test_a_port_that_another_run_has_is_a_sentence(folder, run_script):
    """`deepspeed` gives every run the port 29500."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        code, output = run_script(
            "step1_sft.py", *small_sft(folder, folder / "port"),
            env={"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port)})
    assert code == 2 and "Traceback" not in output, output
    assert f"error: port {port} of this host is in use" in output.strip().splitlines()[-1]


# -----------------------------------------------------------------------------
# a finished model

def test_new_weights_never_lie_beside_an_older_config(folder, process_group, monkeypatch):
    """A run is killed when its weights have taken their name, and its config.json has not."""
    train(step1_sft, folder, "mixed", max_steps=2)
    replace = os.replace

    def die_before_config(source, target):
        if os.path.basename(target) == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die_before_config)
        with pytest.raises(KeyboardInterrupt):
            train(step1_sft, folder, "mixed", max_steps=2, overwrite_output_dir=True)
    sft = folder / "mixed" / "sft"
    assert checkpoints.what_a_model_lacks(sft) == "config.json is missing"
    train(step1_sft, folder, "mixed", max_steps=2, resume=True)
    assert checkpoints.what_a_model_lacks(sft) is None and not (sft / ".saving").exists()


def test_a_finished_model_is_not_overwritten_without_a_word(folder, process_group, monkeypatch):
    flags = dict(max_steps=2, save_steps=0)
    train(step1_sft, folder, "kept", **flags)
    weights = folder / "kept" / "sft" / "model.safetensors"
    before = weights.read_bytes()
    refused = "kept/sft holds the finished model .*--resume.*--overwrite_output_dir.*--output_dir"
    with pytest.raises(UsageError, match=refused):
        train(step1_sft, folder, "kept", learning_rate=2e-3, **flags)

    # with the flag it stays until the new one is complete, and is protected like any other
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(step1_sft, folder, "kept", learning_rate=2e-3, overwrite_output_dir=True, **flags)
    assert weights.read_bytes() == before
    with pytest.raises(UsageError, match=refused):
        train(step1_sft, folder, "kept", learning_rate=2e-3, **flags)
    train(step1_sft, folder, "kept", learning_rate=2e-3, overwrite_output_dir=True, **flags)
    assert weights.read_bytes() != before

    # the stages do not protect each other
    train(step2_reward, folder, "kept", **flags)


def test_run_all_finds_a_finished_model_of_the_last_stage_before_the_first(tmp_path, capsys):
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "run_config.json").write_text("{}")
    flags = ["--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        run_all.check("cpu", ["step1_sft", *flags, "--", "step3_ppo", *flags])
    assert "actor holds the finished model of an earlier run" in capsys.readouterr().err
    for way_out in ("--resume", "--overwrite_output_dir", "--dry_run"):
        run_all.check("cpu", ["step1_sft", *flags, "--", "step3_ppo", *flags, way_out])


def test_a_model_that_is_not_whole_is_not_done(folder, process_group, capsys):
    train(step1_sft, folder, "broken-whole")
    train(step1_sft, folder, "broken")
    sft = folder / "broken" / "sft"
    for damage, named in (
            (lambda: cut(sft / "model.safetensors"), "model.safetensors is not whole"),
            (lambda: (sft / "model.safetensors").unlink(), "model.safetensors is missing"),
            (lambda: (sft / "tokenizer.json").unlink(), "tokenizer.json is missing"),
            (lambda: (sft / "config.json").unlink(), "config.json is missing")):
        damage()
        train(step1_sft, folder, "broken", resume=True)
        said = capsys.readouterr().out
        assert f"its model is not whole ({named}" in said
        assert "6 of 7 steps are done" in said
        assert_same(result(folder / "broken-whole"), result(folder / "broken"))
    train(step1_sft, folder, "broken", resume=True)
    assert "done already" in capsys.readouterr().out


def test_what_a_model_in_several_files_lacks(tmp_path):
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        save_file({name: torch.ones(3)}, tmp_path / name)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    assert checkpoints.what_a_model_lacks(tmp_path) is None
    (tmp_path / names[1]).write_bytes(b"")
    assert f"{names[1]} is not whole" in checkpoints.what_a_model_lacks(tmp_path)
    (tmp_path / names[1]).unlink()
    assert checkpoints.what_a_model_lacks(tmp_path) == f"{names[1]} is missing"
    index.write_text("{")
    assert "index.json cannot be read" in checkpoints.what_a_model_lacks(tmp_path)


# -----------------------------------------------------------------------------
# two runs, one folder

def test_two_runs_do_not_share_a_folder(folder, process_group, monkeypatch, capsys):
    shared = folder / "shared"
    shared.mkdir()
    with open(shared / ".sft.lock", "w") as other:
        # Another process would hold the lock in the same way.
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("process 7 on far")
        other.flush()
        with pytest.raises(UsageError, match="in use: .*process 7 on far.*--output_dir"):
            train(step1_sft, folder, "shared", max_steps=1)
        assert not (shared / "sft").exists()
        train(step2_reward, folder, "shared", max_steps=1)

    # The lock is this process's while the stage goes on, and free when it is finished.
    held = []

    def look(self, step, values):
        with open(shared / ".sft.lock") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(step)

    with monkeypatch.context() as patch:
        patch.setattr(log.MetricsLog, "__call__", look)
        train(step1_sft, folder, "shared", max_steps=1)
    assert held == [1]
    with open(shared / ".sft.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    train(step1_sft, folder, "unlocked", max_steps=1)
    assert "cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# what a run has read, and how long it is

def test_a_change_anywhere_in_a_file_is_noticed(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(bytes(5 * 2**20))
    before = checkpoints.checksum(file)
    with open(file, "r+b") as opened:
        opened.seek(2**21)
        opened.write(b"1")
    assert checkpoints.checksum(file) != before


def test_a_dataset_that_was_replaced_is_noticed(tmp_path):
    """datasets' save_to_disk writes its rows into folders below, here of the same sizes."""
    sums = []
    for word in ("old", "new"):
        rows = [{"prompt": f"{i}?", "response": f"{word} {i}"} for i in range(9)]
        place = tmp_path / word
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(place)
        for state in place.glob("*/state.json"):
            state.write_text("{}")  # holds a random fingerprint
        sums.append(checkpoints.checksum(place))
    assert sums[0] != sums[1]


def test_what_a_run_writes_itself_is_no_change(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    before = checkpoints.checksum(tmp_path)
    for name in ("metrics.jsonl", "run_config.json", "summary.json", ".sft.lock"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "manifest.json").write_text("{}")
    assert checkpoints.checksum(tmp_path) == before
    (tmp_path / "test.jsonl").write_text("{}")
    assert checkpoints.checksum(tmp_path) != before


def test_a_finished_run_goes_on_to_more_steps(folder, process_group, capsys):
    """At a constant learning rate to the weights of a run that had them from the start."""
    constant = dict(lr_scheduler_type="constant")
    train(step1_sft, folder, "longer-whole", max_steps=9, **constant)
    train(step1_sft, folder, "longer", **constant)
    train(step1_sft, folder, "longer", max_steps=9, resume=True, **constant)
    said = capsys.readouterr().out
    assert "done with --max_steps 7, and now it is 9" in said
    assert "6 of 9 steps are done" in said
    assert "of a run of 7 steps, now 9: from here on the learning rate follows" in said
    assert_same(result(folder / "longer-whole"), result(folder / "longer"))
    assert checkpoints_of(folder / "longer" / "sft") == ["checkpoint-6", "checkpoint-9"]

    # fewer steps, said by --max_steps or by what an epoch of the rows comes to
    for flags, named in (
            (dict(max_steps=8), "checkpoint-9 has 9 steps behind it, and this run is to have 8"),
            (dict(max_steps=-1), "has 24 steps behind it, and this run is to have 23")):
        if flags["max_steps"] == -1:
            train(step1_sft, folder, "longer", max_steps=24, resume=True, **constant)
        with pytest.raises(UsageError, match=named):
            train(step1_sft, folder, "longer", resume=True, **constant | flags)


def test_other_flags_start_anew_where_they_may_overwrite(folder, process_group, capsys):
    train(step1_sft, folder, "anew")
    with pytest.raises(UsageError, match="go on with the old value, or add --overwrite_output_dir"):
        train(step1_sft, folder, "anew", resume=True, seed=1)
    train(step1_sft, folder, "anew", resume=True, seed=1, overwrite_output_dir=True)
    assert "--overwrite_output_dir starts from the beginning" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# no code from a checkpoint

class Command:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_loading_a_checkpoint_runs_no_code(tmp_path):
    path = tmp_path / "trainer.pt"
    torch.save({"kl_coef": Command(str(tmp_path / "made"))}, path)
    with pytest.raises(UsageError, match="trainer.pt holds pickled objects"):
        checkpoints.load_plain(path)
    assert not (tmp_path / "made").exists()
    with open(path, "wb") as file:
        pickle.dump(Command(str(tmp_path / "made")), file)
    with pytest.raises(UsageError, match="trainer.pt holds pickled objects"):
        checkpoints.load_plain(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("older", [False, True])
def test_random_states_are_plain_numbers(older, tmp_path):
    """Older checkpoints have numpy's state as an array."""
    generators = checkpoints.random_generators()
    states = [get_state() for get_state, _ in generators]
    if older:
        states[1] = np.random.get_state()
    torch.save(states, tmp_path / "random-0.pt")

    def numbers():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()

    expected = numbers()
    if not older:
        torch.load(tmp_path / "random-0.pt", weights_only=True)
    loaded = checkpoints.load_plain(tmp_path / "random-0.pt")
    for (_, set_state), state in zip(generators, loaded):
        set_state(state)
    assert numbers() == expected


def test_a_compile_that_was_killed_is_not_waited_for(process_group, tmp_path, monkeypatch, capfd):
    """
    torch would wait for its lock for ever; a lock that is fresh may be another process's, and
    stays.
    """
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    processes.free_compile_lock("cpu_adam")
    assert lock.exists() and f"{lock} says that another process compiles" in capfd.readouterr().out
    hour_ago = time.time() - 3600
    os.utime(lock, (hour_ago, hour_ago))
    processes.free_compile_lock("cpu_adam")
    assert not lock.exists() and not capfd.readouterr().out
    processes.free_compile_lock("cpu_adam")


def test_a_ctrl_c_before_anything_listens_is_a_sentence(capsys):
    # A shell starts what is in its background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended, exit_on_usage_error():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130 and "stopped by Ctrl-C" in capsys.readouterr().err


def test_whole_weights_are_not_kept_after_a_save():
    """ZeRO 3 gathers them for rank 0; in the host's memory they are as large as the model."""
    gathered = {"model.weight": torch.ones(2)}
    engine = types.SimpleNamespace(zero_optimization_stage=lambda: 3,
                                   _zero3_consolidated_16bit_state_dict=lambda: gathered)
    assert list(models.whole_state(engine)) == ["weight"]
    assert not gathered
