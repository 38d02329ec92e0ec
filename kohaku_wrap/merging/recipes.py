"""Merge recipes as TOML files to copy, and the words that options of a merge are written in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import Problem, ProblemsFound, UsageError
from kohaku_wrap.files import describe_absence, shipped_folder
from kohaku_wrap.merging.blocks import PRESETS_FILE
from kohaku_wrap.merging.plan import MergeOptions
from kohaku_wrap.merging.predictions import WORDS
from kohaku_wrap.toml_files import load_toml

RECIPE_KEYS = ("title", "formula", "models", "notes", "options")

DTYPES = {
    "fp16": "F16", "bf16": "BF16", "fp32": "F32", "fp64": "F64", "fp8_e4m3fn": "F8_E4M3", "fp8_e5m2": "F8_E5M2",
}  # fmt: skip
"""What --dtype takes, and how headers spell it."""

WORD_OF_DTYPE = {spelt: word for word, spelt in DTYPES.items()}

WORDS_OF_OPTION = {
    "dtype": tuple(DTYPES),
    "prediction": tuple(WORDS),
    "missing": ("fail", "anchor", "zero"),
    "shapes": ("fail", "anchor"),
    "unmatched": ("fail", "skip"),
    "sums": ("warn", "fail"),
    "non_finite": ("fail", "keep"),
    "overflow": ("fail", "keep"),
    "layout": ("sdxl", "sd15"),
    "network": ("lora", "lokr", "full"),
    "rest": ("keep", "skip"),
}
"""What an option of a recipe may say, where there is a choice; the same words as on the command line."""

RANGE_OF_OPTION = {"rank": (0, math.inf), "energy": (0, 1), "factor": (-1, math.inf)}
"""The least and the largest number that an option may be; 0 for what is usual."""


@dataclass(frozen=True)
class Recipe:
    """A formula with a word on each of its models."""

    formula: str
    """As written."""

    models: dict[str, str] = field(default_factory=dict)
    """What each name stands for; never a path."""

    title: str = ""
    """One line."""

    notes: str = ""
    """What a person should know."""

    options: dict[str, Any] = field(default_factory=dict)
    """Fields of MergeOptions that differ from what is usual."""


def list_recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    shipped = sorted((shipped_folder("templates") / "merges").glob("*.toml"))
    return {path.stem: path for path in shipped if path.name != PRESETS_FILE}


def read_recipe(path: Path) -> Recipe:
    """A recipe from its TOML file.

    Raises ProblemsFound with all faults of the file, or UnreadableToml where it is not TOML.
    """
    document = load_toml(path)
    problems = [
        Problem(key, f"unknown; a recipe has {', '.join(RECIPE_KEYS)}") for key in document if key not in RECIPE_KEYS
    ]
    problems += [
        Problem(key, "is not text")
        for key in ("title", "formula", "notes")
        if not isinstance(document.get(key, ""), str)
    ]
    if not document.get("formula"):
        problems.append(Problem("formula", "missing"))
    models, options = document.get("models", {}), document.get("options", {})
    if not isinstance(models, dict) or not all(isinstance(text, str) for text in models.values()):
        problems.append(Problem("models", "is not a table of names with a text each"))
    if isinstance(options, dict):
        problems += problems_of_options(options)
    else:
        problems.append(Problem("options", "is not a table"))
    if problems:
        raise ProblemsFound(str(path), problems, "`kwrap merge --help` tells what the options mean.")
    return Recipe(**document)


def problems_of_options(options: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with a recipe's options."""
    types = {option.name: type(option.default) for option in fields(MergeOptions)}
    problems = []
    for name, value in options.items():
        words = WORDS_OF_OPTION.get(name)
        if name not in types:
            what = f"unknown; there are {', '.join(sorted(types))}"
        elif words and value not in words:
            what = f"{json.dumps(value, default=str)} is not one of {', '.join(words)}"
        elif type(value) not in (types[name], *([int] if types[name] is float else [])):
            kinds = {bool: "is not true or false", str: "is not text", int: "is not a whole number"}
            what = kinds.get(types[name], "is not a number")
        elif name in RANGE_OF_OPTION and not RANGE_OF_OPTION[name][0] <= value <= RANGE_OF_OPTION[name][1]:
            least, most = RANGE_OF_OPTION[name]
            what = f"{value} is not from {least} {'on' if most == math.inf else f'to {most}'}"
        else:
            continue
        problems.append(Problem(f"options.{name}", what))
    return problems


def find_recipe(text: str) -> Recipe:
    """The recipe that a word of the command line means: a shipped name, a TOML file, or a formula itself."""
    shipped = list_recipes()
    if text in shipped:
        return read_recipe(shipped[text])
    if text.endswith(".toml"):
        path = Path(text)
        if not path.is_file():
            names = ", ".join(shipped)
            raise UsageError(
                f"{text}: {describe_absence(path, 'recipe')}",
                f"Shipped recipes: {names}; or give a TOML file or a formula.",
            )
        return read_recipe(path)
    return Recipe(text)


def type_options(options: Mapping[str, Any]) -> list[str]:
    """Fields of MergeOptions, a title or a date as one types them; what is empty is left out."""
    words: list[str] = []
    for name, value in options.items():
        if value:
            flag = "--as" if name == "network" else f"--{name.replace('_', '-')}"
            shown = WORD_OF_DTYPE.get(str(value), value) if name == "dtype" else value
            words += [flag] if value is True else [flag, str(shown)]
    return words
