"""
The hybrid engine: how can the weights being trained also generate fast?

DeepSpeed trains (ZeRO, offload, its launcher, its checkpoints); one decoder of our own (kernels/decoder.py) generates,
for all model families, from the very same weights. In order: flags and processes; models in and out of Hugging Face
folders; LoRA; DeepSpeed; the engine that generates.

Memory, bytes per parameter of a trained model, before activations (N ranks):

    training     fp32: 4 weights + 4 gradients + 8 Adam          bf16: 2 + 2 + 4 master + 8 Adam
                 ZeRO 1 divides Adam (and master) by N, ZeRO 2 gradients too, ZeRO 3 weights too
    generation   + what the decoder must fuse (query, key and value matrices, about a quarter of a block), the rest is
                 read where it is trained; on a CPU + one copy of every matrix, packed for oneDNN (`pack`);
                 LoRA: + the merged matrices; ZeRO 3: + this rank's share of one copy in the compute dtype
    KV cache     2 x layers x B x T x kv_heads x head_dim x bytes, allocated when a rollout starts, freed when it ends

Everything here speaks token ids; text is data.py's.
"""

import argparse
import atexit
import copy
import dataclasses
import inspect
import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
import zlib
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import deepspeed
import numpy as np
import psutil
import safetensors
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, get_scheduler

from data import (Collator, UsageError, check_local, decode_answers, encode_prompts, first_line, flag, gold_scorer,
                  one_sentence, parse_config, rank_share)
from kernels.decoder import FAMILIES, Decoder, KVCache, why_unsupported
from kernels.logprob import linear_logprobs, token_logprobs
from kernels.sampling import sample

HERE = Path(__file__).resolve().parent


# -----------------------------------------------------------------------------
# a run: flags, processes, logs

@dataclass
class EngineConfig:
    """Flags that the three stages share, beside data.DataConfig."""
    output_dir: str = flag("output", "the run's folder; this stage writes its model below it")
    deepspeed_config: str = flag("", "DeepSpeed JSON; default configs/1gpu.json with a GPU, else configs/cpu.json")
    zero_stage: int = flag(-1, "0-3, over the JSON's; -1 leaves the JSON's")
    per_device_train_batch_size: int = flag(8, "rows in one forward and backward")
    gradient_accumulation_steps: int = flag(1, "such micro-batches in one optimizer step")
    weight_decay: float = flag(0.0, "of matrices; biases and norms have none")
    lr_scheduler_type: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
                               "constant_with_warmup", "inverse_sqrt"] = flag("cosine", "transformers' of that name")
    num_warmup_steps: int = flag(0, "optimizer steps of linear warm-up")
    num_train_epochs: int = flag(1, "passes over this stage's rows")
    max_steps: int = flag(-1, "steps of the run, the rows repeated as needed; -1: as many as the epochs have")
    logging_steps: int = flag(10, "steps between printed lines")
    save_steps: int = flag(0, "steps between checkpoints, from which --resume goes on; 0: none")
    save_total_limit: int = flag(2, "checkpoints kept, the newest")
    resume: bool = flag(False, "go on from the newest complete checkpoint; a finished stage is left as it is")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass")
    lora_dim: int = flag(0, "rank of LoRA adapters; 0 trains the weights themselves")
    lora_alpha: float = flag(0.0, "adapters are scaled by alpha / dim; 0: alpha = 2 dim")
    lora_module_name: str = flag("", "adapt linear layers whose name contains this; default: all in the blocks")
    only_optimize_lora: bool = flag(False, "freeze everything but the adapters")
    dry_run: int = flag(0, "print the plan of memory, time and cost, load nothing, stop: alone for this machine's "
                           "processes, with a number for so many GPUs; 0 trains", nargs="?", const=-1)
    device_tflops: float = flag(50.0, "of --dry_run: TFLOP/s a device sustains; DeepSpeed-Chat's A100s 43 to 82")
    device_price: float = flag(4.0, "of --dry_run: dollars a device-hour")


def run_stage(main, config_class, doc):
    """`main(config)` for the command line: what the user can mend ends with one sentence and code 2, no traceback."""
    with one_sentence():
        config = parse_config(config_class, doc)
        check_flags(config)
        find_stages_before(config)
        main(config)
        if dist.is_initialized():
            dist.barrier()  # all end together: `watch_hosts` takes one that is gone for lost
            dist.destroy_process_group()  # not after an error: NCCL would wait here for ranks that wait for this one


def setup(config):
    """
    Starts the process group (one process without a launcher is world size 1), seeds, and prints device, dtype and batch
    arithmetic. Returns the DeepSpeed settings (a dict) that every model of the stage is initialised with.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    check_flags(config)  # before anything slow: a wrong flag ends here
    settings = deepspeed_settings(config)
    started = not dist.is_initialized()
    if started:
        if "RANK" not in os.environ:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        # on a CPU gloo does; DeepSpeed's own all-reduce would be compiled at the first start, for most of a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # ninja, for what DeepSpeed compiles (offload): ssh starts this Python without its environment's folder in PATH
        os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
        # gloo would listen where the host's name leads, which many an /etc/hosts says is 127.0.0.1
        interfaces = {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
        if host_address() in interfaces:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interfaces[host_address()])
        deepspeed.init_distributed(verbose=False, timeout=timedelta(hours=1))  # its own, 10 minutes, a save may take
        watch_hosts()
    world = dist.get_world_size()
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    settings["train_batch_size"] = config.per_device_train_batch_size * config.gradient_accumulation_steps * world
    if not started:  # a second call in the same process only wants the settings
        return settings
    seed_everything(config.seed)
    source = config.deepspeed_config or "the default for this hardware"
    dtype, stage = str(compute_dtype(settings)).removeprefix("torch."), settings["zero_optimization"]["stage"]
    print0(f"device {device()} x {world}, {dtype} and ZeRO stage {stage} ({source}); "
           f"batch {config.per_device_train_batch_size} a process x {config.gradient_accumulation_steps} accumulated "
           f"x {world} processes = {settings['train_batch_size']} rows a step")
    return settings


BEAT_SECONDS, SILENT_BEATS = 5, 15  # a rank not heard for 75 s is lost


def watch_hosts():
    """
    Ends this process, with a sentence that names the host, when a rank on another one is not heard any more. A host
    that loses its power or its link closes no connection, so the others would wait in their next collective for its
    timeout: an hour, which a long save or evaluation may need. On one host nothing is watched: there the launcher ends
    the others.

    Two daemon threads. `talk` tells rank 0's store that this rank is alive and asks for the others; a dead link may
    block it for as long as it likes, so `judge` counts. It counts beats and not seconds: while this process is stopped
    or starved itself, nobody else is silent. The main thread may compute, load or wait for as long as it releases the
    GIL.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # its own socket
    keys = [f"heartbeat/{r}" for r in range(world)]
    store.set(keys[rank], f"0 {socket.gethostname()} ({host_address()})")
    heard, ended = store.multi_get(keys), threading.Event()  # waits until all keys are there
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
        except dist.DistError:  # rank 0 is gone; `judge` gives it the time to be gone because all is done
            return

    def judge():
        before, silent = list(heard), [0] * world
        while not ended.wait(BEAT_SECONDS):
            now = list(heard)
            silent = [count + 1 if old == new else 0 for old, new, count in zip(before, now, silent)]
            before, lost = now, [r for r in range(world) if silent[r] >= SILENT_BEATS]
            if lost:
                lost = [0] if 0 in lost else lost  # without rank 0's store nobody is heard
                names = " and ".join(sorted({hosts[r] for r in lost}))
                print(f"\n{Path(sys.argv[0]).name}: error: nothing heard for {BEAT_SECONDS * SILENT_BEATS} s from rank "
                      f"{', '.join(map(str, lost))} on host {names}: host, network or process is gone. This is rank "
                      f"{rank} on {hosts[rank]}; it ends now.", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread waits in a collective that no exception reaches

    threads = [threading.Thread(target=work, daemon=True) for work in (talk, judge)]
    for thread in threads:
        thread.start()
    atexit.register(lambda: (ended.set(), threads[0].join(BEAT_SECONDS)))  # not inside the store when Python goes down


def host_address():
    """The address of this host on the network that leads to rank 0's."""
    family, kind, *_, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # of a datagram socket: chooses the route, sends nothing
        return probe.getsockname()[0]


AT_LEAST_1 = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_generation_batch_size",
              "num_train_epochs", "ppo_epochs", "num_generations", "logging_steps", "save_total_limit",
              "max_eval_samples", "max_seq_len", "max_prompt_seq_len", "max_answer_seq_len")


AT_LEAST_0 = ("kl_coef", "kl_target", "cliprange", "cliprange_value", "reward_clip", "unsup_coef", "weight_decay",
              "missing_eos_penalty")


def check_flags(config):
    """Raises UsageError for a number that is out of its range, and for flags that do not go together."""
    flags = vars(config)
    for name in AT_LEAST_1:
        if flags.get(name, 1) < 1:
            raise UsageError(f"--{name} {flags[name]}: at least 1 is needed.")
    for name, value in flags.items():
        if (name.endswith("learning_rate") or name in AT_LEAST_0) and not value >= 0:
            raise UsageError(f"--{name} {value}: 0 or more is needed.")
    for name in ("max_steps", "dry_run"):
        if flags[name] < -1 or flags[name] == 0 and name == "max_steps":
            raise UsageError(f"--{name} {flags[name]}: a number of 1 or more is needed.")
    for name in ("save_steps", "eval_steps", "num_warmup_steps"):
        if flags.get(name, 0) < 0:
            raise UsageError(f"--{name} {flags[name]}: 0 (none) or more is needed.")
    if not flags.get("temperature", 1) > 0:
        raise UsageError(f"--temperature {config.temperature}: rollouts are sampled, so it must be over 0 (PPO learns "
                         "nothing from greedy answers).")
    if not 0 < flags.get("top_p", 1) <= 1:
        raise UsageError(f"--top_p {config.top_p}: a share of the probability is needed, over 0 and at most 1.")
    for name in ("gamma", "lam"):
        if not 0 <= flags.get(name, 1) <= 1:
            raise UsageError(f"--{name} {flags[name]}: a number from 0 to 1 is needed.")
    if config.lora_dim < 0 or config.only_optimize_lora and config.lora_dim == 0:
        raise UsageError("--only_optimize_lora and LoRA need --lora_dim 1 or more, the rank of the adapters.")


def make_output_dir(path):
    """Rank 0, before anything slow. Raises UsageError for a folder that cannot be, or cannot be written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {path} cannot be made: {first_line(error)}.") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"--output_dir {path}: nothing may be written there; name another folder.")


def find_stages_before(config):
    """
    Fills in where a stage starts from, unless a flag says it: what the one before wrote below the same --output_dir.
    Raises UsageError where that is not there yet.
    """
    for name, value in vars(config).items():
        if name.endswith("model_name_or_path") and not value:
            folder = Path(config.output_dir) / ("reward" if name.startswith("critic") else "sft")
            if folder.exists():
                setattr(config, name, str(folder))
            elif not (name.startswith("critic") and config.reward_fn):  # then the critic starts from the actor's model
                raise UsageError(f"--{name} {folder}: there is no such folder yet; the stage before this one writes it "
                                 "(bash run_all.sh runs all three). Or name another model.")


def deepspeed_settings(config):
    """The DeepSpeed JSON as a dict, the flags that stand over it filled in. Raises UsageError for what cannot work."""
    gpu = torch.cuda.is_available() or config.dry_run > 0  # a plan for so many GPUs
    path = config.deepspeed_config or HERE / "configs" / ("1gpu.json" if gpu else "cpu.json")
    try:
        settings = json.loads(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"--deepspeed_config {path} cannot be read ({error.strerror}); {HERE / 'configs'} has one for "
                         "each kind of hardware.") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"--deepspeed_config {path}, line {error.lineno}: not JSON ({error.msg}).") from error
    if not isinstance(settings, dict) or not isinstance(settings.setdefault("zero_optimization", {}), dict):
        raise UsageError(f"--deepspeed_config {path}: a JSON object is needed, in which zero_optimization, if it is "
                         "there, is one too.")
    zero = settings["zero_optimization"]
    zero["stage"] = zero.get("stage", 0) if config.zero_stage == -1 else config.zero_stage
    if zero["stage"] not in (0, 1, 2, 3):
        raise UsageError(f"--zero_stage {zero['stage']}: ZeRO has the stages 0, 1, 2 and 3.")
    settings.update(train_micro_batch_size_per_gpu=config.per_device_train_batch_size, steps_per_print=sys.maxsize,
                    gradient_accumulation_steps=config.gradient_accumulation_steps)
    return settings


def device():
    return torch.device(get_accelerator().current_device_name())


def compute_dtype(settings):
    if settings.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if settings.get("fp16", {}).get("enabled") else torch.float32


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def print0(*args, sep=" "):
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*args, sep=sep, flush=True)


def all_sum(*values):
    """Sums each number (or 0-dim tensor) over all ranks, in float64 and one collective -> list of floats."""
    total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device()) for value in values])
    dist.all_reduce(total)
    return total.tolist()


def mean(numbers):
    """Mean over the numbers of all ranks."""
    total, count = all_sum(sum(numbers), len(numbers))
    return total / max(count, 1)


class MetricsLog:
    """
    Rank 0: one JSON object a step in `folder/metrics.jsonl`, every `every` steps a fixed-width line with speed and time
    left (its numbers are means over the steps since the line before), and DeepSpeed's monitor (TensorBoard, W&B, CSV:
    sections of the DeepSpeed JSON) where it is switched on. A resumed run, with `done` steps behind it, appends.
    """

    def __init__(self, folder, total_steps, every, columns, monitor=None, done=0):
        self.total_steps, self.every, self.columns, self.monitor = total_steps, every, columns, monitor
        self.done, self.began, self.rank0, self.unprinted = done, time.time(), dist.get_rank() == 0, []
        if self.rank0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.file = open(Path(folder) / "metrics.jsonl", "a" if done else "w", buffering=1)

    def __call__(self, step, metrics):
        """step counts from 1; metrics are floats (means over what they were measured on, all ranks)."""
        if not self.rank0:
            return
        metrics = {"step": step, **metrics, "memory_gb": memory_gb()}
        self.file.write(json.dumps(metrics) + "\n")
        if self.monitor is not None and self.monitor.enabled:
            self.monitor.write_events([(name, value, step) for name, value in metrics.items() if name != "step"])
        self.unprinted.append(metrics)
        if step % self.every == 0 or step in (self.done + 1, self.total_steps):
            pace = (time.time() - self.began) / (step - self.done)  # seconds a step
            line = "  ".join(f"{label} {sum(m[name] for m in self.unprinted) / len(self.unprinted):>{width}}"
                             for label, name, width in self.columns if name in metrics)
            self.unprinted = []
            print(f"step {step:>5}/{self.total_steps}  {line}  {1 / pace:5.2f} steps/s  "
                  f"{pace * (self.total_steps - step):4.0f} s left", flush=True)


def memory_gb():
    """Peak memory so far: of the accelerator, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts kilobytes


def write_json(path, value):
    """Atomic: a reader sees the old file or the new one, never half of either."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


STAGES = {"sft": "sft", "reward": "reward", "dpo": "actor", "ppo": "actor"}  # section of summary.json -> folder


def write_summary(checkpoints, values, model, **others):
    """Puts a stage's headline numbers, and `others`, into output_dir/summary.json beside those of earlier stages."""
    config, section = checkpoints.config, checkpoints.section
    if dist.get_rank() != 0:
        return {}
    path = Path(config.output_dir) / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() and section != "sft" else {}  # a new run begins with SFT
    summary[section] = {name: round(value, 4) for name, value in values.items() if value is not None}
    summary["seconds"] = round(sum(summary[s]["seconds"] for s in ("sft", "reward", "dpo", "ppo") if s in summary), 1)
    hardware = Path(config.deepspeed_config or ("1gpu" if torch.cuda.is_available() else "cpu")).stem
    versions = {module.__name__: module.__version__ for module in (torch, deepspeed, transformers)}
    summary.update(**others, model=summary.get("model", model), hardware=hardware, seed=config.seed,
                   versions={"python": sys.version.split()[0], **versions})
    summary.setdefault("config", {})[section] = dataclasses.asdict(config)
    write_json(path, summary)
    os.sync()  # the model is on the disk before the file by which --resume knows that it is done
    write_json(checkpoints.folder / "run_config.json", checkpoints.resolved)
    return summary


# -----------------------------------------------------------------------------
# models: Hugging Face folders in, Hugging Face folders out

def load_model(name_or_path, tokenizer, settings, tokens, head="lm", score_from_lm=False):
    """
    A Hugging Face model in the compute dtype, all dropout off (PPO compares log-probabilities of two passes; see
    disable_dropout), its vocabulary as large as the tokenizer's, its pad and EOS ids the tokenizer's.

    name_or_path   folder, hub name, or `tiny`: random weights in the shape of configs/tiny.json
    tokens         the longest sequence it will see; more than it has positions for is an error
    head           "lm" (AutoModelForCausalLM) or "score" (AutoModelForSequenceClassification, one label)
    score_from_lm  with "score": the folder may hold a language model; the head is then new, N(0, 1/(hidden + 1))
                   (Stiennon et al. 2020, appendix; its variance keeps first scores near unit scale)
    """
    auto = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    config = read_config(name_or_path)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and tokens > positions:
        raise UsageError(f"{name_or_path} has {positions} positions and {tokens} tokens were asked for; lower "
                         "--max_seq_len, or --max_prompt_seq_len and --max_answer_seq_len, which are added up.")
    disable_dropout(config)
    if head == "score":
        config.num_labels = 1
    dtype = compute_dtype(settings)
    stage = settings["zero_optimization"]["stage"]
    # while this object lives, transformers loads only this rank's share of the weights
    zero3 = transformers.integrations.HfDeepSpeedConfig(settings) if stage == 3 else None
    if name_or_path == "tiny":
        config.vocab_size = len(tokenizer)
        model, missing = auto.from_config(config, dtype=dtype), []
    else:
        try:
            model, info = auto.from_pretrained(name_or_path, config=config, dtype=dtype, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise UsageError(f"{name_or_path}: its weights could not be loaded ({first_line(error)}).") from error
        missing = sorted(info["missing_keys"])
        if head == "lm" and "score.weight" in info["unexpected_keys"]:  # with tied embeddings nothing else would tell
            raise UsageError(f"{name_or_path} is no language model: it holds a reward model's score.weight.")
    expected = ["score.weight"] if score_from_lm and name_or_path != "tiny" else []
    if missing and missing != expected:
        kind = "language model" if head == "lm" else "reward model (a sequence classification model with one label)"
        raise UsageError(f"{name_or_path} is no {kind}: its weights lack {', '.join(missing[:3])}"
                         f"{' and more' * (len(missing) > 3)}.")
    if head == "score" and (missing or name_or_path == "tiny"):
        with deepspeed.zero.GatheredParameters(model.score.weight, modifier_rank=0):
            nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.weight.size(-1) + 1))
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id, model.config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if head == "lm":
        ends = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *([] if ends is None else ends if isinstance(ends, list) else [ends])}
        model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    return model


def read_config(name_or_path):
    """The Hugging Face config of a folder, a hub name or `tiny`."""
    check_local(name_or_path)
    try:
        return AutoConfig.from_pretrained(HERE / "configs" / "tiny.json" if name_or_path == "tiny" else name_or_path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{name_or_path}: not a model folder, and not found on the hub ({first_line(error)}). "
                         "A model folder holds config.json, weights (model.safetensors) and a tokenizer.") from error


def disable_dropout(config):
    """
    Sets every dropout probability of a Hugging Face config to 0. In the config and not in nn.Dropout modules, because
    OPT and BLOOM call dropout as a function; a rollout whose log-probabilities are noisy makes the PPO ratio differ
    from 1 before any update.
    """
    for name, value in config.to_dict().items():
        if ("drop" in name) and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, 0.0)


class RewardModel(nn.Module):
    """
    A Hugging Face sequence classification model read at every position: the critic needs V(s_t) for all t, the reward
    model the last. The saved folder is the inner model's, so AutoModelForSequenceClassification gives the same score.

    normalise  values are (score - score_mean) / score_std with the numbers that step 2 left in config.json
    """

    def __init__(self, model, normalise=False):
        super().__init__()
        self.model, self.config = model, model.config
        self.mean = getattr(model.config, "score_mean", 0.0) if normalise else 0.0
        self.std = max(getattr(model.config, "score_std", 1.0), 1e-6) if normalise else 1.0
        self.trunk_arguments = set(inspect.signature(model.base_model.forward).parameters)

    def forward(self, input_ids, attention_mask):
        """input_ids, attention_mask (B, T), padded on either side or both -> values (B, T) float32, one a position."""
        positions = {"position_ids": position_ids(attention_mask)} if "position_ids" in self.trunk_arguments else {}
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions)
        hidden = self.model.base_model(**inputs)[0]
        return (self.model.score(hidden).squeeze(-1).float() - self.mean) / self.std


class LanguageModel(nn.Module):
    """A Hugging Face causal LM that returns the log-probabilities of given tokens, never the (B, T, V) logits."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.arguments = set(inspect.signature(model.forward).parameters)
        self.plain_head = model.config.model_type in FAMILIES  # logits are hidden @ weight.T + bias and nothing else

    def forward(self, input_ids, attention_mask, mask, temperature=1.0):
        """
        input_ids, attention_mask  (B, T) int64, padded on either side or both
        mask                       (B, R), R < T: not zero on those of the last R tokens that are to be scored
        returns  logprobs (B, R) float32, nats, of input_ids[:, -R:] given what precedes them, at this temperature;
                 entropy (B, R) float32, nats, of the distributions they were drawn from, detached (for logging);
                 both zero where mask is zero: the head, often half of all work, is not applied there
        """
        R, scored = mask.size(1), mask.bool()
        positions = {"position_ids": position_ids(attention_mask)} if "position_ids" in self.arguments else {}
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions)
        targets = input_ids[:, -R:][scored]  # what stands at t predicts token t + 1
        if self.plain_head:
            hidden, head = self.model.base_model(**inputs)[0][:, -R - 1:-1], self.model.get_output_embeddings()
            logprobs, entropy = linear_logprobs(hidden[scored], head.weight, targets, head.bias, temperature)
        else:
            logits = self.model(**inputs, logits_to_keep=R + 1).logits[:, -R - 1:-1][scored] / temperature
            logprobs = token_logprobs(logits, targets)
            with torch.no_grad():  # some rows at a time: it takes several float32 copies of what it is given
                entropy = torch.cat([torch.distributions.Categorical(logits=part.float()).entropy()
                                     for part in logits.split(256)])
        zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return zeros.masked_scatter(scored, logprobs), zeros.masked_scatter(scored, entropy)


def parameter_count(model):
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ZeRO 3 leaves empty shells behind


def position_ids(attention_mask):
    """(B, T) mask -> (B, T) positions that count real tokens from 0, so that left padding changes nothing."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def last_token(values, attention_mask):
    """values (B, T), mask (B, T) -> (B,): the value at each row's last real token, wherever the padding is."""
    last = (attention_mask * torch.arange(values.size(1), device=values.device)).argmax(-1)
    return values.gather(1, last[:, None]).squeeze(1)


def save_model(engine, tokenizer, folder, averages=None):
    """
    A trained model as a Hugging Face folder: safetensors, config, generation config, tokenizer with its chat template.
    LoRA is merged into the weights; where the rest was frozen it is also saved by itself, in PEFT's format, in
    folder/adapter. `averages` (by name) stand in for the weights they average. Collective under ZeRO 3; rank 0 writes.
    Files are complete before they take their names, so an interrupted save leaves the older model loadable.
    """
    model = engine.module.model
    if engine.zero_optimization_stage() == 3:
        whole = engine._zero3_consolidated_16bit_state_dict() or {}  # rank 0's; the others get nothing
        state = {name.removeprefix("model."): tensor for name, tensor in whole.items()}
    else:
        state = model.state_dict()
    if averages:
        # a tied head has no average of its own, and saved beside the embedding's it would come loose from it
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tied = names - dict(model.named_parameters()).keys()
        state = {name: averages.get(name, tensor).to(tensor)
                 for name, tensor in state.items() if name not in tied}
    if dist.get_rank() == 0:
        folder, staging = Path(folder), Path(folder) / ".saving"
        shutil.rmtree(staging, ignore_errors=True)
        adapters, state = split_lora_state(model, state)
        model.config.use_cache = True
        model.save_pretrained(staging, state_dict=state)
        model.config.use_cache = False
        tokenizer.save_pretrained(staging)
        trained = {name for name, p in model.named_parameters() if p.requires_grad} - adapters.keys()
        if adapters and trained <= {"score.weight"}:
            save_adapter(adapters, {name: state[name] for name in trained}, model, staging / "adapter")
        old = set(folder.glob("model*.safetensors*")) - {folder / new.name for new in staging.iterdir()}
        shutil.rmtree(folder / "adapter", ignore_errors=True)  # an earlier run's
        for new in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):  # it makes a model of it
            os.replace(new, folder / new.name)
        for file in old:
            file.unlink()
        staging.rmdir()
    dist.barrier()


# -----------------------------------------------------------------------------
# LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): W x + (alpha / dim) B A x, with A (dim, in) and B (out,
# dim) trained

class LoRALinear(nn.Module):
    """Wraps nn.Linear or GPT-2's Conv1D. B starts at zero, so the wrapped model starts as the plain one."""

    def __init__(self, base, dim, alpha):
        super().__init__()
        self.transposed = isinstance(base, transformers.pytorch_utils.Conv1D)
        # not weight.shape: that is (0,) where ZeRO 3 has partitioned the weight
        in_features, out_features = (base.nx, base.nf) if self.transposed else (base.in_features, base.out_features)
        self.base, self.scaling, self.enabled = base, alpha / dim, True
        self.lora_A = nn.Parameter(torch.empty(dim, in_features, dtype=base.weight.dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, dim, dtype=base.weight.dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        y = self.base(x)
        return y + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B) if self.enabled else y

    def merged_weight(self, *tensors):
        """
        The base's weight plus the adapter's part, laid out as in the base. A new tensor: the base itself is never
        written, so no rounding can pile up in it. `tensors` (weight, A, B) stand in for the layer's own.
        """
        weight, A, B = tensors or (self.base.weight, self.lora_A, self.lora_B)
        delta = self.scaling * B.float() @ A.float()
        return (weight.float() + (delta.t() if self.transposed else delta)).to(weight.dtype)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)


def add_lora(model, config):
    """Wraps the linear layers whose name contains --lora_module_name (default: all in the blocks), in place."""
    if config.lora_dim == 0:
        return model
    if config.only_optimize_lora:
        model.requires_grad_(False)
        if hasattr(model, "score"):
            model.score.requires_grad_(True)  # a new head has to be learned
    wrapped = 0
    for name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            full = f"{name}.{child_name}"
            linear = isinstance(child, (nn.Linear, transformers.pytorch_utils.Conv1D))
            in_block = any(part.isdigit() for part in full.split("."))
            if linear and (config.lora_module_name in full if config.lora_module_name else in_block):
                alpha = config.lora_alpha or 2 * config.lora_dim
                setattr(parent, child_name, LoRALinear(child, config.lora_dim, alpha))
                wrapped += 1
    if isinstance(model.get_output_embeddings(), LoRALinear):
        raise UsageError(f"--lora_module_name {config.lora_module_name} is in the name of the head, which takes no "
                         "adapter; name linear layers of the blocks.")
    if not wrapped:
        raise UsageError(f"--lora_module_name {config.lora_module_name} is in no linear layer's name; this model has, "
                         "for example, "
                         + ", ".join([n for n, m in model.named_modules() if isinstance(m, nn.Linear)][:4]) + ".")
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    print0(f"LoRA: {wrapped} layers, {adapters / 1e6:.2f}M adapter parameters"
           + (", everything else frozen" if config.only_optimize_lora else ", everything else trained too"))
    return model


@contextmanager
def adapters_off(model):
    """Inside, the model is what it was before LoRA: with --only_optimize_lora PPO's reference, for no memory."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def split_lora_state(model, state):
    """state dict of a model with LoRALinear layers -> (adapter tensors by name, merged plain state dict)."""
    adapters, plain = {}, dict(state)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            A, B = (adapters.setdefault(leaf, plain.pop(leaf)) for leaf in (f"{name}.lora_A", f"{name}.lora_B"))
            plain[f"{name}.weight"] = layer.merged_weight(plain.pop(f"{name}.base.weight"), A, B)
            if layer.bias is not None:
                plain[f"{name}.bias"] = plain.pop(f"{name}.base.bias")
    return adapters, plain


def save_adapter(adapters, head, model, folder):
    """
    The adapter in PEFT's format: peft.PeftModel.from_pretrained(base, folder) loads it. `head` (name -> tensor) is what
    else was trained, a reward model's score: PEFT looks for it in every adapter of task type SEQ_CLS.
    """
    from safetensors.torch import save_file
    folder.mkdir()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    dim, layer = adapters[next(iter(adapters))].size(0), next(iter(layers.values()))
    tensors = {**{f"{name}.weight": t for name, t in adapters.items()}, **head}
    save_file({f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
              folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM", "r": dim,
        "lora_alpha": layer.scaling * dim,
        "lora_dropout": 0.0, "bias": "none", "target_modules": list(layers), "inference_mode": True,
        "fan_in_fan_out": layer.transposed, "base_model_name_or_path": model.config._name_or_path})


# -----------------------------------------------------------------------------
# DeepSpeed

def train_engine(model, settings, config, learning_rate, total_steps):
    """
    A model (LanguageModel or RewardModel) -> DeepSpeed engine with AdamW and a learning-rate schedule over total_steps
    optimizer steps. AdamW's eps is 1e-5, as in InstructGPT's lineage: with 1e-8 the first updates of PPO are near-sign
    steps.
    """
    if config.gradient_checkpointing:
        model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.model.enable_input_require_grads()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    ndim = lambda p: len(getattr(p, "ds_shape", p.shape))  # ZeRO 3 shows every parameter as one-dimensional
    groups = [{"params": [p for _, p in trained if ndim(p) >= 2], "weight_decay": config.weight_decay},
              {"params": [p for _, p in trained if ndim(p) < 2], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-5)
    else:
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-5, fused=True)
    warmup = min(config.num_warmup_steps, total_steps)
    schedule = get_scheduler(config.lr_scheduler_type, optimizer, warmup, total_steps)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)
    if dist.get_world_size() == 1 and settings["zero_optimization"]["stage"] == 0:
        engine.enable_backward_allreduce = False  # there is nobody to sum with, and it copies all gradients to do so
    if hasattr(engine.optimizer, "fp32_groups"):  # bf16 without ZeRO
        for state in engine.optimizer.optimizer.state.values():
            state["step"].zero_()  # DeepSpeed makes Adam's state by a step with gradients of 0, which is none
    engine.train()  # Hugging Face loads in eval mode, in which --gradient_checkpointing does nothing
    return engine


def frozen_engine(model, settings):
    """A model that is only read (reference, reward), in eval mode; sharded under ZeRO 3 like its trained partner."""
    model.requires_grad_(False)
    if settings["zero_optimization"]["stage"] < 3:
        return model.to(device()).eval()
    zero = {k: v for k, v in settings["zero_optimization"].items() if k != "offload_optimizer"}
    engine, *_ = deepspeed.initialize(model=model, config={**settings, "zero_optimization": zero})
    engine.eval()  # returns None, unlike a module's
    return engine


class ExponentialMovingAverage:
    """
    average <- decay average + (1 - decay) weights, after every optimizer step, from a copy of the first weights
    (InstructGPT, appendix C: 0.992). It averages the optimizer's float32 master weights, on the CPU of rank 0: in bf16
    a step of 0.8% of a small change rounds away, and under ZeRO 3 there is nothing else whole to average. Every rank
    must call `update`.
    """

    def __init__(self, engine, decay):
        self.engine, self.decay, self.average = engine, decay, {}
        # bf16 without ZeRO: DeepSpeed's optimizer has the masters, and safe_get_full_fp32_param does not know it
        groups = zip(getattr(engine.optimizer, "fp16_groups", []), getattr(engine.optimizer, "fp32_groups", []))
        self.masters = {low: full for lows, fulls in groups for low, full in zip(lows, fulls)}
        self.update()

    @torch.no_grad()
    def update(self):
        for name, parameter in self.engine.module.model.named_parameters():
            if not parameter.requires_grad:
                continue
            # collective where ZeRO shards the weights, None where no float32 copy is kept apart
            weight = deepspeed.utils.safe_get_full_fp32_param(parameter)
            weight = (self.masters.get(parameter, parameter) if weight is None else weight).detach().float().cpu()
            if dist.get_rank() == 0:
                self.average[name] = self.average.get(name, weight.clone()).lerp_(weight, 1 - self.decay)


def train_step(engine, micro_batches, loss_sum, count):
    """
    One optimizer step: minimises sum(loss_sum(micro_batch)) / count, where `count` (tokens, pairs) is the same sum's
    over all micro-batches and ranks. So the gradient does not depend on how rows are dealt to micro-batches, padded or
    sharded. Returns this rank's part of the loss, and the gradient's norm before clipping.
    """
    world, total = dist.get_world_size(), 0.0
    for micro_batch in micro_batches:
        loss = loss_sum(micro_batch) / count
        engine.backward(loss * world, scale_wrt_gas=False)  # DeepSpeed averages gradients over ranks
        total += loss.detach()
        norm = plain_grad_norm(engine)
        engine.step()  # updates at the last micro-batch of gradient_accumulation_steps
    return float(total), float(norm if norm is not None else engine.get_global_grad_norm() or 0)


def plain_grad_norm(engine):
    """The norm where DeepSpeed keeps none (float32 without ZeRO) and a step is due; None elsewhere."""
    kept = engine.zero_optimization_stage() > 0 or hasattr(engine.optimizer, "_global_grad_norm")
    if kept or not engine.is_gradient_accumulation_boundary():
        return None
    return nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def tensor_parallel_group(size):
    """The process group of this rank and those it generates with, `size` ranks each; None for 1. Collective."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if size < 1 or world % size:
        raise UsageError(f"--inference_tp_size {size} does not divide the {world} process(es) of this run.")
    groups = [dist.new_group(range(first, first + size)) for first in range(0, world, size)] if size > 1 else []
    return groups[rank // size] if groups else None


def to_device(batch):
    return {name: value.to(device()) if torch.is_tensor(value) else value for name, value in batch.items()}


# -----------------------------------------------------------------------------
# checkpoints: --save_steps, --save_total_limit, --resume

ANY_VALUE = {  # flags that may change when a run is resumed, or that count through what resolved_config derives
    "output_dir", "deepspeed_config", "zero_stage", "per_device_train_batch_size", "gradient_accumulation_steps",
    "per_device_generation_batch_size", "inference_tp_size", "logging_steps", "save_steps", "save_total_limit",
    "gradient_checkpointing", "resume", "skip_preflight", "device_tflops", "device_price"}


def resolved_config(config, section):
    """The flags, and what beside them decides the outcome: ZeRO stage, dtype, rows a step, the files that are read."""
    flags, settings, world = dataclasses.asdict(config), deepspeed_settings(config), dist.get_world_size()
    for name in sorted(flags.keys() - ANY_VALUE):
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
                 if name not in ANY_VALUE and then.get(name, now[name]) != now[name]), None)


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
def on_any_rank():
    """Inside, what each rank does for itself: a UsageError of one is raised on all of them."""
    error, errors = None, [None] * dist.get_world_size()
    try:
        yield
    except UsageError as raised:
        error = raised
    dist.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise error


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
            sync(path)
            self.files[str(Path(path).relative_to(self.folder))] = os.path.getsize(path)
        except (OSError, RuntimeError) as error:  # torch hides a full disk's OSError behind a RuntimeError of its own
            self.error = self.error or first_line(error.__context__ or error)
            Path(path).unlink(missing_ok=True)  # room for DeepSpeed's small files, which nothing guards


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
        self.began, self.terminated, self.runner = time.time(), False, None
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
                self.runner = launcher.ppid()
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

    def save(self, step):
        """After each step: a checkpoint if one is due, or if any rank was told to stop."""
        if not self.config.save_steps:
            return
        # `deepspeed` dies of a SIGTERM and hands nothing on; then its child, the parent of the ranks, has a new parent
        orphaned = self.runner is not None and psutil.Process(os.getppid()).ppid() != self.runner
        stop, = all_sum(self.terminated or orphaned)
        if step % self.config.save_steps == 0 or stop:
            self._write(step)
        if stop:
            print0(f"told to stop: {self.folder}/checkpoint-{step} is saved, --resume goes on from it")
            sys.exit(128 + signal.SIGTERM)
        if step == self.total_steps:
            for number, default in self.defaults.items():
                signal.signal(number, default)

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
                sync(temporary / name)  # fails for a file that another host wrote to a folder of its own
            shutil.rmtree(final, ignore_errors=True)  # an incomplete or an earlier run's
            temporary.rename(final)
            sync(self.folder)
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


def sync(path):
    """A file's bytes, or a folder's entries, are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# -----------------------------------------------------------------------------
# the engine

@dataclass
class Rollout:
    """What `generate` returns: B rows (prompts x num_return_sequences, prompt-major), prompt P, longest response R."""
    tokens: torch.Tensor    # (B, P + R) int64: prompts as given, left-padded; responses, right-padded with pad_token_id
    logprobs: torch.Tensor  # (B, R) float32, nats, under the distribution sampled from (greedy: at temperature 1)
    mask: torch.Tensor      # (B, R) float32: 1 on response tokens up to and including EOS, 0 after


class InferenceEngine:
    """
    Generates with the weights of `model`, a Hugging Face causal LM, as they are at each call.

    tp_group    process group whose ranks split heads and MLP columns, and generate for the union of their prompts
    compact     finished rows leave the batch when they are a quarter of it; off: they run along, unseen
    pack        on a CPU, copy the weights into oneDNN's layout for the rollout; off: aliases, slower
    keep_cache  the KV cache stays allocated between rollouts of one shape
    sync_every  steps between two looks at who is done, each of which waits for the device; None: 1 on a CPU, 8 on a GPU
    memory      after a rollout: bytes of its {"weights aliased", "weights copied", "kv cache"}
    row_steps   after a rollout: rows decoded, summed over its steps
    """

    def __init__(self, model, tp_group=None, compact=True, pack=True, keep_cache=False, sync_every=None):
        self.model, self.tp_group, self.compact, self.pack, self.keep_cache = model, tp_group, compact, pack, keep_cache
        self.sync_every = sync_every
        self.cache, self.memory, self.row_steps = None, {}, 0
        self.unsupported = why_unsupported(model)
        if self.unsupported:
            warnings.warn(f"{type(model).__name__} generates through Hugging Face generate(), several times slower and "
                          f"without tensor parallelism: {self.unsupported}")

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_new_tokens=64, temperature=1.0, top_k=0, top_p=1.0,
                 eos_token_id=None, pad_token_id=0, seed=0, num_return_sequences=1):
        """
        input_ids, attention_mask  (B, P) int64, left-padded; the ids on padding never matter
        eos_token_id               int, list, or None: every response has max_new_tokens. EOS in a prompt does not count
        returns                    Rollout of B * num_return_sequences rows, prompt-major
        raises                     ValueError for other padding, or more tokens than the model has positions;
                                   FloatingPointError for logits that are no numbers

        The ranks of a tp_group call this together, each with its own prompts (any B and P), the other arguments equal
        (rank 0's seed holds), and each gets its own rows back.
        """
        eos = torch.tensor([] if eos_token_id is None else eos_token_id, device=input_ids.device).long().view(-1)
        sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        respond = self._hf_respond if self.unsupported else self._respond
        responses, logprobs = respond(input_ids, attention_mask.long(), max_new_tokens, sampling, eos, pad_token_id,
                                      seed, num_return_sequences)
        # 5. pack: a row stopped at its first EOS; its response is all up to there, whatever the ids (pad may be EOS)
        ended = torch.isin(responses, eos).long()
        mask = ended.cumsum(1) - ended == 0
        R = int(mask.sum(1).max())
        if (logprobs.isnan() & mask).any():
            raise FloatingPointError("the logits are no numbers (NaN): the model's weights or activations have "
                                     "overflowed")
        prompts, mask = input_ids.repeat_interleave(num_return_sequences, 0), mask[:, :R]
        responses = responses[:, :R].masked_fill(~mask, pad_token_id)
        return Rollout(torch.cat([prompts, responses], 1), logprobs[:, :R] * mask, mask.float())

    def _respond(self, ids, mask, max_new_tokens, sampling, eos, pad_token_id, seed, copies):
        """(B * copies, max_new_tokens) tokens and log-probabilities; what follows a row's first EOS is undefined."""
        first, count = 0, len(ids)  # the caller's prompts within the union
        if self.tp_group:
            ids, mask, first = self._union(ids, mask)
        start, device, P, rows = self._starts(mask, max_new_tokens), ids.device, ids.size(1), len(ids) * copies
        responses = torch.full((rows, max_new_tokens), pad_token_id, device=device)
        logprobs = torch.zeros(rows, max_new_tokens, device=device)
        # a draw for every row and step, whether or not the row is still in flight: compaction cannot change a sample
        uniforms = torch.rand(max_new_tokens, rows, generator=torch.Generator(device).manual_seed(seed), device=device)
        live, done = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
        # of the next token to go in: its place in the row's text, and its place in the cache
        positions, column = (P - start).repeat_interleave(copies), torch.tensor(P, device=device)
        sync_every = self.sync_every or (8 if ids.is_cuda else 1)
        self.row_steps = 0

        with self._rollout_memory(rows, P + max_new_tokens) as (decoder, cache), torch.inference_mode():
            # 1. prefill: every prompt once, whatever the number of its copies
            logits = decoder.prefill(ids.masked_fill(mask == 0, 0), start, cache, copies)
            for step in range(max_new_tokens):
                # 2. sample; rank 0 of a tp_group for all, so that neither seeds nor rounding can part its ranks
                tokens, logps = sample(logits, uniforms[step, live], **sampling)
                if self.tp_group:
                    dist.broadcast(tokens, group=self.tp_group, group_src=0)
                    dist.broadcast(logps, group=self.tp_group, group_src=0)
                responses[live, step], logprobs[live, step] = tokens, logps
                if step + 1 == max_new_tokens:
                    break
                # 3. stop, or let finished rows leave
                done |= torch.isin(tokens, eos)
                if len(eos) and (step + 1) % sync_every == 0:
                    unfinished = (~done).nonzero().squeeze(1)
                    if len(unfinished) == 0:
                        break
                    if self.compact and len(unfinished) <= 0.75 * len(live):
                        cache.keep(unfinished, P + step)
                        decoder.keep(unfinished)
                        live, done, tokens, positions = (x[unfinished] for x in (live, done, tokens, positions))
                # 4. decode: the sampled token goes in, the logits of the next come out
                logits = decoder.step(tokens, positions, column, cache)
                positions += 1
                column += 1
                self.row_steps += len(live)
        own = slice(first * copies, (first + count) * copies)
        return responses[own], logprobs[own]

    def _union(self, ids, mask):
        """Prompts and mask of all ranks of the tp_group in rank order, left-padded to the longest; our first row."""
        shape = torch.tensor(ids.shape, device=ids.device)
        shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size(self.tp_group))]
        dist.all_gather(shapes, shape, group=self.tp_group)
        counts, widths = torch.stack(shapes).T.tolist()
        both = torch.stack([ids, mask])  # (2, B, P): one gather, so that ids and mask cannot part
        both = F.pad(both, (max(widths) - ids.size(1), 0, 0, max(counts) - len(ids)))
        gathered = [torch.empty_like(both) for _ in counts]
        dist.all_gather(gathered, both, group=self.tp_group)
        ids, mask = torch.cat([part[:, :count] for part, count in zip(gathered, counts)], 1)
        return ids, mask, sum(counts[:dist.get_rank(self.tp_group)])

    def _starts(self, mask, max_new_tokens):
        """(B,) the column of each prompt's first token."""
        lengths = mask.sum(1)
        start = mask.size(1) - lengths
        if lengths.min() < 1 or (mask.diff(dim=1) < 0).any():
            raise ValueError("expected left-padded prompts of at least one token, attention_mask rows 0 .. 0 1 .. 1: "
                             "set tokenizer.padding_side = 'left'")
        config = self.model.config
        if FAMILIES[config.model_type].wpe and lengths.max() + max_new_tokens > config.max_position_embeddings:
            raise ValueError(f"a prompt of {int(lengths.max())} tokens and max_new_tokens={max_new_tokens} pass the "
                             f"model's {config.max_position_embeddings} positions: shorten one of them")
        return start

    @contextmanager
    def _rollout_memory(self, rows, length):
        """Weights and KV cache of one rollout: there inside the `with`, gone after it, whatever happened."""
        try:
            decoder = Decoder(self.model, self.pack, self.tp_group)
            shape = (len(decoder.layers), 2, rows, decoder.kv_heads, length, decoder.head_dim)
            if self.cache is None or self.cache.data.shape != shape:
                self.cache = None  # the old one goes before the new one comes
                self.cache = KVCache(shape[0], *shape[2:], decoder.embed.dtype, decoder.embed.device)
            self.cache.use(rows)
            trained = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
            self.memory = {"weights aliased": 0, "weights copied": 0, "kv cache": self.cache.data.nbytes}
            for t in decoder.held:
                alias = not t.is_mkldnn and t.untyped_storage().data_ptr() in trained
                self.memory["weights aliased" if alias else "weights copied"] += t.numel() * t.element_size()
            yield decoder, self.cache
        finally:
            if not self.keep_cache:
                self.cache = None

    def _hf_respond(self, ids, mask, max_new_tokens, sampling, eos, pad_token_id, seed, copies):
        """The same through Hugging Face `generate`, for a model that the decoder cannot run."""
        training, greedy = self.model.training, sampling["temperature"] == 0
        defaults, self.model.generation_config = self.model.generation_config, transformers.GenerationConfig()
        options = dict(do_sample=False) if greedy else dict(do_sample=True, num_return_sequences=copies, **sampling)
        sharded = any(hasattr(p, "ds_id") for p in self.model.parameters())  # ZeRO 3: all ranks gather, or none
        try:
            self.model.eval()
            with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
                torch.manual_seed(seed)
                out = self.model.generate(
                    ids, attention_mask=mask, max_new_tokens=max_new_tokens, eos_token_id=eos.tolist() or None,
                    pad_token_id=pad_token_id, **options, return_dict_in_generate=True, output_logits=greedy,
                    output_scores=not greedy, synced_gpus=sharded)
        finally:
            self.model.generation_config = defaults
            self.model.train(training)
        responses = out.sequences[:, ids.size(1):]
        steps = zip(out.logits if greedy else out.scores, responses.T)  # scores: after temperature, top-k, top-p
        logprobs = torch.stack([token_logprobs(logits, tokens) for logits, tokens in steps], 1)
        if greedy:
            responses, logprobs = responses.repeat_interleave(copies, 0), logprobs.repeat_interleave(copies, 0)
        # after its end a row holds padding, of any probability
        return responses, logprobs.masked_fill(logprobs == -float("inf"), 0.0)


# -----------------------------------------------------------------------------
# what a trained model says

def sample_answers(model, tokenizer, records, config, batch_size=64):
    """
    Has a language model answer held-out prompts and prints three of them -> mean over all ranks of the task's exact
    marks. A task without marks: three prompts are enough, and None comes back. Prompts over --max_prompt_seq_len are
    left out. Collective.
    """
    scorer, rank = gold_scorer(config), dist.get_rank()
    records = records if scorer else records[:3]
    ids = encode_prompts(tokenizer, [record.prompt for record in records])[1]
    items = [{"input_ids": row, "record": record} for row, record in zip(ids, records)
             if len(row) <= config.max_prompt_seq_len]
    items = rank_share(items, rank, dist.get_world_size())
    engine, collate, answered = InferenceEngine(model), Collator(3, tokenizer.pad_token_id), []
    for start in range(0, len(items), batch_size):
        batch = to_device(collate(items[start:start + batch_size]))
        rollout = engine.generate(batch["input_ids"], batch["attention_mask"], config.max_answer_seq_len,
                                  seed=config.seed + rank, eos_token_id=model.generation_config.eos_token_id,
                                  pad_token_id=tokenizer.pad_token_id)
        answered += zip(batch["records"], decode_answers(tokenizer, rollout))
    print_answers(answered)
    return mean([scorer(record, answer) for record, answer in answered]) if scorer else None


def print_answers(answered):
    print0(*(f"\n  {record.prompt[-1]['content'][-300:]}\n  -> {answer}" for record, answer in answered[:3]), sep="\n")
