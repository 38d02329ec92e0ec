"""The options that a trainer checkout really takes, read from its own parser and printed as one JSON document.

Run as `python -m kohaku_wrap.planning.workers.list_options CHECKOUT`. Names, types, choices and defaults are
facts of the parser; its help texts are not copied.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kohaku_wrap.processes import answer
from kohaku_wrap.trainer.installed import read_trainer_commit

PROBE_VALUES: dict[str, Any] = {
    "bool": True,
    "int": 3,
    "float": 0.5,
    "str": "word",
    "dict": {},
    "two_ints": [256, 256],
    "two_floats": [0.5, 0.5],
}
"""A value of each TOML type; a schema is known by which of them it lets through."""


class StandIn(types.ModuleType):
    """Anything that a parser never calls: every attribute is there and every call gives it back."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self.__name__}.{name}")

    def __call__(self, *_arguments: Any, **_keywords: Any) -> Any:
        return self


def stand_in_for_torchvision() -> None:
    """Let the trainer's modules import where torchvision is not, or was built for another torch."""
    try:
        importable = bool(__import__("torchvision.transforms"))
    except (ImportError, RuntimeError):
        importable = False
    if importable:
        return
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    # These decide at import whether torchvision is there: let them see that it is not.
    for package in ("transformers", "diffusers"):
        importlib.import_module(package)
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.utils"):
        sys.modules[name] = StandIn(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)


def describe_action(action: argparse.Action) -> dict[str, Any]:
    """One option as plain data: type `flag`, `int`, `float`, `int_or_float` or `str`."""
    kind = "flag" if action.nargs == 0 else getattr(action.type, "__name__", "str").lower()
    kind = "str" if kind in ("path", "nonetype") else kind
    entry: dict[str, Any] = {"type": kind}
    if action.nargs not in (0, None):
        entry["nargs"] = action.nargs
    if action.choices is not None:
        entry["choices"] = list(action.choices)
    entry["default"] = action.default
    return entry


def accepted_types(
    schema: Callable[[dict[str, Any]], Any], wrap: Callable[[str, Any], dict[str, Any]], name: str
) -> list[str]:
    """The TOML types that the dataset schema lets through for `name`."""
    import voluptuous

    accepted = []
    for kind, value in PROBE_VALUES.items():
        try:
            schema(wrap(name, value))
        except voluptuous.Invalid:
            continue
        accepted.append(kind)
    if "bool" in accepted and "int" in accepted:
        # voluptuous takes a bool for an int, as Python does.
        accepted.remove("bool")
    return accepted


def describe_dataset_options(config_util: Any) -> dict[str, Any]:
    """Each option of a dataset file: its TOML types, and whether `[[datasets]]` or a subset takes it."""
    sanitizer = config_util.ConfigSanitizer(True, False, False, True)

    def in_dataset(name: str, value: Any) -> dict[str, Any]:
        return {"datasets": [{name: value, "subsets": [{"image_dir": "x"}]}]}

    def in_subset(name: str, value: Any) -> dict[str, Any]:
        return {"datasets": [{"subsets": [{"image_dir": "x", name: value}]}]}

    names = {str(key) for key in (*sanitizer.db_dataset_schema, *sanitizer.db_subset_schema)} - {"subsets"}
    defaults = {**vars(config_util.DreamBoothDatasetParams()), **vars(config_util.DreamBoothSubsetParams())}
    described = {}
    for name in sorted(names):
        of_subset = accepted_types(sanitizer.user_config_validator, in_subset, name)
        of_dataset = accepted_types(sanitizer.user_config_validator, in_dataset, name)
        default = defaults.get(name)
        # Two of the trainer's own defaults are one-tuples by a stray comma.
        default = default[0] if isinstance(default, tuple) and len(default) == 1 else default
        described[name] = {
            "types": of_subset or of_dataset,
            "level": "subset" if of_subset else "dataset",
            "default": default,
        }
    return described


def describe_trainer(checkout: Path) -> dict[str, Any]:
    """Everything that the checks need to know of one checkout."""
    sys.path.insert(0, str(checkout))
    sys.argv = ["sdxl_train_network.py"]
    stand_in_for_torchvision()
    import sdxl_train_network
    from library import config_util

    parser = sdxl_train_network.setup_parser()
    options = {
        action.dest: describe_action(action)
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    }
    return {
        "commit": read_trainer_commit(checkout),
        "options": options,
        "dataset_options": describe_dataset_options(config_util),
    }


if __name__ == "__main__":
    answer(lambda: describe_trainer(Path(sys.argv[1]).resolve()))
