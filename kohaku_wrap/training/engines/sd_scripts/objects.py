"""The trainer's own classes and functions by name, and new ones in every module that looks the old ones up."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import sdxl_train_network

from kohaku_wrap.errors import KwrapError

CHECKOUT = Path(sdxl_train_network.__file__).parent


class NoSuchObject(KwrapError):
    """The trainer defines no class or function of that name, or looks it up nowhere."""


def trainer_modules() -> Iterator[ModuleType]:
    """Every module of the checkout that is imported."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and CHECKOUT in Path(file).parents:
            yield module


def find_object(name: str) -> Any:
    """The class or function of that name, from the module that defines it. Raises NoSuchObject."""
    for module in trainer_modules():
        found = vars(module).get(name)
        if getattr(found, "__module__", None) == module.__name__:
            return found
    raise NoSuchObject(f"sd-scripts at {CHECKOUT} defines no {name}", "See what it is: kwrap trainer show")


def replace_object(old: Any, new: Any) -> None:
    """Put `new` in the place of `old` under every name of every module of the trainer. Raises NoSuchObject."""
    places = [(module, name) for module in trainer_modules() for name, value in vars(module).items() if value is old]
    if not places:
        raise NoSuchObject(f"no module of sd-scripts holds {old.__name__}", "See what it is: kwrap trainer show")
    for module, name in places:
        setattr(module, name, new)


def named(function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that the function itself gives them, with its defaults."""
    bound = inspect.signature(function).bind(*arguments, **keywords)
    bound.apply_defaults()
    return bound.arguments
