"""
Flags: what the commands of this project accept, and how a wrong one ends.

A flag is a field of a dataclass, `kl_coef: float = flag(0.05, "what it means", at_least=0)`: its
default, the line that --help shows and its range stand in one place. A config that exists is valid:
it is checked when it is made, by the command line or by `Config(kl_coef=0.1)` in Python.
"""

import argparse
import difflib
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser

from support.other_names import OTHER_NAMES


# -----------------------------------------------------------------------------
# errors that the user can mend

class UsageError(ValueError):
    """What the user gave cannot work. The message says what came, what is accepted, the way out."""


def first_line(error):
    """The first line of what an error says, and the next one where the first ends with a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[0].strip()
    if line.endswith(":") and len(lines) > 1:
        line = f"{line} {lines[1].strip()}"
    return line


def is_out_of_memory(error):
    """Whether Python, a GPU or torch on the CPU has no more memory to give."""
    text = str(error)
    return (isinstance(error, MemoryError) or "out of memory" in text
            or "can't allocate memory" in text)


@contextmanager
def exit_on_usage_error():
    """
    A UsageError inside ends the program: one sentence on standard error, exit code 2. So does a
    lack of memory, and a Ctrl-C, with code 130, where nothing else listens to it.
    """
    # A terminal or log file that is not UTF-8 gets \\u5927 for what it cannot write.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None where the shell has closed it
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except UsageError as error:
        # Every host prints the sentence once, because only one of them may have the fault.
        local_rank = os.environ.get("LOCAL_RANK", "0")
        if not local_rank.isdecimal() or int(local_rank) == 0:
            print(f"\n{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read the output has seen enough (`| head`), so nothing more is written to it, not
        # even by Python's own flush at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # Every process says so, because one of them may run out of memory alone.
        print(f"\n{Path(sys.argv[0]).name}: error: more memory is needed than there is "
              f"({first_line(error)[:200]}). Lower batch sizes and lengths, or add "
              "--gradient_checkpointing, --zero_stage 3 or --lora_dim 16 --only_optimize_lora; "
              "--dry_run says beforehand what a stage needs.", file=sys.stderr)
        sys.exit(2)


def check_local_path(name_or_path):
    """
    Raises UsageError for a file, and for a name that can only mean a local folder, where there is
    none. Without this check the hub would be asked for it, for a minute.
    """
    path = Path(name_or_path).expanduser()
    if "://" in name_or_path:
        raise UsageError(f"{name_or_path}: an address, and a model is named by its folder or by its"
                         " name on the hub (owner/name).")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{name_or_path}: a file, and a model is a folder in the form of Hugging "
                         "Face: config.json, weights (model.safetensors) and tokenizer together.")
    starts_as_path = name_or_path.startswith((".", "~")) or path.is_absolute()
    means_folder = starts_as_path or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())
    if path.is_dir() or not (means_folder or path.is_symlink()):
        return
    neighbours = []
    if path.parent.is_dir():
        neighbours = sorted(child.name for child in path.parent.iterdir())
    hint = f"; {path.parent} holds {', '.join(neighbours[:8])}." if neighbours else "."
    raise UsageError(f"{name_or_path}: no such folder{hint}")


# -----------------------------------------------------------------------------
# one flag, and the checks of a whole config

def flag(default, text, at_least=None, over=None, at_most=None, **options):
    """
    A field of a config.

    text                     the line that --help shows
    at_least, over, at_most  the range of a number, or of each number of a list. Infinity and NaN
                             are refused, unless at_most is infinity
    options                  more arguments for argparse's add_argument
    """
    metadata = {"help": text, "at_least": at_least, "over": over, "at_most": at_most, **options}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class CheckedConfig:
    """The base of all configs: raises UsageError when it is made with values that cannot work."""

    def __post_init__(self):
        for one_field in fields(self):
            value = getattr(self, one_field.name)
            check_blank(one_field, value)
            check_range(one_field, value)
        self.check()

    def check(self):
        """Raises UsageError for flags that do not go together. Stages add theirs."""


def check_blank(one_field, value):
    """Raises UsageError for a text without a letter, unless that is the flag's default."""
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if isinstance(entry, str) and not entry.strip() and entry != one_field.default:
            raise UsageError(f"--{one_field.name} {entry!r}: nothing is named, perhaps by a shell "
                             "variable that is not set; give a value, or leave the flag out.")


def check_range(one_field, value):
    at_least = one_field.metadata.get("at_least")
    over = one_field.metadata.get("over")
    at_most = one_field.metadata.get("at_most")
    if at_least is not None and at_most is not None:
        accepted = f"a number from {at_least} to {at_most} is needed"
    elif over is not None and at_most is not None:
        accepted = f"a number over {over} and at most {at_most} is needed"
    elif over is not None:
        accepted = f"a number over {over} is needed"
    else:
        accepted = f"at least {at_least} is needed"
    for number in value if isinstance(value, list) else [value]:
        # "not >=" and not "<", because NaN must fail too
        too_small = (at_least is not None and not number >= at_least
                     or over is not None and not number > over)
        too_large = at_most is not None and not number <= at_most
        if too_small or too_large:
            raise UsageError(f"--{one_field.name} {number}: {accepted}.")
        # An at_most of infinity lets infinity in.
        if at_most is None and isinstance(number, float) and not math.isfinite(number):
            raise UsageError(f"--{one_field.name} {number}: a finite number is needed.")


# -----------------------------------------------------------------------------
# the flags that all stages share

@dataclass
class DataConfig(CheckedConfig):
    """Flags about data, for the stages and for `python data.py`."""
    data_path: list[str] = flag(["toy"], "sources: toy, files, folders, hub names")
    sft_data_path: list[str] = flag([], "demonstrations for step 1 alone, beside --data_path")
    columns: list[str] = flag([], "names for columns of other names: prompt=question chosen=best")
    data_split: str = flag("2,4,4", "shares of the rows for SFT, reward model and PPO")
    data_weights: list[float] = flag([], "copies of each source; 0.5: every other row; default 1")
    max_eval_samples: int = flag(512, "held-out rows used for evaluation, at most", at_least=1)
    max_seq_len: int = flag(512, "tokens of prompt + answer; longer answers are cut", at_least=1)
    max_prompt_seq_len: int = flag(256, "tokens of a prompt to answer; longer: dropped", at_least=1)
    max_answer_seq_len: int = flag(256, "tokens of a generated answer", at_least=1)
    chat_template: str = flag("", "Jinja text or file; default: the model's, or Human/Assistant")
    seed: int = flag(1234, "of split, order, initial weights and sampling", at_least=0,
                     at_most=2**32 - 1)


@dataclass
class RunConfig(DataConfig):
    """Flags about training, for the three stages."""
    output_dir: str = flag("output", "the run's folder; the stage writes its model below it")
    deepspeed_config: str = flag("", "DeepSpeed JSON; default configs/1gpu.json, or cpu.json")
    zero_stage: int = flag(-1, "ZeRO stage 0-3, over the JSON's; -1: the JSON's")
    per_device_train_batch_size: int = flag(8, "rows in one forward and backward", at_least=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches in an optimizer step", at_least=1)
    weight_decay: float = flag(0.0, "of matrices; biases and norms have none", at_least=0)
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
        "constant_with_warmup", "inverse_sqrt"] = flag("cosine", "transformers' of that name")
    num_warmup_steps: int = flag(0, "optimizer steps of linear warm-up", at_least=0)
    num_train_epochs: int = flag(1, "passes over this stage's rows", at_least=1, at_most=10**9)
    max_steps: int = flag(-1, "steps, rows repeated as needed; -1: the epochs'", at_least=-1,
                          at_most=10**9)
    logging_steps: int = flag(0, "steps between the lines of a log file; 0: one every 90 s",
                              at_least=0)
    eval_steps: int = flag(0, "steps between evaluations; 0: at the end only", at_least=0)
    save_steps: int = flag(0, "steps between checkpoints; 0: one when told to stop", at_least=0)
    save_total_limit: int = flag(2, "checkpoints kept, the newest", at_least=1)
    resume: bool = flag(False, "go on from the newest complete checkpoint, if not finished")
    overwrite_output_dir: bool = flag(False, "replace an earlier run's finished models")
    verbose: bool = flag(False, "DeepSpeed's and transformers' own messages too, and warnings")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass")
    lora_dim: int = flag(0, "rank of LoRA adapters; 0: train the weights", at_least=0)
    lora_alpha: float = flag(0.0, "adapters are scaled by alpha / dim; 0: alpha = 2 dim",
                             at_least=0)
    lora_module_name: str = flag("", "part of the names of layers to adapt; default: all in blocks")
    only_optimize_lora: bool = flag(False, "freeze everything but the adapters")
    dry_run: int = flag(0, "print memory, time and cost, then exit; `--dry_run 8`: on 8 GPUs",
                        at_least=-1, nargs="?", const=-1)
    device: Literal["", "a100-40", "a100-80", "h100", "h200", "a6000", "rtx4090"] = flag(
        "", "of --dry_run: plan for that device; default: the one here, or a100-80")

    def check(self):
        super().check()
        if self.max_steps == 0:
            raise UsageError("--max_steps 0: a number of 1 or more is needed.")
        if self.only_optimize_lora and self.lora_dim == 0:
            raise UsageError("--only_optimize_lora needs --lora_dim 1 or more, the adapters' rank.")
        for name in ("lora_module_name", "lora_alpha"):
            if getattr(self, name) and self.lora_dim == 0:
                raise UsageError(f"--{name} {getattr(self, name)} is of adapters, and without "
                                 "--lora_dim there are none; give --lora_dim 16, say.")


def default_model_paths(config):
    """
    Fills in the models that a stage starts from, unless a flag says them: the models that the stage
    before wrote below the same --output_dir. Raises UsageError where there are none yet.
    """
    for name, value in vars(config).items():
        if not name.endswith("model_name_or_path") or value:
            continue
        is_critic = name.startswith("critic")
        folder = Path(config.output_dir) / ("reward" if is_critic else "sft")
        if folder.exists():
            setattr(config, name, str(folder))
        elif is_critic and config.reward_fn:
            pass  # the critic then starts from the actor's model
        else:
            raise UsageError(
                f"--{name} {folder}: there is no such folder yet; the stage before this one writes "
                "it (bash run_all.sh runs all three). Or name another model.")


# -----------------------------------------------------------------------------
# the command line

class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, one spelling of each flag, its default and choices behind."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=42, width=100)

    def _format_action_invocation(self, action):
        # HfArgumentParser also accepts --like-this and --flag True, which are not shown.
        if action.nargs == "?":
            return action.option_strings[0]
        return action.option_strings[0] + (" X ..." if action.nargs in ("+", "*") else " X")

    def _get_help_string(self, action):
        text = action.help
        if action.choices:
            text += f": {', '.join(action.choices)}"
        if action.default or action.default == 0 and action.default is not False:
            default = action.default
            text += f" [{' '.join(default) if isinstance(default, list) else default}]"
        return text.replace("%", "%%")


class Parser(HfArgumentParser):
    """argparse over a dataclass; --help lists the config's own flags first, then its bases'."""

    def __init__(self, config_class, doc):
        super().__init__(config_class, description=doc, allow_abbrev=False,
                         formatter_class=HelpFormatter)
        self.config_class = config_class

    def add_argument(self, *names, at_least=None, over=None, at_most=None, **options):
        # The ranges are dropped, because CheckedConfig checks them, in Python's calls too.
        return super().add_argument(*names, **options)

    def error(self, message):  # argparse's own prints all flags first
        raise UsageError(f"{message} (--help lists all flags)")

    def format_help(self):
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        titles = {DataConfig: "data, in all stages", RunConfig: "training, in all stages"}
        for config_class in self.config_class.__mro__[:-2]:  # without CheckedConfig and object
            names = vars(config_class).get("__annotations__", {})
            formatter.start_section(titles.get(config_class, "flags"))
            formatter.add_arguments([a for a in self._actions if a.dest in names])
            formatter.end_section()
        return formatter.format_help()


def parse_config(config_class, doc, argv=None):
    """
    Command line -> a config_class instance.

    raises UsageError for an unknown flag, naming the nearest known one, and for a value that is of
    another type or out of its range
    """
    argv = sys.argv[1:] if argv is None else argv
    # The launcher's own flag is dropped, because the environment's LOCAL_RANK says the same.
    argv = [word for word in argv if not word.startswith("--local_rank=")]
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the argument {word!r} is not UTF-8; rename what it names, or write "
                             "it in UTF-8.") from None
    parser = Parser(config_class, doc)
    config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        unknown = [word for word in unknown if word != "--"] or unknown
        words = [word for word in unknown if word.startswith("-")] or unknown[:1]
        advice = "; ".join(unknown_flag(word.split("=")[0], known) for word in words)
        raise UsageError(f"unknown argument {advice} (--help lists all; flags for one stage of "
                         "run_all.sh go into STEP1_ARGS, STEP2_ARGS or STEP3_ARGS)")
    return config


def unknown_flag(word, known):
    """An unknown flag -> the flag and its name here, by the table, then by spelling."""
    flag_name = word.lower().replace("-", "_").replace("__", "--", 1)
    if flag_name in OTHER_NAMES:
        return f"{word}; here that is {OTHER_NAMES[flag_name]}"
    if word in known:
        return f"{word} behind --, where no flag is read; leave the -- out"
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.7)
    if near:
        return f"{word}; did you mean {near[0]}?"
    return word or "''"
