"""
--dry_run: will a stage fit, how long will it take, what will it cost? Said before a weight or a row
is read. support/plan.py has the arithmetic.

    bash run_all.sh opt-13b 1node --dry_run               # all three stages, on 8 a100-80
    bash run_all.sh opt-13b 1node --dry_run 16 --device h100
    python step3_ppo.py --actor_model_name_or_path facebook/opt-13b \
        --critic_model_name_or_path facebook/opt-350m --zero_stage 3 --dry_run 8
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from data import load_records
from support.flags import UsageError
from support.metrics import ranks_of_a_decoder
from support.plan import (Need, Work, attention_shape, epoch_hours, memory_plan, parameter_count,
                          planned_models, trained_count, training_flops)
from support.processes import compute_dtype, deepspeed_settings

GB = 2**30
STAGE_NUMBERS = {"sft": 1, "reward": 2, "dpo": 2, "ppo": 3}
DEVICES_OF_A_HOST = 8
# Rows of an epoch where the data are not here, and no flag says how long the run is.
ROWS_SAY = 100_000


# -----------------------------------------------------------------------------
# devices

@dataclass
class Device:
    name: str
    memory: float  # GB (2^30 bytes)
    tflops: float  # TFLOP/s that training sustains, of those that training_flops counts
    price: float   # dollars an hour


# Memory: NVIDIA's data sheets, less what the driver keeps. TFLOP/s: an A100 sustains 43 to 82 in
# DeepSpeed-Chat's figure 6 (blogs/deepspeed-chat, April 2023), an A6000 0.3 of that by its tables 1
# and 3 (6.7B: 5.6 days against 1.7); an H100 is taken for twice an A100, and an RTX 4090 for its
# share of an A100's peak (165 of 312 TFLOP/s in 16 bits by the data sheets). Dollars: on-demand
# list prices of 2026, rounded; they differ by a factor of three between providers.
DEVICES = {device.name: device for device in (
    Device("a100-40", 39.4, 50, 1.3),
    Device("a100-80", 79.1, 50, 2.0),
    Device("h100", 79.1, 100, 3.0),
    Device("h200", 139.8, 100, 4.0),
    Device("a6000", 47.4, 15, 0.8),
    Device("rtx4090", 23.5, 25, 0.7))}


def planned_device(config, cpu):
    """--device, or else what is here: this host for processes on its CPU, its GPU, an a100-80."""
    if config.device:
        return DEVICES[config.device]
    if cpu:
        # 0.1 TFLOP/s in float32 is a core's with AVX2.
        return Device("this host", host_memory(), 0.1 * (os.cpu_count() or 1), 0.0)
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GB
        name = torch.cuda.get_device_name(0)
        for known in DEVICES.values():
            model = known.name.partition("-")[0].removeprefix("rtx")
            if model in name.lower() and abs(known.memory - memory) < 4:
                return Device(name, memory, known.tflops, known.price)
        return Device(name, memory, DEVICES["a100-80"].tflops, DEVICES["a100-80"].price)
    return DEVICES["a100-80"]


def host_memory():
    """GB of this host, or of the container that this process is in."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    return memory / GB


# -----------------------------------------------------------------------------
# the plan of a stage, and whether it fits

@dataclass
class StagePlan:
    """A stage ("sft", "reward", "dpo" or "ppo") with these flags on so many devices."""
    config: object
    stage: str
    devices: int
    device: Device
    models: dict    # name -> model without weights
    ds_config: dict
    work: Work
    parts: dict     # name -> {part: bytes}
    moments: dict   # name -> Need

    @property
    def peak(self):
        """Bytes on a device at the worst moment, with what the plan does not count."""
        # CUDA, NCCL and Python keep about 1 GB, and 3% are lost between the allocator's blocks.
        return 1.03 * max(need.device for need in self.moments.values()) + GB

    @property
    def worst(self):
        return max(self.moments, key=lambda moment: self.moments[moment].device)

    @property
    def host(self):
        """Bytes on a host at its worst moment, beside its devices."""
        processes = min(self.devices, DEVICES_OF_A_HOST)
        return max(processes * need.host + need.first for need in self.moments.values())

    @property
    def fits(self):
        return self.peak <= self.device.memory * GB


def plan_stage(config, stage, devices, cpu, models=None):
    """
    -> StagePlan. Reads the models' configs and no weights. Raises UsageError without a config.

    models  planned_models of that config, where they are at hand
    """
    device = planned_device(config, cpu)
    ds_config = deepspeed_settings(config)
    if models is None:
        models = planned_models(config, stage)
    work = planned_work(config, stage, devices, cpu, models, ds_config)
    parts, moments = memory_plan(models, ds_config, devices, work)
    if cpu:
        # The devices are processes, which share the host's memory.
        device = dataclasses.replace(device, memory=device.memory / devices)
        for name, need in moments.items():
            moments[name] = Need(need.device + need.host + need.first)
    return StagePlan(config, stage, devices, device, models, ds_config, work, parts, moments)


def planned_work(config, stage, devices, cpu, models, ds_config):
    """-> Work of a stage with these flags."""
    work = Work(rows=config.per_device_train_batch_size, tokens=config.max_seq_len,
                scored=config.max_seq_len, checkpointing=config.gradient_checkpointing, cpu=cpu)
    answer = config.max_answer_seq_len
    if stage == "ppo":
        work.tokens = config.max_prompt_seq_len + answer
        work.scored = answer
        work.generated = config.rollout_rows
        work.tp = config.inference_tp_size
        check_sharing(work.tp, devices, models["actor"].config)
        work.ema = config.enable_ema
        if config.unsupervised_data_path:
            work.text = config.max_seq_len
        return work
    if stage in ("reward", "dpo"):
        work.tokens *= 2  # a pair
        work.scored = work.tokens if stage == "dpo" else 0
    if stage in ("sft", "dpo"):
        # support.metrics.sample_answers
        marked = config.data_path == ["toy"]
        work.sampled = 64 if marked else math.ceil(3 / devices)
        work.answered = config.max_prompt_seq_len + answer
        if ds_config["zero_optimization"]["stage"] == 3:
            heads, kv_heads, _ = attention_shape(next(iter(models.values())).config)
            on_a_host = min(devices, DEVICES_OF_A_HOST)
            work.tp = ranks_of_a_decoder(on_a_host, devices, heads, kv_heads)
    return work


def check_sharing(tp, devices, hf_config):
    """Raises UsageError for an --inference_tp_size that devices or heads cannot be cut into."""
    heads, kv_heads, _ = attention_shape(hf_config)
    fit = heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)
    if devices % tp or not fit:
        raise UsageError(
            f"--inference_tp_size {tp}: {devices} device(s), {heads} heads and {kv_heads} key-value"
            f" heads cannot be shared so; {ranks_of_a_decoder(devices, devices, heads, kv_heads)} "
            "can.")


# -----------------------------------------------------------------------------
# what would fit

def what_fits(plan):
    """
    A plan that does not fit -> words for what does: as few flags as do it, tried in the order of
    what they cost, then the same on more devices.
    """
    counts = [plan.devices]
    if not plan.work.cpu:
        counts += [count for count in (8, 16, 32, 64) if count > plan.devices]
    for devices in counts:
        chosen = []
        for change in [{}, *changes(plan, devices)]:
            chosen.append(change)
            if trial(plan, chosen, devices):
                break
        else:
            continue
        # Without what was not needed after all, the costliest first.
        for change in chosen[::-1]:
            fewer = [other for other in chosen if other is not change]
            if trial(plan, fewer, devices):
                chosen = fewer
        flags = " ".join(words_of(change) for change in chosen if change)
        words = [f"{devices} devices"] if devices > plan.devices else []
        words += [flags] if flags else []
        return " with ".join(words) + f" ({trial(plan, chosen, devices).peak / GB:.1f} GB)"
    return "a smaller model, or devices with more memory (--device)"


def changes(plan, devices):
    """Changes of flags that save memory, those first that cost least."""
    config = plan.config
    minibatch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    found = [dict(gradient_checkpointing=True),
             dict(per_device_train_batch_size=1, gradient_accumulation_steps=minibatch)]
    if devices > 1:
        found.append(dict(zero_stage=3))
    if plan.stage == "ppo":
        heads, kv_heads, _ = attention_shape(plan.models["actor"].config)
        tp = ranks_of_a_decoder(min(devices, DEVICES_OF_A_HOST), devices, heads, kv_heads)
        if tp > 1:
            found.append(dict(inference_tp_size=tp))
        rollout = max(1, 8 // config.num_generations)
        found.append(dict(per_device_generation_batch_size=rollout, per_device_train_batch_size=1,
                          gradient_accumulation_steps=rollout * config.num_generations))
    if not config.lora_dim:
        found.append(dict(lora_dim=128, lora_alpha=1.0, only_optimize_lora=True))
    return found


def trial(plan, chosen, devices):
    """The plan with those changes where it fits, or None."""
    changed = {}
    for change in chosen:
        changed |= change
    try:
        config = dataclasses.replace(plan.config, **changed)
        models = None if "lora_dim" in changed else plan.models
        other = plan_stage(config, plan.stage, devices, plan.work.cpu, models)
    except UsageError:  # flags that do not go together
        return None
    return other if other.fits else None


def words_of(change):
    """{flag: value} -> the words of a command line."""
    words = []
    for name, value in change.items():
        words.append(f"--{name}" if value is True else f"--{name} {value:g}")
    return " ".join(words)


# -----------------------------------------------------------------------------
# time and cost

def planned_rows(plan, count=None):
    """
    -> training rows of the run, and where that number is from.

    count  the stage's rows, where they have been read
    """
    config = plan.config
    if config.max_steps > 0:
        rows_a_step = plan.work.generated or (
            config.per_device_train_batch_size * config.gradient_accumulation_steps)
        return config.max_steps * plan.devices * rows_a_step, f"rows of {config.max_steps} steps"
    rows = ROWS_SAY
    source = "rows, say: the data are not here (--max_steps plans your run)"
    if count is not None:
        rows, source = count, "rows of the data"
    elif all(path == "toy" or Path(path.partition(":")[0]).exists() for path in config.data_path):
        rows = len(load_records(config, STAGE_NUMBERS[plan.stage], log=lambda sentence: None)[0])
        source = "rows of the data"
    # A prompt is answered several times in a rollout.
    answers = config.num_generations if plan.stage == "ppo" else 1
    return rows * config.num_train_epochs * answers, source


def planned_cost(plan, count=None):
    """-> hours, dollars, and words on what they are of; count: see planned_rows."""
    config = plan.config
    work = plan.work
    epochs = config.ppo_epochs if plan.stage == "ppo" else 1
    flops = training_flops(plan.models, work.tokens, work.generated, work.checkpointing, epochs,
                           work.text)
    rows, source = planned_rows(plan, count)
    hours = epoch_hours(flops, rows, plan.devices, plan.device.tflops)
    dollars = hours * plan.devices * plan.device.price
    return hours, dollars, f"{rows:,} {source}; {flops / 1e12:.2f} TFLOP a row"


# -----------------------------------------------------------------------------
# what is said

def dry_run(config, stage):
    """Rank 0 says what a stage needs ("sft", "reward", "dpo" or "ppo"), here or on --dry_run N."""
    if os.environ.get("RANK", "0") != "0":
        return
    cpu = config.dry_run < 0 and get_accelerator().device_name() == "cpu" and not config.device
    devices = config.dry_run if config.dry_run > 0 else int(os.environ.get("WORLD_SIZE", 1))
    plan = plan_stage(config, stage, devices, cpu)
    print_plan(plan)
    print_cost(plan)


def print_plan(plan):
    """The models, the moments, and the verdict."""
    work = plan.work
    settings = [str(compute_dtype(plan.ds_config)).removeprefix("torch."),
                f"ZeRO {plan.ds_config['zero_optimization']['stage']}"]
    if plan.config.lora_dim:
        settings.append(f"LoRA {plan.config.lora_dim}")
    if work.checkpointing:
        settings.append("checkpointing")
    if work.tp > 1:
        settings.append(f"{work.tp} share a decoder")
    settings.append(f"micro-batches of {work.rows} x {work.tokens} tokens")
    if work.generated:
        settings.append(f"rollouts of {work.generated}")
    print(f"\nmemory plan, GB on each of {plan.devices} device(s): {', '.join(settings)}")
    print_parts(plan)
    moments = ", ".join(f"{name} {need.device / GB:.1f}" for name, need in plan.moments.items())
    print(f"\nmoments   {moments}")
    if not work.cpu:
        print(f"host      {plan.host / GB:.1f} GB at most, of its "
              f"{min(plan.devices, DEVICES_OF_A_HOST)} device(s)")
    print(f"verdict   {verdict(plan)}")


def verdict(plan):
    """One sentence: it fits, or it does not and what does."""
    peak = (f"{plan.peak / GB:.1f} GB at the moment '{plan.worst}', and {plan.device.name} has "
            f"{plan.device.memory:.1f} GB")
    if plan.fits:
        return f"fits: {peak}"
    return f"does not fit: {peak}; what does: {what_fits(plan)}"


def print_parts(plan):
    """A table of models."""
    parts = []
    for memory in plan.parts.values():
        parts += [part for part in memory if part not in parts]
    widths = {part: max(len(part), 7) for part in parts}
    header = "  ".join(f"{part:>{widths[part]}}" for part in parts)
    print(f"\n{'':<10}{'parameters':>11}{'trained':>9}  {header}")
    for name, memory in plan.parts.items():
        count = parameter_count(plan.models[name]) / 1e6
        trained = trained_count(plan.models[name]) / 1e6
        sizes = [f"{memory.get(part, 0) / GB:>{widths[part]}.2f}" for part in parts]
        print(f"{name:<10}{count:>10.0f}M{trained:>8.0f}M  {'  '.join(sizes)}")


def print_cost(plan):
    """-> hours, dollars, printed."""
    hours, dollars, words = planned_cost(plan)
    print(f"time      {hours:.2f} h for {words}, {plan.device.tflops:g} TFLOP/s a device; "
          f"${dollars:,.2f} at ${plan.device.price:g} a device-hour")
    return hours, dollars
