"""
Rewards of one's own: Python functions with TRL's signature, named on the command line by
`--reward_fn file.py:function`.
"""

import copy
import functools
import importlib.util
import inspect
import itertools
import math
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from support.flags import UsageError
from support.processes import raise_on_all_ranks


@functools.cache
def load_reward_function(name):
    """
    "file.py:function" -> RewardFunction; None for anything else, which is then a reward model.

    raises UsageError for a file or function that is not there, or a file that cannot be imported
    """
    path, _, function = name.rpartition(":")
    file = name.rpartition(".")[0].replace(".", "/") + ".py"
    if not path and not Path(name).exists() and Path(file).is_file():
        raise UsageError(f"--reward_fn {name}: a function is named by its file, "
                         f"{file}:{name.rpartition('.')[2]}.")
    if name.endswith(".py"):
        raise UsageError(f"--reward_fn {name}: the function is missing; {name}:function is the "
                         "form.")
    if not path.endswith(".py"):
        return None
    if not Path(path).is_file():
        raise UsageError(f"--reward_fn {name}: the file {path} does not exist.")

    module = import_file(name, path)
    if not callable(getattr(module, function, None)):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UsageError(f"--reward_fn {name}: {path} has no function {function}; it has "
                         f"{', '.join(known) or 'none'}.")
    return RewardFunction(name, getattr(module, function))


def import_file(name, path):
    """
    A reward file as a module. It stands in sys.modules under its name, because dataclasses and
    process pools look for their module there, and its own imports are looked for beside it.
    """
    module_name = Path(path).stem
    known = sys.modules.get(module_name)
    if known is not None and not hasattr(known, "reward_file"):
        raise UsageError(f"--reward_fn {name}: there is another module named {module_name} in this "
                         "program; rename the file.")
    if known is not None and known.reward_file == Path(path).resolve():
        return known
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    module.reward_file = Path(path).resolve()
    sys.modules[module_name] = module
    sys.path.append(str(Path(path).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        raise UsageError(f"--reward_fn {name}: importing {path} fails: "
                         f"{what_came(error)}.") from error
    return module


def what_came(error):
    """An exception of a user's code -> its type and what it says, in one line of 300 letters."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # a message is made by the user's code too
        text = "(its message cannot be made)"
    return f"{type(error).__name__}: {text[:300]}"


class RewardFunction:
    """A user's function(prompts, completions, **columns), called with records and answers."""

    def __init__(self, name, function):
        self.name = name
        self.function = function

    def __call__(self, records, answers):
        """
        Scores of answers (texts) to the prompts of records -> (B,) float32 on the CPU. Collective:
        what one rank's function raises is raised on all ranks.

        The function's arguments, a list of B each:
        prompts, completions  texts where the data's `prompt` column holds text, else lists of
                              messages
        columns               the data's other columns; `chosen` and `rejected` always
        raises                UsageError for another signature, an exception, or no B finite numbers
        """
        with raise_on_all_ranks():
            return self._call(records, answers)

    def _call(self, records, answers):
        arguments = self._arguments(records, answers)
        columns = ", ".join(name for name in arguments if name not in ("prompts", "completions"))
        try:
            inspect.signature(self.function).bind(**arguments)
        except TypeError as error:
            raise UsageError(
                f"--reward_fn {self.name} must take (prompts, completions, **columns), and the "
                f"data's columns are {columns}: {error}.") from error
        try:
            # The function gets copies, because what it changes must not change the training data.
            returned = self.function(**copy.deepcopy(arguments))
            if isinstance(returned, Iterator):
                # One more than is needed shows that there are too many, and a generator may be
                # endless.
                returned = list(itertools.islice(returned, len(answers) + 1))
        except (Exception, SystemExit) as error:  # whatever a user's function raises
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UsageError(
                f"--reward_fn {self.name} failed in {place.filename}, line {place.lineno}: "
                f"{what_came(error)}. The columns it was given: {columns}.") from error
        try:
            # None is TRL's "does not apply to this answer", which here earns 0.
            scores = [0.0 if score is None else float(score) for score in returned]
        except (TypeError, ValueError, ArithmeticError, RuntimeError):
            scores = []
        if len(scores) != len(answers):
            shown = " ".join(str(returned).split())[:100]
            raise UsageError(
                f"--reward_fn {self.name} must return a list of {len(answers)} numbers, one an "
                f"answer; {type(returned).__name__} {shown} came.")
        for score, answer in zip(scores, answers):
            if not math.isfinite(score):
                raise UsageError(f"--reward_fn {self.name} gave {score} to the answer "
                                 f"{answer[:100]!r}; PPO cannot learn from it. Give a number.")
        return torch.tensor(scores)

    def _arguments(self, records, answers):
        if all(isinstance(record.columns.get("prompt"), str) for record in records):
            prompts = [record.columns["prompt"] for record in records]
            completions = answers
        else:
            prompts = [record.prompt for record in records]
            completions = [[{"role": "assistant", "content": answer}] for answer in answers]
        arguments = {"prompts": prompts, "completions": completions,
                     "chosen": [record.chosen for record in records],
                     "rejected": [record.rejected for record in records]}
        names = {name for record in records for name in record.columns} - {"prompt"}
        for name in sorted(names):
            arguments[name] = [record.columns.get(name) for record in records]
        return arguments
