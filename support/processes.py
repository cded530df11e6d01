"""
Processes: how a run starts and ends on one or many of them, what DeepSpeed is told, and the few
collectives that the stages need.
"""

import atexit
import copy
import difflib
import errno
import importlib.util
import itertools
import json
import math
import os
import random
import socket
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import deepspeed
import numpy as np
import psutil
import torch
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import set_log_level_from_string
from torch.utils import cpp_extension

from support.flags import (UsageError, default_model_paths, exit_on_usage_error, first_line,
                           parse_config)
from support.terminal import clear_live

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


# -----------------------------------------------------------------------------
# start and end of a stage

def run_stage(main, config_class, doc):
    """`main(config)` for the command line. What the user can mend ends in one sentence, code 2."""
    with exit_on_usage_error(), exit_on_outside_fault():
        config = parse_config(config_class, doc)
        default_model_paths(config)
        main(config)
        if dist.is_initialized():
            # All ranks end together, because one that exits early looks dead to `watch_hosts` of
            # the others.
            dist.barrier()
            # After an error the group is left as it is, because NCCL would wait in here for ranks
            # that are themselves waiting for this one.
            dist.destroy_process_group()


@contextmanager
def exit_on_outside_fault():
    """
    A fault outside of this process ends it in one sentence. A full disk, which the log or one of
    DeepSpeed's small files may notice first: code 2. Another rank that is gone, killed because
    memory ran out, say, which gloo tells the ranks that wait for it: code 1.
    """
    try:
        yield
        return
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        code = 2
        sentence = f"{first_line(error)}. Make room."
    except RuntimeError as error:
        if " by peer" not in str(error):
            raise
        code = 1
        sentence = ("another rank of this run is gone. Its last lines say why; where it has none, "
                    "it was killed, often because memory ran out.")
    # Every rank says its own, because only one of them may have a fault.
    print(f"\n{Path(sys.argv[0]).name}: error: rank {os.environ.get('RANK', 0)}: {sentence} The "
          "same command with --resume goes on from the newest checkpoint, or starts from the "
          "beginning.", file=sys.stderr, flush=True)
    sys.exit(code)


def setup(config):
    """
    Starts the process group (without a launcher: one process, world size 1), seeds, and prints
    device, dtype and batch arithmetic. Returns the DeepSpeed settings (a dict, `ds_config`) with
    which every model of the stage is initialised. A second call in one process only returns them.
    """
    ds_config = deepspeed_settings(config)
    first_call = not dist.is_initialized()
    if first_call:
        start_processes(config.verbose)
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    world = dist.get_world_size()
    rows = config.per_device_train_batch_size
    parts = config.gradient_accumulation_steps
    ds_config["train_batch_size"] = rows * parts * world
    # support.log.monitors writes to them, once for all engines and under the project's own names.
    for name in MONITORS:
        ds_config.pop(name, None)
    if first_call:
        seed_everything(config.seed)
        dtype = str(compute_dtype(ds_config)).removeprefix("torch.")
        stage = ds_config["zero_optimization"]["stage"]
        source = config.deepspeed_config or "the default for this hardware"
        print0(f"device {device()} x {world}, {dtype} and ZeRO stage {stage} ({source}); "
               f"batch {rows} a process x {parts} accumulated x {world} processes = "
               f"{rows * parts * world} rows a step")
    return ds_config


def start_processes(verbose=False):
    """
    Joins the launcher's process group, or makes one of a single process.

    verbose  libraries say what they like, and else errors alone
    """
    set_log_level_from_string("info" if verbose else "error")
    if not verbose:
        warnings.filterwarnings("ignore")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

    # Without a launcher this process is rank 0 of 1.
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))

    check_launcher()

    # DeepSpeed's own all-reduce for CPUs is switched off, because it would be compiled at the first
    # start, for most of a minute, and gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    # DeepSpeed compiles its offload optimizer with ninja, which lies beside this Python. Started
    # over ssh, PATH does not name that folder.
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]

    # gloo is told which network leads to rank 0, because by itself it listens where the host's name
    # leads, and many an /etc/hosts says that this is 127.0.0.1.
    try:
        address = host_address()
    except OSError as error:
        raise UsageError(f"MASTER_ADDR {os.environ['MASTER_ADDR']}: no host of that name is known "
                         f"({first_line(error)}).") from error
    interfaces = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            interfaces[entry.address] = name
    if address in interfaces:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interfaces[address])

    # An hour, because a large save takes longer than the default of ten minutes.
    try:
        deepspeed.init_distributed(verbose=False, timeout=timedelta(hours=1))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = int(os.environ["MASTER_PORT"])
        raise UsageError(f"port {port} of this host is in use, most likely by another run: "
                         f"`deepspeed --master_port {port + 1} ...` takes another one.") from error
    watch_hosts()


def check_launcher():
    """Raises UsageError for variables of the launcher that are missing or no numbers."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not value or (name != "MASTER_ADDR" and not value.isdecimal()):
            raise UsageError(f"{name}={value}: where RANK is set, the other variables of a "
                             "launcher are read too, and numbers are needed; start with deepspeed "
                             "or torchrun, or `unset RANK` for one process.")
    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    port = int(os.environ["MASTER_PORT"])
    if rank >= world or port > 65535:
        raise UsageError(f"RANK={rank} WORLD_SIZE={world} MASTER_PORT={port}: ranks are counted "
                         "from 0 to WORLD_SIZE - 1, ports end at 65535.")


def free_compile_lock(name):
    """
    For an op that DeepSpeed compiles when it is first needed, `name`. torch lets one process
    compile, by a file `lock` in the op's folder, and the others wait. A compile that was killed
    leaves that file, for which all later runs would wait for ever without a word. So an old one is
    removed, and one that may be another process's is named.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    for lock in Path(root).glob(f"**/{name}/lock"):
        with suppress(OSError):  # another process may have removed it
            minutes = (time.time() - lock.stat().st_mtime) / 60
            if minutes > 30:
                lock.unlink()
                continue
            print0(f"{lock} says that another process compiles DeepSpeed's {name}, since "
                   f"{minutes:.0f} minutes. This one waits for it; where none does, delete the "
                   "file.")


def deepspeed_settings(config):
    """
    The DeepSpeed JSON as a dict, with the flags that stand over it filled in.

    raises UsageError for a file that is missing or malformed, a ZeRO stage that does not exist, and
    what DeepSpeed would refuse or leave unread
    """
    plan_for_gpus = config.dry_run > 0
    gpu = torch.cuda.is_available() or plan_for_gpus
    path = config.deepspeed_config or CONFIGS / ("1gpu.json" if gpu else "cpu.json")
    if Path(path).is_fifo():
        raise UsageError(f"--deepspeed_config {path} is a pipe, and the settings are read several "
                         "times; save them in a file.")
    try:
        # -sig, because Windows writes a mark in front
        ds_config = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"--deepspeed_config {path} cannot be read ({error.strerror}); {CONFIGS} "
                         "has one for each kind of hardware.") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"--deepspeed_config {path}, line {error.lineno}: not JSON "
                         f"({error.msg}).") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or too deep
        raise UsageError(f"--deepspeed_config {path} cannot be read "
                         f"({first_line(error)}).") from error
    if (not isinstance(ds_config, dict)
            or not isinstance(ds_config.setdefault("zero_optimization", {}), dict)):
        raise UsageError(f"--deepspeed_config {path}: a JSON object is needed, in which "
                         "zero_optimization, if it is there, is one too.")
    check_sections(ds_config, path)
    zero = ds_config["zero_optimization"]
    zero["stage"] = zero.get("stage", 0) if config.zero_stage == -1 else config.zero_stage
    if zero["stage"] not in (0, 1, 2, 3):
        raise UsageError(f"--zero_stage {zero['stage']!r}: ZeRO has the stages 0, 1, 2 and 3.")
    check_by_deepspeed(ds_config, path)
    if compute_dtype(ds_config) == torch.float16 and zero["stage"] == 0:
        # engine.backward scales the loss for ZeRO's optimizers only, while the optimizer without
        # ZeRO divides the gradients by the loss scale all the same.
        raise UsageError(f"--deepspeed_config {path}: fp16 without ZeRO would train next to "
                         "nothing, because DeepSpeed scales the loss for ZeRO's optimizers only. "
                         "Give --zero_stage 1, or bf16 in its place.")
    ds_config.update(train_micro_batch_size_per_gpu=config.per_device_train_batch_size,
                     gradient_accumulation_steps=config.gradient_accumulation_steps,
                     steps_per_print=sys.maxsize)
    return ds_config


# Entries of a DeepSpeed JSON (https://www.deepspeed.ai/docs/config-json/, deepspeed 0.19).
SECTIONS = """
activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger
communication_data_type compile compression_training csv_monitor curriculum_learning
data_efficiency data_types dataloader_drop_last disable_allgather dump_state eigenvalue elasticity
flops_profiler fp16 gradient_accumulation_steps gradient_clipping gradient_predivide_factor
hybrid_engine load_universal_checkpoint memory_breakdown optimizer pipeline prescale_gradients
progressive_layer_drop scheduler sparse_attention sparse_gradients steps_per_print tensorboard
torch_autocast train_batch_size train_micro_batch_size_per_gpu wall_clock_breakdown wandb
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
""".split()
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
MONITOR_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def check_sections(ds_config, path):
    """Raises UsageError for a misspelt entry, which DeepSpeed ignores, or a package not there."""
    for name, section in ds_config.items():
        near = difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.8)
        if name not in SECTIONS and near:
            raise UsageError(f"--deepspeed_config {path}: DeepSpeed knows no entry {name!r}; did "
                             f"you mean {near[0]!r}?")
        package = MONITOR_PACKAGES.get(name)
        enabled = isinstance(section, dict) and section.get("enabled")
        if package and enabled and importlib.util.find_spec(package) is None:
            raise UsageError(f"--deepspeed_config {path}: its section {name} needs the package "
                             f"{package}; pip install {package}, or switch the section off.")


def check_by_deepspeed(ds_config, path):
    """
    Raises UsageError for what DeepSpeed refuses, which it says only when the models are loaded, and
    for what it would not read.
    """
    where = f"--deepspeed_config {path}"
    if '"auto"' in json.dumps(ds_config):
        raise UsageError(f"{where}: \"auto\" is filled in by Hugging Face's Trainer; give a value, "
                         "or leave the entry out.")
    for name in ("optimizer", "scheduler"):
        if name in ds_config:
            raise UsageError(f"{where}: its section {name} would not be read, because the flags "
                             "make AdamW and its schedule (--learning_rate, --weight_decay, "
                             "--lr_scheduler_type); leave it out.")
    clip = ds_config.get("gradient_clipping", 0.0)
    if not isinstance(clip, (int, float)) or not 0 <= clip < math.inf:
        raise UsageError(f"{where}: gradient_clipping {clip!r}; a number of 0 (none) or more is "
                         "needed.")
    if "bfloat16" in ds_config:
        raise UsageError(f"{where}: its section bfloat16 is read under the name bf16 alone; rename "
                         "it.")
    for name in ("bf16", "fp16"):
        section = ds_config.get(name, {})
        if not isinstance(section, dict) or section.get("enabled", False) not in (True, False):
            raise UsageError(f'{where}: {name} {section!r}; {{"enabled": true}} or '
                             '{"enabled": false} is needed.')

    # DeepSpeed's own checks. The batch sizes are left out, because the flags say them.
    settings = copy.deepcopy(ds_config)
    for name in ("train_batch_size", "gradient_accumulation_steps"):
        settings.pop(name, None)
    settings["train_micro_batch_size_per_gpu"] = 1
    try:
        deepspeed.DeepSpeedConfig(settings)
    except Exception as error:  # of any kind, because each of its sections raises its own
        reason = " ".join(str(error).split()).split(" For further information")[0][:300]
        raise UsageError(f"{where}: DeepSpeed refuses it ({reason}).") from error

    # What is offloaded must be sharded.
    zero = ds_config["zero_optimization"]
    for part, least in (("optimizer", 1), ("param", 3)):
        section = zero.get(f"offload_{part}") or {}
        if section.get("device", "none") != "none" and zero["stage"] < least:
            raise UsageError(f"{where}: offload_{part} needs ZeRO stage {least} or more, and the "
                             f"stage is {zero['stage']}.")


def compute_dtype(ds_config):
    if ds_config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    if ds_config.get("fp16", {}).get("enabled"):
        return torch.float16
    return torch.float32


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# -----------------------------------------------------------------------------
# one line, one number, one error for all ranks

def device():
    return torch.device(get_accelerator().current_device_name())


def to_device(batch):
    """A batch (dict) with its tensors on this rank's device."""
    return {name: value.to(device()) if torch.is_tensor(value) else value
            for name, value in batch.items()}


def print0(*args, sep=" "):
    """Prints on rank 0. A log that cannot be written to (full disk, closed pipe) ends no run."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        with suppress(OSError):
            clear_live()
            print(*args, sep=sep, flush=True)


def all_sum(*values):
    """Sums numbers (or 0-dim tensors) over all ranks, in float64, one collective -> floats."""
    total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device())
                         for value in values])
    dist.all_reduce(total)
    return total.tolist()


def mean_over_ranks(numbers):
    """Mean over the numbers of all ranks."""
    total, count = all_sum(sum(numbers), len(numbers))
    return total / max(count, 1)


def on_rank0(function):
    """function() of rank 0, on every rank; a UsageError there is raised on every rank."""
    result = [None]
    if dist.get_rank() == 0:
        try:
            result = [function()]
        except UsageError as error:
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], UsageError):
        raise result[0]
    return result[0]


@contextmanager
def raise_on_all_ranks():
    """Inside is what each rank does for itself: a UsageError of one is raised on all of them."""
    own_error = None
    try:
        yield
    except UsageError as error:
        own_error = error
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, own_error)
    for error in errors:
        if error is not None:
            raise error


# -----------------------------------------------------------------------------
# hosts that fall silent

BEAT_SECONDS = 5
SILENT_BEATS = 15  # a rank that is not heard for 75 s is lost


def watch_hosts():
    """
    Ends this process, with a sentence that names the host, when a rank on another falls silent. A
    host that loses its power or its link closes no connection, so the others would wait in their
    next collective for its timeout: an hour, which a long save or evaluation may need. On one host
    nothing is watched, because there the launcher ends the others.

    Two daemon threads do it. `talk` tells rank 0's store that this rank is alive and asks for the
    others. A dead link can block `talk` for long, so the second thread, `judge`, does the counting.
    It counts its own beats, not seconds, because a process that was itself suspended must not blame
    the others. The main thread may compute, load or wait for as long as it releases the GIL.
    """
    rank = dist.get_rank()
    world = dist.get_world_size()
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(master, port, is_master=False)  # has a socket of its own
    keys = [f"heartbeat/{r}" for r in range(world)]
    store.set(keys[rank], f"0 {socket.gethostname()} ({host_address()})")
    heard = store.multi_get(keys)  # waits until all keys are there
    ended = threading.Event()
    hosts = [value.decode().split(" ", 1)[1] for value in heard]
    if len(set(hosts)) == 1:
        return

    def talk():
        try:
            for beat in itertools.count(1):
                store.set(keys[rank], f"{beat} {hosts[rank]}")
                heard[:] = store.multi_get(keys)
                if ended.wait(BEAT_SECONDS):
                    return
        except dist.DistError:
            # Rank 0 is gone. `judge` waits before it says so, because the run may simply be done.
            return

    def judge():
        before = list(heard)
        silent = [0] * world  # beats
        while not ended.wait(BEAT_SECONDS):
            now = list(heard)
            for r in range(world):
                silent[r] = silent[r] + 1 if before[r] == now[r] else 0
            before = now
            lost = [r for r in range(world) if silent[r] >= SILENT_BEATS]
            if not lost:
                continue
            if 0 in lost:
                lost = [0]  # without rank 0's store nobody is heard
            names = " and ".join(sorted({hosts[r] for r in lost}))
            print(f"\n{Path(sys.argv[0]).name}: error: nothing heard for "
                  f"{BEAT_SECONDS * SILENT_BEATS} s from rank {', '.join(map(str, lost))} on host "
                  f"{names}: host, network or process is gone. This is rank {rank} on "
                  f"{hosts[rank]}; it ends now.", file=sys.stderr, flush=True)
            # os._exit, because the main thread waits in a collective that no exception reaches
            os._exit(1)

    threads = [threading.Thread(target=work, daemon=True) for work in (talk, judge)]
    for thread in threads:
        thread.start()

    def stop_watching():
        ended.set()
        threads[0].join(BEAT_SECONDS)  # it must not be inside the store when Python goes down

    atexit.register(stop_watching)


def host_address():
    """The address of this host on the network that leads to rank 0's."""
    master = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
    family, kind, _, _, address = master
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # of a datagram socket: chooses the route, sends nothing
        return probe.getsockname()[0]
