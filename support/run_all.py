"""
What run_all.sh needs Python for:

    python -m support.run_all check 1gpu step1_sft FLAGS -- step2_reward FLAGS -- step3_ppo FLAGS
    python -m support.run_all plan 1gpu step1_sft FLAGS -- step2_reward FLAGS -- step3_ppo FLAGS

`check` prints the planned work of each stage, in hours of a device, and says the rest on standard
error.
"""

import dataclasses
import importlib
import os
import re
import sys
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from data import load_tokenizer, prepare_beforehand
from support.checkpoints import refuse_to_overwrite
from support.dry_run import (GB, host_memory, plan_stage, planned_cost, print_cost, print_plan,
                             verdict)
from support.flags import UsageError, exit_on_usage_error, parse_config
from support.models import check_positions, read_config
from support.plan import planned_models
from support.processes import deepspeed_settings


SECTIONS = {"step1_sft": "sft", "step2_reward": "reward", "step3_ppo": "ppo"}


def check_hardware(hardware):
    """Raises UsageError where GPUs are asked for and DeepSpeed finds none."""
    chosen_by_user = "DS_ACCELERATOR" in os.environ
    has_none = get_accelerator().device_name() == "cpu"
    if hardware in ("1gpu", "1node") and has_none and not chosen_by_user:
        raise UsageError(
            f"HARDWARE {hardware}: DeepSpeed finds no GPU on this machine. `cpu` runs here; a GPU "
            "needs a build of torch with CUDA (python -c 'import torch; "
            "print(torch.cuda.is_available())' prints True), and --dry_run needs none.")


def stages_of(words):
    """run_all.sh's words -> (script's name, its config, its section of summary.json) of each."""
    stages = [[]]
    for word in words:
        if word == "--":
            stages.append([])
        else:
            stages[-1].append(word)
    for name, *flags in stages:
        sys.argv[0] = f"{name}.py"  # the errors speak of that script
        stage = importlib.import_module(name)
        with exit_on_usage_error():
            config = parse_config(stage.Config, "", flags)
        yield name, config, "dpo" if getattr(config, "dpo", False) else SECTIONS[name]


def check(hardware, words):
    """
    The hardware, every stage's flags, DeepSpeed JSON and models, what its folder holds, whether the
    data are enough for one of its steps, and whether the memory is, so that what stops the last
    stage does not show after the hours of the first. The data are then in the cache.
    """
    sys.argv[0] = "run_all.sh"
    with exit_on_usage_error():
        check_hardware(hardware)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    stages = []
    rows = []
    base = ""
    for number, (name, config, section) in enumerate(stages_of(words), 1):
        stages.append((name, config, section))
        with exit_on_usage_error():
            deepspeed_settings(config)
            refuse_to_overwrite(config, section)
            if name == "step1_sft":
                base = config.model_name_or_path
            check_models(config, base)
            if number == 3:
                check_sharing_of_weights(config, hardware)
            # A stage saves the tokenizer of its own start with its model, so the model that is not
            # there yet will have the first one's.
            start = getattr(config, "model_name_or_path", "") or getattr(
                config, "actor_model_name_or_path", "")
            if not start or Path(config.output_dir) in Path(start).parents:
                start = base
            tokenizer = load_tokenizer(start, config.chat_template)
            rows.append(prepare_beforehand(config, number, tokenizer, processes))
    sys.argv[0] = "run_all.sh"
    with exit_on_usage_error():
        sections = [section for _, _, section in stages]
        if "dpo" in sections and "ppo" in sections:
            raise UsageError("--dpo makes the actor itself, and step 3 would then have no reward "
                             "model. Start the stages by themselves: step1_sft.py, then "
                             "step2_reward.py --dpo.")
        print(*check_memory(hardware, stages, rows))


def check_memory(hardware, stages, rows):
    """
    -> the planned work of each stage, in hours of a device; nothing where a stage has no plan.
    Raises UsageError where the plan of a stage does not fit this machine.

    rows  training rows of each
    """
    cpu = get_accelerator().device_name() == "cpu"
    devices = 1 if cpu and hardware == "1node" else devices_of(hardware)
    peaks = []
    hours = []
    for (name, config, section), count in zip(with_models_of_the_start(stages), rows):
        try:
            models = planned_models(config, section)
        except UsageError as error:  # a mixture of experts
            print(f"run_all.sh: no memory plan of {name} ({error})", file=sys.stderr)
            continue
        plan = plan_stage(config, section, devices, cpu, models)
        way_out = (f"To run it all the same, start the stages by themselves (deepspeed {name}.py"
                   " ...), where no plan is held against the memory.")
        if not plan.fits:
            raise UsageError(f"{name} {verdict(plan)}. {way_out}")
        if not plan.work.cpu and plan.host > host_memory() * GB:
            raise UsageError(f"{name} does not fit: {plan.host / GB:.1f} GB of this host's memory "
                             f"are needed, and it has {host_memory():.1f}. {way_out}")
        peaks.append(f"{name} {plan.peak / GB:.1f}")
        hours.append(planned_cost(plan, count)[0])
    if peaks:
        print(f"run_all.sh: memory plan: {', '.join(peaks)} of the {plan.device.memory:.1f} GB of "
              f"{plan.device.name}", file=sys.stderr)
    return hours if len(hours) == len(stages) else []


def plan_all(hardware, words):
    """
    --dry_run of run_all.sh: every stage's memory, verdict and cost, and what they cost together.
    Nothing is asked of a hub, unless the model is not one of the presets. Exit code 2 where a stage
    does not fit.
    """
    stages = list(stages_of(words))
    hours = dollars = 0.0
    refused = []
    for name, config, section in with_models_of_the_start(stages):
        sys.argv[0] = f"{name}.py"
        print(f"\n=== {name}")
        with exit_on_usage_error():
            cpu = hardware == "cpu" and not config.device
            plan = plan_stage(config, section, devices_of(hardware, config.dry_run), cpu)
            print_plan(plan)
            stage_hours, stage_dollars = print_cost(plan)
        hours += stage_hours
        dollars += stage_dollars
        if not plan.fits:
            refused.append(name)
    print(f"\nall three stages: {hours:.2f} h, ${dollars:,.2f}")
    if refused:
        print(f"run_all.sh would refuse this: {', '.join(refused)} would not fit")
        sys.exit(2)


def devices_of(hardware, asked=-1):
    """Devices of a kind of hardware: as many as were asked for, or are here, or are usual."""
    if asked > 0:
        return asked
    if hardware in ("cpu", "1gpu"):
        return 1
    if hardware == "1node":
        return torch.cuda.device_count() or 8
    hostfile = Path(os.environ.get("HOSTFILE", "/job/hostfile"))
    if hostfile.exists():
        slots = re.findall(r"^[^#\n]*slots=(\d+)", hostfile.read_text(), re.MULTILINE)
        return sum(map(int, slots)) or 1
    return 64


def with_models_of_the_start(stages):
    """
    The stages with the models that are there before the first of them, whose shape those have that
    it and the second will write.
    """
    starts = {}
    for name, config, section in stages:
        changed = {flag: starts.get(Path(value), value) for flag, value in vars(config).items()
                   if flag.endswith("model_name_or_path") and value}
        yield name, dataclasses.replace(config, **changed), section
        written = {"step1_sft": "sft", "step2_reward": "reward"}.get(name)
        if written:
            starts[Path(config.output_dir) / written] = changed["model_name_or_path"]


def check_models(config, base):
    """
    Raises UsageError for a model that is none, has too few positions or no tokenizer, among those
    that are there before the first stage.

    base  the model of stage 1, of whose shape the stages' own are
    """
    names = [value for name, value in vars(config).items() if name.endswith("model_name_or_path")]
    for name in getattr(config, "reward_fn", []):
        if not name.rpartition(":")[0].endswith(".py"):
            names.append(name)
    tokens = config.max_seq_len
    if hasattr(config, "actor_model_name_or_path"):
        tokens = config.max_prompt_seq_len + config.max_answer_seq_len
    for name in [base, *names]:
        written_by_a_stage = Path(config.output_dir) in Path(name).parents
        if name and not written_by_a_stage:
            check_positions(name, read_config(name), tokens)
            load_tokenizer(name, config.chat_template)


def check_sharing_of_weights(config, hardware):
    """Raises UsageError for sharing weights with no other process."""
    tp = config.inference_tp_size
    if hardware in ("cpu", "1gpu") and tp != 1:
        raise UsageError(f"--inference_tp_size {tp}: {hardware} runs one process, which has all of "
                         "the weights; leave the flag out.")


if __name__ == "__main__":
    what = {"check": check, "plan": plan_all}[sys.argv[1]]
    what(sys.argv[2], sys.argv[3:])
