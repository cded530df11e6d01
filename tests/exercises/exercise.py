"""What the exercises' tests share: they say what is still to be done, in a sentence and not in a traceback."""

import dataclasses
import importlib
import importlib.util
import inspect

import pytest


def not_yet(sentence):
    pytest.fail(f"not done yet: {sentence}", pytrace=False)


def module(name):
    """A module that the exercise adds."""
    if importlib.util.find_spec(name) is None:
        not_yet(f"there is no {name.replace('.', '/')}.py")
    return importlib.import_module(name)


def function(owner, name):
    """A function that the exercise adds."""
    if not hasattr(owner, name):
        not_yet(f"{owner.__name__}.py has no function {name}")
    return getattr(owner, name)


def with_argument(owner, name, argument):
    """A function that is there, and that the exercise gives one more argument."""
    if argument not in inspect.signature(getattr(owner, name)).parameters:
        not_yet(f"{owner.__name__}.{name} has no argument {argument}")
    return getattr(owner, name)


def needs_flag(config_class, name):
    """A flag that the exercise adds."""
    if name not in {field.name for field in dataclasses.fields(config_class)}:
        not_yet(f"{config_class.__module__}.Config has no flag --{name}")


def needs_choice(config_class, name, choice):
    """A value of a flag that is there, and that the exercise adds."""
    from typing import get_args, get_type_hints
    if choice not in get_args(get_type_hints(config_class)[name]):
        not_yet(f"{config_class.__module__}.Config has no --{name} {choice}")
