"""
Checkpoints: what a run leaves on the disk, and how --resume goes on from it.

    output/sft/checkpoint-300/      a complete checkpoint, after 300 steps
        model/                      DeepSpeed's files of an engine ("model"; PPO: "actor", "critic")
        random-0.pt, ...            every rank's random number generators
        trainer.pt                  PPO only: what the trainer counts and averages
        metrics.jsonl               the log of the first 300 steps
        manifest.json               steps, processes, seconds, the size of every file, the flags
    output/sft/checkpoint-400.tmp/  one that is being written, or whose writer was killed
    output/sft/run_config.json      the flags of a stage that was run to its end
    output/.sft.lock                locked by the process that trains into output/sft

Written  into checkpoint-N.tmp: engines, random numbers, trainer, log, and the manifest last. When
         all of it is on the disk, the folder is renamed to checkpoint-N, and older ones go.
Found    the newest checkpoint-N whose files all have the sizes in its manifest. It is used where
         the run had the same flags and read the same files, and refused where it did not. The
         number of steps may differ.

So a run that is killed at any moment goes on to the same weights, bit for bit. The project's own
files (*.pt beside the engines' folders) are read without running pickled code; DeepSpeed reads its
own as it likes, so a checkpoint from a stranger is not to be trusted.
"""

import copy
import dataclasses
import fcntl
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from safetensors import SafetensorError, safe_open

from support.flags import UsageError, first_line
from support.metrics import STAGES, write_summary
from support.model_card import write_model_cards
from support.processes import (all_sum, compute_dtype, deepspeed_settings, on_rank0, print0,
                               raise_on_all_ranks, seed_everything)
from support.runs import write_json


# -----------------------------------------------------------------------------
# may this run go on from that one?

# Flags that may differ on --resume: either harmless, or covered by an entry that resolved_config
# derives.
MAY_CHANGE_ON_RESUME = {
    "output_dir", "deepspeed_config", "zero_stage", "per_device_train_batch_size",
    "gradient_accumulation_steps", "per_device_generation_batch_size", "inference_tp_size",
    "logging_steps", "eval_steps", "verbose", "save_steps", "save_total_limit",
    "gradient_checkpointing", "resume", "overwrite_output_dir", "skip_preflight", "device"}

# Flags that say how long a run is. A finished run with others of them is not the same run, but one
# that goes on from a checkpoint may have them.
LENGTH_FLAGS = {"max_steps", "num_train_epochs"}


def resolved_config(config, section):
    """
    The flags, and what beside them decides the outcome: ZeRO stage, dtype, rows a step, and
    checksums of the files that are read. The names of these entries are parts of a sentence,
    because `changed_flag` prints them: "--{name} {old value}, and now it is {new value}".
    """
    ds_config = deepspeed_settings(config)
    world = dist.get_world_size()
    flags = dataclasses.asdict(config)

    # A checksum for every flag that names a file or folder, --reward_fn's file.py:function too.
    for name in sorted(flags.keys() - MAY_CHANGE_ON_RESUME):
        values = flags[name] if isinstance(flags[name], list) else [flags[name]]
        for value in values:
            path = value.split(":")[0] if isinstance(value, str) else ""
            if not os.path.exists(path):
                continue
            shown = path
            is_model = name.endswith("model_name_or_path")
            if is_model and Path(config.output_dir) in Path(path).parents:
                # An earlier stage's model is named by its place in the run, because a run may be
                # moved as a whole.
                shown = f"OUTPUT_DIR/{Path(path).relative_to(config.output_dir)}"
                flags[name] = shown
            flags[f"{name} {shown}, checksum of its bytes"] = checksum(path)

    # What flags and DeepSpeed JSON come to together.
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * world
    prompts = flags.get("per_device_generation_batch_size", 0) * world
    flags["stage"] = section
    flags["zero_stage (or the JSON's)"] = ds_config["zero_optimization"]["stage"]
    flags["deepspeed_config's dtype"] = str(compute_dtype(ds_config))
    flags["deepspeed_config's gradient_clipping"] = ds_config.get("gradient_clipping")
    flags["per_device_train_batch_size x gradient_accumulation_steps x processes"] = rows
    flags["per_device_generation_batch_size x processes"] = prompts
    return flags


def checksum(path):
    """
    CRC of a file, or of the files in a folder: their names and all of their bytes, at 2.4 GB a
    second where the disk gives them as fast. The files that a run writes beside its model do not
    count, nor do hidden ones.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        # What `datasets` saved lies in folders below. Of other folders only the files are read.
        saved_by_datasets = (path / "dataset_dict.json").exists()
        files = sorted(path.rglob("*") if saved_by_datasets else path.iterdir())
    written_by_a_run = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "run_config.json",
                        "summary.json", "README.md")
    crc = 0
    for file in files:
        name = str(file.relative_to(path)) if file != path else file.name
        if not file.is_file() or name.startswith(".") or file.name in written_by_a_run:
            continue
        crc = zlib.crc32(f"{name} {file.stat().st_size} ".encode(), crc)
        with open(file, "rb") as opened:
            while block := opened.read(2**24):
                crc = zlib.crc32(block, crc)
    return crc


def changed_flag(then, now, apart_from=()):
    """
    The first entry that counts and differs between two resolved configs, as part of a sentence;
    None if all agree. An entry that the older config lacks does not count, nor do those named in
    `apart_from`.
    """
    for name, value in now.items():
        if name in MAY_CHANGE_ON_RESUME or name in apart_from or name not in then:
            continue
        if then[name] != value:
            return f"--{name} {then[name]}, and now it is {value}"
    return None


# -----------------------------------------------------------------------------
# may this run write here?

def refuse_to_overwrite(config, section):
    """
    Raises UsageError where the stage's folder holds a finished model, unless a flag says what is to
    become of that. Needs no process group, because run_all.sh asks before the first stage.

    section  the stage's name in summary.json: "sft", "reward", "dpo" or "ppo"
    """
    if config.resume or config.overwrite_output_dir or config.dry_run:
        return
    folder = Path(config.output_dir) / STAGES[section]
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    has_model = has_weights and (folder / "config.json").exists()
    if has_model or (folder / "run_config.json").exists():
        raise UsageError(
            f"{folder} holds the finished model of an earlier run: --resume keeps it if it was "
            "made with the same flags, --overwrite_output_dir replaces it, and another "
            "--output_dir leaves it alone.")


# {lock file: open file} of the folders that this process has locked. A lock is given up when its
# stage is finished, and by the system when its process ends, however it ends.
held_locks = {}


def lock_folder(folder):
    """
    Rank 0. Keeps other processes out of a stage's folder until the stage is finished. The lock
    file lies beside the folder, because an empty folder would look like a model to the next stage.

    raises  UsageError where another process has the lock
    """
    path = lock_path(folder)
    if path in held_locks:
        return
    try:
        file = open(path, "a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except BlockingIOError as error:
        file.seek(0)
        raise UsageError(
            f"{folder} is in use: another run trains there ({file.read() or 'a process'}). Wait "
            "until it ends, stop it, or give this run another --output_dir.") from error
    except OSError as error:
        print0(f"warning: {path} cannot be locked ({first_line(error)}), so a second run in the "
               "same folder would not be noticed")
        return
    held_locks[path] = file


def unlock_folder(folder):
    file = held_locks.pop(lock_path(folder), None)
    if file is not None:
        file.close()


def lock_path(folder):
    return folder.with_name(f".{folder.name}.lock").resolve()


def what_a_model_lacks(folder):
    """
    A model's folder -> None where the model is whole, else what is wrong, as part of a sentence.
    Only the weights' headers and lengths are read.
    """
    if not (folder / "config.json").exists():
        return "config.json is missing"
    # transformers makes an empty tokenizer of a folder without such a file.
    if not any(folder.glob("tokenizer.*")) and not any(folder.glob("vocab.*")):
        return "tokenizer.json is missing"
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError):
            return f"{index.name} cannot be read"
    for name in names:
        if not (folder / name).exists():
            return f"{name} is missing"
        try:
            # Opening compares the file's length with what its header promises.
            with safe_open(folder / name, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{name} is not whole, {first_line(error)}"
    return None


# -----------------------------------------------------------------------------
# was this run told to stop?

STOPPED = 128 + signal.SIGTERM  # the exit code of a run that was told to


class StopSignal:
    """
    Whether this run was told to stop: by a SIGTERM or a first Ctrl-C to any rank, or by the end of
    the `deepspeed` launcher.

    before `defer`  there is nothing to save, so the signal ends the process
    from there on   the signal is noted, for whoever asks `on_any_rank`. A second Ctrl-C ends the
                    process at once
    """

    # The handlers that `unwatch` puts back.
    before = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}

    def __init__(self):
        self.received = False
        self.deferred = False
        self.launcher_parent = None

    def watch(self):
        if threading.current_thread() is not threading.main_thread():
            return  # because Python refuses handlers in all others
        for number in self.before:
            handler = signal.signal(number, self._told)
            # An earlier run of this process that ended in an exception has left its own there.
            if not isinstance(getattr(handler, "__self__", None), StopSignal):
                self.before[number] = handler
        # `deepspeed` starts a child, and the child starts the ranks. When `deepspeed` dies of a
        # SIGTERM it hands nothing on, but then the child has a new parent.
        child = psutil.Process().parent()
        if child and "deepspeed.launcher.launch" in child.cmdline():
            self.launcher_parent = child.ppid()

    def defer(self):
        self.deferred = True

    def _told(self, number, _):
        is_first = not self.received
        self.received = True
        sentence = ("told to stop before a step was done: the same command with --resume goes on "
                    "from the newest checkpoint, or starts from the beginning")
        if self.deferred:
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            sentence = ("told to stop: the step or evaluation in hand is finished first, and its "
                        "result saved (a second Ctrl-C ends the run at once)")
        if is_first:
            # The signal may have come in the middle of a print, and Python allows none inside it.
            with suppress(RuntimeError):
                print0(f"\n{sentence}")
        if self.deferred:
            return
        if not is_first:
            # While the first exit is on its way, another exception would be a traceback.
            os._exit(STOPPED)
        sys.exit(STOPPED)

    def on_any_rank(self):
        """Collective, because all ranks must stop after the same step."""
        launcher_died = False
        if self.launcher_parent is not None:
            launcher_died = psutil.Process(os.getppid()).ppid() != self.launcher_parent
        told, = all_sum(self.received or launcher_died)
        return told > 0

    def unwatch(self):
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.before.items():
                signal.signal(number, handler)


# -----------------------------------------------------------------------------
# the checkpoints of a stage

class Checkpoints:
    """
    A stage's checkpoints, `folder`/checkpoint-<step>; the top of this file shows what is in them.
    All ranks must see the same --output_dir.

    finished   --resume, and the stage was already run to its end with these flags
    done       steps of the run that this one goes on from, and
    seconds    what they took; 0 without a checkpoint
    """

    def __init__(self, config, section):
        """
        Looks for what --resume goes on from.

        section  the stage's name in summary.json: "sft", "reward", "dpo" or "ppo"
        raises   UsageError where other flags made the checkpoint, where nothing can or may be
                 written, and where another run writes
        """
        self.config = config
        self.section = section
        self.folder = Path(config.output_dir) / STAGES[section]
        self.began = time.time()
        self.stop_signal = StopSignal()
        self.stop_signal.watch()
        on_rank0(self._open_folder)
        # The files are read for their checksums now and once, because a file that changes while the
        # run goes on is not what the run has read.
        self.resolved = on_rank0(lambda: resolved_config(config, section))

        # Rank 0 looks, and tells the others.
        self.manifest = None
        self.finished = on_rank0(self._is_finished)
        if not self.finished:
            self.manifest = on_rank0(self._find)
        self.done = 0
        self.seconds = 0.0
        if self.manifest:
            self.done = self.manifest["step"]
            self.seconds = self.manifest["seconds"]
        if self.finished:
            self.stop_signal.unwatch()

    def _open_folder(self):
        """Rank 0, before anything slow."""
        make_output_dir(self.config.output_dir)
        lock_folder(self.folder)
        refuse_to_overwrite(self.config, self.section)

    # -------------------------------------------------------------------------
    # how a checkpoint is found

    def _is_finished(self):
        """Whether --resume finds this stage run to its end, with the same flags."""
        record = self.folder / "run_config.json"
        summary = self.folder.parent / "summary.json"
        if not self.config.resume or not record.exists() or not summary.exists():
            return False
        if self.section not in json.loads(summary.read_text()):
            return False
        changed = changed_flag(json.loads(record.read_text()), self.resolved)
        if changed:
            print0(f"{self.folder}: done with {changed}")
            return False
        lack = what_a_model_lacks(self.folder)
        if lack:
            print0(f"warning: {self.folder} was run to its end, but its model is not whole "
                   f"({lack}), so --resume makes it again")
            return False
        print0(f"{self.folder}: done already, --resume leaves it")
        return True

    def _find(self):
        """The manifest of the newest complete checkpoint, or None: start from the beginning."""
        paths = list(self._all().values())
        if not self.config.resume:
            if paths:
                print0(f"{paths[0]} is an earlier run's: --resume would go on from it, this run's "
                       "first replaces it")
            return None
        for path in paths:
            manifest, lack = self._read(path)
            if lack:
                print0(f"warning: {path} is skipped, it is not complete: {lack}")
                continue
            changed = changed_flag(manifest["config"], self.resolved, apart_from=LENGTH_FLAGS)
            if not changed:
                if self.config.max_steps > 0:
                    refuse_fewer_steps(path, manifest["step"], self.config.max_steps)
                return manifest
            if not self.config.overwrite_output_dir:
                raise UsageError(f"{path} was made with {changed}: go on with the old value, or "
                                 "add --overwrite_output_dir to start from the beginning.")
            print0(f"{path} was made with {changed}: --overwrite_output_dir starts from the "
                   "beginning")
            return None
        print0(f"--resume: no complete checkpoint in {self.folder}, so the run starts from the "
               "beginning")
        return None

    def _all(self):
        """{step: folder} of everything that is named as a checkpoint, the newest first."""
        names = [path.name for path in self.folder.glob("checkpoint-*")]
        numbers = [name.removeprefix("checkpoint-") for name in names]
        steps = [int(number) for number in numbers if number.isdigit()]  # a .tmp has no such name
        return {step: self.folder / f"checkpoint-{step}" for step in sorted(steps, reverse=True)}

    def _read(self, path):
        """A checkpoint's folder -> (manifest, None), or (None, what it lacks)."""
        try:
            manifest = json.loads((path / "manifest.json").read_text())
        except (OSError, ValueError):
            return None, "no manifest.json"
        for name, size in manifest["files"].items():
            file = path / name
            found = file.stat().st_size if file.exists() else 0
            if found != size:
                return None, f"{name} has {found} of {size} bytes"
        return manifest, None

    # -------------------------------------------------------------------------
    # how a run goes on from it

    def load(self, engines, total_steps, trainer=None):
        """
        Puts what --resume found into the engines, the trainer and the random number generators.
        From here on SIGTERM or Ctrl-C ends the run with exit code 143: after the step in hand and
        its checkpoint, or, when the last step is done, after the model is saved.

        engines  name -> DeepSpeed engine, or None
        trainer  has state_dict and load_state_dict, or is None
        raises   UsageError where the checkpoint has more steps than the run
        """
        if self.manifest:
            path = self.folder / f"checkpoint-{self.done}"
            refuse_fewer_steps(path, self.done, total_steps)
        self.stop_signal.defer()
        self.engines = {name: engine for name, engine in engines.items() if engine}
        self.total_steps = total_steps
        self.trainer = trainer
        if dist.get_rank() == 0:
            for left in self.folder.glob("checkpoint-*.tmp"):
                shutil.rmtree(left)
            shutil.rmtree(self.folder / ".saving", ignore_errors=True)
            # Without this file the stage is not finished.
            (self.folder / "run_config.json").unlink(missing_ok=True)
        dist.barrier()
        if self.manifest:
            self._restore(path)

    def _restore(self, path):
        rank = dist.get_rank()
        world = dist.get_world_size()
        world_before = self.manifest["processes"]

        # 1. The engines: weights, optimizer states, schedules.
        has_shards = any("optim_states" in name for name in self.manifest["files"])
        if has_shards and world != world_before:
            self._load_resharded(path)
        else:
            for name, engine in self.engines.items():
                load_engine(engine, path, name)

        # 2. The trainer.
        if self.trainer:
            with raise_on_all_ranks():
                state = load_plain(path / "trainer.pt")
            self.trainer.load_state_dict(state)

        # 3. The random number generators, which belong to a rank of so many.
        if world == world_before:
            with raise_on_all_ranks():
                states = load_plain(path / f"random-{rank}.pt")
            for (_, set_state), state in zip(random_generators(), states):
                set_state(state)
        else:
            seed_everything(self.config.seed + self.done)
            print0(f"{path} is of {world_before} processes, now {world}: random numbers start anew "
                   "from --seed and the step")

        # 4. The log, without the steps after the checkpoint.
        dist.barrier()
        if rank == 0:
            shutil.copy(path / "metrics.jsonl", self.folder)
        print0(f"resumed from {path}: {self.done} of {self.total_steps} steps are done")
        total_before = self.manifest.get("total_steps", self.total_steps)
        if self.total_steps != total_before:
            print0(f"{path} is of a run of {total_before} steps, now {self.total_steps}: from here "
                   "on the learning rate follows the schedule of the new length")

    def _load_resharded(self, path):
        """
        Into another number of ranks than wrote it, by way of DeepSpeed's universal checkpoint, a
        temporary folder.
        """
        universal = path.with_suffix(".tmp")
        on_rank0(lambda: to_universal(path, universal, self.engines))
        for name, engine in self.engines.items():
            groups = engine.optimizer.param_groups
            decays = [group["weight_decay"] for group in groups]
            engine._config.load_universal_checkpoint = True
            load_engine(engine, universal, name)
            engine._config.load_universal_checkpoint = False
            # DeepSpeed's loader for ZeRO 3 gives all groups one weight decay and one counter of
            # steps, which are parted again.
            for group, decay in zip(engine.optimizer.param_groups, decays):
                group["weight_decay"] = decay
            for state in engine.optimizer.optimizer.state.values():
                state["step"] = copy.deepcopy(state["step"])
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(universal)

    # -------------------------------------------------------------------------
    # how a checkpoint is written

    def step_done(self, step):
        """Called after each step. Saves if a checkpoint is due; told to stop, saves and ends."""
        told_to_stop = self.stop_signal.on_any_rank()
        is_due = self.config.save_steps and step % self.config.save_steps == 0
        if is_due or told_to_stop:
            self._write(step)
        if told_to_stop:
            self.stop_signal.unwatch()
            print0(f"told to stop: {self.folder}/checkpoint-{step} is saved, --resume goes on from "
                   "it")
            sys.exit(STOPPED)

    def finish(self, values, model, **others):
        """
        The stage is done and its model saved: marks it as finished (see write_summary). Told to
        stop since the last step, ends.
        """
        if dist.get_rank() == 0:
            write_summary(self.config, self.section, values, model, **others)
            write_model_cards(self.config, self.section, values, model)
            # The model is on the disk before the file by which --resume knows that it is done.
            os.sync()
            write_json(self.folder / "run_config.json", self.resolved)
            unlock_folder(self.folder)
        self.stop_signal.unwatch()
        if self.stop_signal.on_any_rank():
            print0(f"told to stop: {self.folder} is done and its model saved, --resume leaves it "
                   "as it is")
            sys.exit(STOPPED)

    def _write(self, step):
        rank = dist.get_rank()
        temporary = self.folder / f"checkpoint-{step}.tmp"
        on_rank0(lambda: self._begin(step, temporary))

        # 1. Every rank writes its part of the engines, and its random number generators.
        writer = DurableWriter(temporary)
        for name, engine in self.engines.items():
            engine.checkpoint_engine = writer
            # What is frozen is loaded from the model's folder again, whose checksum is compared.
            engine.save_checkpoint(str(temporary), tag=name, save_latest=False,
                                   exclude_frozen_parameters=True)
        states = [get_state() for get_state, _ in random_generators()]
        writer.save(states, temporary / f"random-{rank}.pt")

        # 2. Rank 0 writes the trainer.
        if self.trainer:
            state = self.trainer.state_dict()
            if rank == 0:
                writer.save(state, temporary / "trainer.pt")

        # 3. When all have written, rank 0 completes the checkpoint, and older ones go.
        files = {}
        errors = []
        written = [None] * dist.get_world_size()
        dist.all_gather_object(written, (writer.files, writer.error))
        for files_of_rank, error in written:
            files.update(files_of_rank)
            if error:
                errors.append(error)
        on_rank0(lambda: self._complete(step, temporary, files, errors))

    def _begin(self, step, temporary):
        """Rank 0. Raises UsageError where the disk is full, or the stage's folder was deleted."""
        try:
            temporary.mkdir()
        except OSError as error:
            raise self._not_written(step, error) from error

    def _complete(self, step, temporary, files, errors):
        """
        Rank 0: log, manifest and name of the new checkpoint.

        files   {name: bytes} of what the ranks have written
        errors  what kept them from it
        raises  UsageError where the checkpoint is not whole on the disk; the folder is then removed
        """
        final = self.folder / f"checkpoint-{step}"
        try:
            if errors:
                raise OSError(errors[0])
            shutil.copy(self.folder / "metrics.jsonl", temporary)
            files["metrics.jsonl"] = (temporary / "metrics.jsonl").stat().st_size
            write_json(temporary / "manifest.json", {
                "step": step,
                "total_steps": self.total_steps,
                "processes": dist.get_world_size(),
                "seconds": self.seconds + time.time() - self.began,
                "files": files,
                "config": self.resolved,
            })
            # Fails for a file that another host wrote to a folder of its own.
            for name in [*files, "manifest.json", ""]:
                fsync_path(temporary / name)
            # A folder of that name is incomplete or an earlier run's.
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            fsync_path(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._not_written(step, error) from error
        self._remove_others(step)

    def _not_written(self, step, error):
        """-> UsageError, which says what --resume can still go on from."""
        left = "There is no older one."
        for path in self._all().values():
            _, lack = self._read(path)
            if not lack:
                left = f"{path} is as it was, and --resume goes on from it."
                break
        return UsageError(f"{self.folder}/checkpoint-{step} could not be written: "
                          f"{first_line(error)}. It needs room, and all hosts must see it. {left}")

    def _remove_others(self, step):
        """Keeps --save_total_limit checkpoints: this step's and those before it."""
        kept = 0
        for other, path in self._all().items():
            from_an_earlier_run = other > step
            if kept < self.config.save_total_limit and not from_an_earlier_run:
                kept += 1
                continue
            # Renamed first, because half of a checkpoint must never have its name.
            shutil.rmtree(path.rename(path.with_suffix(".tmp")))


def refuse_fewer_steps(path, done, total_steps):
    """Raises UsageError where a run of total_steps steps would go on from more than that."""
    if done > total_steps:
        raise UsageError(
            f"{path} has {done} steps behind it, and this run is to have {total_steps}: give "
            "--max_steps a larger number, or another --output_dir.")


# -----------------------------------------------------------------------------
# files

def make_output_dir(path):
    """Rank 0, before anything slow. Raises UsageError where nothing can be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {path} cannot be made: {first_line(error)}.") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"--output_dir {path}: nothing may be written there; name another folder.")


class DurableWriter(TorchCheckpointEngine):
    """
    Writes DeepSpeed's files so that they are on the disk when `save` returns.

    files  {name below the folder: bytes} of what was written
    error  the first error, or None. It is kept and not raised, because the other ranks are waiting
           in a collective
    """

    def __init__(self, folder):
        self.folder = folder
        self.files = {}
        self.error = None

    def save(self, state_dict, path):
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
            fsync_path(path)
            self.files[str(Path(path).relative_to(self.folder))] = os.path.getsize(path)
        except (OSError, RuntimeError) as error:
            # torch hides a full disk's OSError behind one or two errors of its own.
            while error.__context__ and not isinstance(error, OSError):
                error = error.__context__
            if self.error is None:
                self.error = first_line(error)
            # Makes room for DeepSpeed's small files, which nothing guards.
            Path(path).unlink(missing_ok=True)


def load_engine(engine, folder, name):
    """DeepSpeed's files in folder/name -> the engine. They lack what is frozen."""
    loaded_path, _ = engine.load_checkpoint(str(folder), tag=name, load_module_strict=False)
    assert loaded_path, f"{folder / name} was not loaded"


def to_universal(folder, target, names):
    """
    DeepSpeed's files of some number of ranks, in folder/name -> its universal checkpoints, which
    any number of ranks can load, in target/name.
    """
    # Each engine is converted by a process of its own, which starts more. This one could not, as
    # it has threads and a device.
    workers = str(min(8, os.cpu_count()))
    running = []
    for name in names:
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal",
                   "--input_folder", str(folder / name), "--output_folder", str(target / name),
                   "--num_extract_workers", workers, "--num_merge_workers", workers,
                   "--inject_missing_state"]
        running.append(subprocess.Popen(command, text=True, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE))
    for process in running:
        _, errors = process.communicate()
        if process.returncode:
            reason = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
            raise UsageError(f"{folder}: DeepSpeed cannot bring it to another number of processes "
                             f"({reason[0]}); go on with as many as before.")


def load_plain(path):
    """
    torch.load of numbers and tensors, which runs no pickled code. The tensors stay in the file
    until they are read, so that the ranks of a host have one copy. Raises UsageError for a file
    that holds anything else.
    """
    # Older checkpoints hold numpy's random state as an array, whose parts pickle names so.
    reconstruct = np.zeros(1).__reduce__()[0]
    parts_of_an_array = [reconstruct, np.ndarray, np.dtype, type(np.dtype("uint32"))]
    try:
        with torch.serialization.safe_globals(parts_of_an_array):
            return torch.load(path, weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} holds pickled objects beside numbers and tensors, and loading them could run "
            "any code. Go on from a checkpoint that this project wrote.") from error


def numpy_state():
    """numpy's random state in plain numbers, as np.random.set_state takes it."""
    name, keys, *rest = np.random.get_state()
    return name, keys.tolist(), *rest


def random_generators():
    """(function that returns the state, function that sets it) of each generator of this rank."""
    accelerator = get_accelerator()
    return [(random.getstate, random.setstate),
            (numpy_state, np.random.set_state),
            (torch.get_rng_state, torch.set_rng_state),
            (accelerator.get_rng_state, accelerator.set_rng_state)]


def fsync_path(path):
    """A file's bytes, or a folder's entries, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
