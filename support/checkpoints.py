"""
Checkpoints: --save_steps, --save_total_limit and --resume.
"""

import argparse
import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from support.flags import UsageError, first_line
from support.metrics import STAGES, write_json, write_summary
from support.processes import all_sum, compute_dtype, deepspeed_settings, on_rank0, print0, seed_everything


MAY_CHANGE_ON_RESUME = {  # flags that may change when a run is resumed, or that count through what resolved_config derives
    "output_dir", "deepspeed_config", "zero_stage", "per_device_train_batch_size", "gradient_accumulation_steps",
    "per_device_generation_batch_size", "inference_tp_size", "logging_steps", "save_steps", "save_total_limit",
    "gradient_checkpointing", "resume", "skip_preflight", "device_tflops", "device_price"}


def resolved_config(config, section):
    """The flags, and what beside them decides the outcome: ZeRO stage, dtype, rows a step, the files that are read."""
    flags, settings, world = dataclasses.asdict(config), deepspeed_settings(config), dist.get_world_size()
    for name in sorted(flags.keys() - MAY_CHANGE_ON_RESUME):
        values = flags[name] if isinstance(flags[name], list) else [flags[name]]
        for path in [value.split(":")[0] for value in values if isinstance(value, str)]:  # --reward_fn file.py:function
            if os.path.exists(path):
                shown = path
                if name.endswith("model_name_or_path") and Path(config.output_dir) in Path(path).parents:
                    # an earlier stage's: a run may be moved as a whole
                    shown = flags[name] = f"OUTPUT_DIR/{Path(path).relative_to(config.output_dir)}"
                flags[f"{name} {shown}, checksum"] = checksum(path)
    flags["stage"] = section
    flags["zero_stage (or the JSON's)"] = settings["zero_optimization"]["stage"]
    flags["deepspeed_config's dtype"] = str(compute_dtype(settings))
    flags["deepspeed_config's gradient_clipping"] = settings.get("gradient_clipping")
    flags["per_device_train_batch_size x gradient_accumulation_steps x processes"] = (
        config.per_device_train_batch_size * config.gradient_accumulation_steps * world)
    flags["per_device_generation_batch_size x processes"] = flags.get("per_device_generation_batch_size", 0) * world
    return flags


def checksum(path):
    """Of a data file or the files in a folder: names, sizes, first and last megabyte."""
    crc = 0
    for file in sorted(Path(path).iterdir()) if os.path.isdir(path) else [Path(path)]:
        if file.is_file() and file.name not in ("metrics.jsonl", "run_config.json"):
            with open(file, "rb") as opened:
                crc = zlib.crc32(f"{file.name} {file.stat().st_size} ".encode() + opened.read(2**20), crc)
                opened.seek(max(file.stat().st_size - 2**20, 0))
                crc = zlib.crc32(opened.read(), crc)
    return crc


def changed_flag(then, now):
    """The first flag that counts and differs between two resolved configs, as part of a sentence; None: all agree."""
    return next((f"--{name} {then[name]}, and now it is {now[name]}" for name in now
                 if name not in MAY_CHANGE_ON_RESUME and then.get(name, now[name]) != now[name]), None)


class DurableWriter(TorchCheckpointEngine):
    """
    Writes DeepSpeed's files so that they are on the disk when `save` returns; `files` has their sizes. An error is kept
    and not raised: the other ranks are waiting in a collective.
    """

    def __init__(self, folder):
        self.folder, self.files, self.error = folder, {}, None

    def save(self, state_dict, path):
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
            fsync_path(path)
            self.files[str(Path(path).relative_to(self.folder))] = os.path.getsize(path)
        except (OSError, RuntimeError) as error:  # torch hides a full disk's OSError behind a RuntimeError of its own
            self.error = self.error or first_line(error.__context__ or error)
            Path(path).unlink(missing_ok=True)  # room for DeepSpeed's small files, which nothing guards


def make_output_dir(path):
    """Rank 0, before anything slow. Raises UsageError for a folder that cannot be, or cannot be written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {path} cannot be made: {first_line(error)}.") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"--output_dir {path}: nothing may be written there; name another folder.")


class Checkpoints:
    """
    A stage's checkpoints, `folder`/checkpoint-<step>: DeepSpeed's files of each engine, the trainer's state, every
    rank's random numbers, metrics.jsonl so far, and manifest.json, written last, with the size of every file. A folder
    gets its name when all of it is on the disk. All ranks must see the same --output_dir.

    finished   --resume, and the stage was already run to its end with these flags
    done       steps of the run that this one goes on from, and
    seconds    what they took; 0 without a checkpoint
    """

    def __init__(self, config, section):
        """
        Looks for what --resume goes on from; raises UsageError where other flags made it, or nothing can be written.
        """
        self.config, self.section, self.folder = config, section, Path(config.output_dir) / STAGES[section]
        self.began, self.terminated, self.launcher_parent = time.time(), False, None
        on_rank0(lambda: make_output_dir(config.output_dir))
        # now, and once: files that change while it runs are not what it read
        self.resolved = on_rank0(lambda: resolved_config(config, section))
        self.finished, self.manifest = on_rank0(self._find)
        self.done, self.seconds = (self.manifest["step"], self.manifest["seconds"]) if self.manifest else (0, 0.0)

    def _find(self):
        """Rank 0 -> (finished, manifest of the newest complete checkpoint or None)."""
        now, resume = self.resolved, self.config.resume
        record, summary = self.folder / "run_config.json", self.folder.parent / "summary.json"
        if resume and record.exists() and summary.exists() and self.section in json.loads(summary.read_text()):
            changed = changed_flag(json.loads(record.read_text()), now)
            print0(f"{self.folder}: done " + (f"with {changed}" if changed else "already, --resume leaves it"))
            if not changed:
                return True, None
        for path in self._all().values():
            manifest, lack = self._read(path)
            if not resume:
                print0(f"{path} is an earlier run's: --resume would go on from it, this run's first replaces it")
                return False, None
            elif lack:
                print0(f"warning: {path} is skipped, it is not complete: {lack}")
            elif changed := changed_flag(manifest["config"], now):
                raise UsageError(f"{path} was made with {changed}: go on with the old value, or remove {self.folder}/"
                                 "checkpoint-* to start from the beginning.")
            else:
                return False, manifest
        if resume:
            print0(f"--resume: no complete checkpoint in {self.folder}, so the run starts from the beginning")
        return False, None

    def _all(self):
        """step -> folder of all that is named as a checkpoint, newest first."""
        steps = [path.name.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*")]
        steps = sorted((int(step) for step in steps if step.isdigit()), reverse=True)
        return {step: self.folder / f"checkpoint-{step}" for step in steps}

    def _read(self, path):
        """A checkpoint's folder -> (manifest, None) or (None, what it lacks)."""
        try:
            manifest = json.loads((path / "manifest.json").read_text())
        except (OSError, ValueError):
            return None, "no manifest.json"
        found = {name: (path / name).stat().st_size if (path / name).exists() else 0 for name in manifest["files"]}
        lacks = [f"{name} has {found[name]} of {size} bytes" for name, size in manifest["files"].items()
                 if found[name] != size]
        return (None, lacks[0]) if lacks else (manifest, None)

    def load(self, engines, total_steps, trainer=None):
        """
        Puts what --resume found into the engines (name -> DeepSpeed's, or None), the trainer (load_state_dict) and the
        random number generators. From here to the last step, with --save_steps, SIGTERM or Ctrl-C ends the run with
        exit code 143, after the step in hand and its checkpoint.
        """
        self.engines = {name: engine for name, engine in engines.items() if engine}
        self.total_steps, self.trainer = total_steps, trainer
        if dist.get_rank() == 0:
            for left in self.folder.glob("checkpoint-*.tmp"):
                shutil.rmtree(left)
            (self.folder / "run_config.json").unlink(missing_ok=True)  # the stage is not finished
        if self.config.save_steps and self.done < total_steps:
            def stop(*_):
                self.terminated = True
                signal.signal(signal.SIGINT, self.defaults[signal.SIGINT])  # a second Ctrl-C ends it at once

            self.defaults = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
            launcher = psutil.Process().parent()
            if launcher and "deepspeed.launcher.launch" in launcher.cmdline():
                self.launcher_parent = launcher.ppid()
        dist.barrier()
        if self.manifest:
            self._restore(self.folder / f"checkpoint-{self.done}")

    def _restore(self, path):
        ranks, world = self.manifest["processes"], dist.get_world_size()
        resharded = ranks != world and any("optim_states" in name for name in self.manifest["files"])
        source = path.with_suffix(".tmp") if resharded else path
        for name, engine in self.engines.items():
            decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
            if resharded:
                on_rank0(lambda: to_universal(path / name, source / name))
                engine._config.load_universal_checkpoint = True
            assert engine.load_checkpoint(str(source), tag=name)[0], f"{path / name} was not loaded"
            engine._config.load_universal_checkpoint = False
            if resharded:  # DeepSpeed's loader for ZeRO 3 gives all groups one weight decay and one counter of steps
                for group, decay in zip(engine.optimizer.param_groups, decays):
                    group["weight_decay"] = decay
                for state in engine.optimizer.optimizer.state.values():
                    state["step"] = copy.deepcopy(state["step"])
        if self.trainer:
            self.trainer.load_state_dict(torch.load(path / "trainer.pt", weights_only=False))
        if ranks == world:
            states = torch.load(path / f"random-{dist.get_rank()}.pt", weights_only=False)
            for (_, restore), state in zip(random_generators(), states):
                restore(state)
        else:
            seed_everything(self.config.seed + self.done)
            print0(f"{path} is of {ranks} processes, now {world}: random numbers start anew from --seed and the step")
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.copy(path / "metrics.jsonl", self.folder)
            shutil.rmtree(path.with_suffix(".tmp"), ignore_errors=True)
        print0(f"resumed from {path}: {self.done} of {self.total_steps} steps are done")

    def step_done(self, step):
        """After each step: a checkpoint if one is due, or if any rank was told to stop."""
        if not self.config.save_steps:
            return
        # `deepspeed` dies of a SIGTERM and hands nothing on; then its child, the parent of the ranks, has a new parent
        orphaned = self.launcher_parent is not None and psutil.Process(os.getppid()).ppid() != self.launcher_parent
        stop, = all_sum(self.terminated or orphaned)
        if step % self.config.save_steps == 0 or stop:
            self._write(step)
        if stop:
            print0(f"told to stop: {self.folder}/checkpoint-{step} is saved, --resume goes on from it")
            sys.exit(128 + signal.SIGTERM)
        if step == self.total_steps:
            for number, default in self.defaults.items():
                signal.signal(number, default)

    def finish(self, values, model, **others):
        """The stage is done, its model saved: its headline numbers go into summary.json (see write_summary)."""
        if dist.get_rank() == 0:
            write_summary(self.config, self.section, values, model, **others)
            os.sync()  # the model is on the disk before the file by which --resume knows that it is done
            write_json(self.folder / "run_config.json", self.resolved)

    def _write(self, step):
        temporary, rank = self.folder / f"checkpoint-{step}.tmp", dist.get_rank()
        writer, written = DurableWriter(temporary), [None] * dist.get_world_size()
        if rank == 0:
            temporary.mkdir()
        dist.barrier()
        for name, engine in self.engines.items():
            engine.checkpoint_engine = writer
            engine.save_checkpoint(str(temporary), tag=name, save_latest=False)
        writer.save([state() for state, _ in random_generators()], temporary / f"random-{rank}.pt")
        if self.trainer and rank == 0:
            writer.save(self.trainer.state_dict(), temporary / "trainer.pt")
        dist.all_gather_object(written, (writer.error, writer.files))
        on_rank0(lambda: self._complete(step, temporary, written))

    def _complete(self, step, temporary, written):
        """Rank 0, when all ranks have written: manifest and name of the new checkpoint; then older ones go."""
        final, errors = self.folder / f"checkpoint-{step}", [error for error, _ in written if error]
        files = {name: size for _, part in written for name, size in part.items()}
        try:
            if errors:
                raise OSError(errors[0])
            shutil.copy(self.folder / "metrics.jsonl", temporary)
            files["metrics.jsonl"] = (temporary / "metrics.jsonl").stat().st_size
            write_json(temporary / "manifest.json", {
                "step": step, "processes": dist.get_world_size(), "seconds": self.seconds + time.time() - self.began,
                "files": files, "config": self.resolved})
            for name in [*files, "manifest.json", ""]:
                fsync_path(temporary / name)  # fails for a file that another host wrote to a folder of its own
            shutil.rmtree(final, ignore_errors=True)  # an incomplete or an earlier run's
            temporary.rename(final)
            fsync_path(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            older = next((path for path in self._all().values() if not self._read(path)[1]), None)
            raise UsageError(f"{final} could not be written: {first_line(error)}. It needs room, and all hosts must "
                             "see it. " + (f"{older} is as it was, and --resume goes on from it." if older else
                                           "There is no older one.")) from error
        newer = [path for other, path in self._all().items() if other > step]  # of a run before this one
        kept = [path for path in self._all().values() if path not in newer][:self.config.save_total_limit]
        for path in set(self._all().values()) - set(kept):
            shutil.rmtree(path.rename(path.with_suffix(".tmp")))  # never half of one under its name


def to_universal(folder, target):
    """DeepSpeed's files of some number of ranks -> its universal checkpoint, which any number of ranks can load."""
    arguments = argparse.Namespace(input_folder=str(folder), output_folder=str(target), num_extract_workers=1,
                                   num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True)
    try:
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
            ds_to_universal.main(arguments)
    except (AssertionError, KeyError, RuntimeError, OSError) as error:
        raise UsageError(f"{folder}: DeepSpeed cannot bring it to another number of processes ({first_line(error)}); "
                         "go on with as many as before.") from error


def random_generators():
    """(function that returns the state, function that sets it) of each random number generator of this rank."""
    accelerator = get_accelerator()
    return ((random.getstate, random.setstate), (np.random.get_state, np.random.set_state),
            (torch.get_rng_state, torch.set_rng_state), (accelerator.get_rng_state, accelerator.set_rng_state))


def fsync_path(path):
    """A file's bytes, or a folder's entries, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
