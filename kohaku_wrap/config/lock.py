"""Two locks of a run compared: what differs between the run that was and the one that would be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.config.templates import read_toml
from kohaku_wrap.errors import Problem, UsageError

FREE_KEYS = frozenset({"run.name", "values.output_name", "values.output_dir", "values.logging_dir"})
"""What may differ between two runs of the same training: its name and folder."""

FREE_TABLES = ("machine",)
"""Tables that describe where it ran; elastic resume allows another machine."""

HASHED_PATHS = ("base_model", "vae", "selection", "images", "tokenizers")
"""Inputs whose path may change while their hash stays."""


class MissingLock(UsageError):
    """The lock to compare with is not there."""


def read_lock(path: Path) -> dict[str, Any]:
    """A run.lock.toml. Raises MissingLock."""
    if not path.is_file():
        raise MissingLock(f"{path}: no such lock", "A run's lock is runs/NAME/run.lock.toml.")
    return read_toml(path)


def compare_locks(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Problem]:
    """Everything in which `new` departs from `old`: values, data, inputs' hashes, versions, trainer.

    `layer` of a problem is the lock's table. An empty list means the same training.
    """
    left, right = dict(flatten_lock(old)), dict(flatten_lock(new))
    problems = []
    for key in sorted(left.keys() | right.keys()):
        table, _, name = key.partition(".")
        if key in FREE_KEYS or table in FREE_TABLES or left.get(key) == right.get(key):
            continue
        if is_path(key) or key == "trainer.path" or key.startswith("run.template_files"):
            continue
        if key == "network_args.preset" or (table == "values" and name in ("sample_prompts", "network_args")):
            continue
        problems.append(Problem(key, f"locked {show(left, key)}, now {show(right, key)}", f"[{table}]"))
    return problems


def is_path(key: str) -> bool:
    """Whether a key holds a path of the machine, which its hash stands for."""
    table, _, name = key.partition(".")
    if table == "inputs":
        return name in HASHED_PATHS
    paths = ("pretrained_model_name_or_path", "vae", "tokenizer_cache_dir")
    return (table == "values" and name in paths) or key == "dataset.image_dir"


def flatten_lock(lock: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; lists stay whole."""
    for key, value in lock.items():
        if isinstance(value, Mapping):
            yield from flatten_lock(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def show(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False, default=str) if key in values else "not there"
