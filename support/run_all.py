"""
What run_all.sh needs Python for:

    python -m support.run_all check 1gpu step1_sft FLAGS -- step2_reward FLAGS -- step3_ppo FLAGS
    python -m support.run_all table output/summary.json
"""

import importlib
import json
import os
import sys
from pathlib import Path

from data import load_records, load_tokenizer, rows_of_step
from support.checkpoints import refuse_to_overwrite
from support.flags import UsageError, exit_on_usage_error, parse_config
from support.models import check_positions, read_config
from support.processes import deepspeed_settings
from support.sources import read_source, read_text


SECTIONS = {"step1_sft": "sft", "step2_reward": "reward", "step3_ppo": "ppo"}


def check_hardware(hardware):
    """Raises UsageError where GPUs are asked for and DeepSpeed finds none."""
    from deepspeed.accelerator import get_accelerator

    chosen_by_user = "DS_ACCELERATOR" in os.environ
    has_none = get_accelerator().device_name() == "cpu"
    if hardware in ("1gpu", "1node") and has_none and not chosen_by_user:
        raise UsageError(
            f"HARDWARE {hardware}: DeepSpeed finds no GPU on this machine. `cpu` runs here; a GPU "
            "needs a build of torch with CUDA (python -c 'import torch; "
            "print(torch.cuda.is_available())' prints True), and --dry_run needs none.")


def check(hardware, words):
    """
    The hardware, every stage's flags, DeepSpeed JSON and models, what its folder holds, and whether
    the data are enough for one of its steps, so that what stops the last stage does not show after
    the hours of the first.
    """
    sys.argv[0] = "run_all.sh"
    with exit_on_usage_error():
        if not any(word.startswith("--dry_run") for word in words):
            check_hardware(hardware)

    stages = [[]]
    for word in words:
        if word == "--":
            stages.append([])
        else:
            stages[-1].append(word)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    base = ""
    for number, (name, *flags) in enumerate(stages, 1):
        sys.argv[0] = f"{name}.py"  # the errors speak of that script
        stage = importlib.import_module(name)
        with exit_on_usage_error():
            config = parse_config(stage.Config, "", flags)
            section = "dpo" if getattr(config, "dpo", False) else SECTIONS[name]
            deepspeed_settings(config)
            refuse_to_overwrite(config, section)
            if name == "step1_sft":
                base = config.model_name_or_path
            if not config.dry_run:
                check_models(config, base)
            train, _ = load_records(config, number, log=lambda sentence: None)
            rows_of_step(len(train), config, number, processes)
            if number == 3:
                check_text_and_sharing(config, hardware)


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


def check_text_and_sharing(config, hardware):
    """Raises UsageError for stage 3's own text, or for sharing weights with no other process."""
    tp = config.inference_tp_size
    if hardware in ("cpu", "1gpu") and tp != 1:
        raise UsageError(f"--inference_tp_size {tp}: {hardware} runs one process, which has all of "
                         "the weights; leave the flag out.")
    for source in config.unsupervised_data_path:
        if source.removesuffix(".gz").endswith(".txt"):
            read_text(source)
        else:
            read_source(source)


def table(path):
    """The headline numbers of a run."""
    with open(path) as file:
        summary = json.load(file)
    about = f"{summary['model']} on {summary['hardware']}, seed {summary['seed']}"
    print(f"\n{'stage':<8}{'seconds':>9}   held-out result        ({about})")
    shown = {"sft": ("perplexity", "gold"), "reward": ("accuracy",), "ppo": ("score", "kl", "gold")}
    for stage, names in shown.items():
        results = [f"{name} {summary[stage][name]:.3f}" for name in names if name in summary[stage]]
        print(f"{stage:<8}{summary[stage]['seconds']:>9.0f}   {'   '.join(results)}")
    print(f"{'all':<8}{summary['seconds']:>9.0f}   (in the stages; launching and importing come on "
          "top)")


if __name__ == "__main__":
    if sys.argv[1] == "check":
        check(sys.argv[2], sys.argv[3:])
    else:
        table(sys.argv[2])
