"""One lock against another: what a run made from a lock would have otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.config.run_files import LOCK_PLACES, flatten
from kohaku_wrap.config.schema import ARGUMENT_TABLES
from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound, refusing
from kohaku_wrap.files import read_regular
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.training.records.lock import refuse_other_format

OF_ONE_RUN = LOCK_PLACES | {"format", "digest", "run.id", "run.options_digest", "inputs.site_sha256"}
"""Entries that say where things are and which run it is, not what is trained."""


NOT_OPTIONS = frozenset({"run.kwrap_version", "run.template", *(f"values.{name}" for name in ARGUMENT_TABLES)})
"""Entries of the lock's tables that are no options, or stand there a second time."""

LATER = (
    "kernels.",
    "inputs.rows_digest",
    "inputs.image_files_digest",
    "inputs.tokenizers_sha256",
    "inputs.base_weights_sha256",
    "inputs.network_weights_sha256",
)
"""How the entries begin that a lock of kwrap 0.1 lacks."""


def compare_locks(locked: Mapping[str, Any], new: Mapping[str, Any]) -> list[Problem]:
    """Every entry in which two locks differ, places left aside."""
    before, after = dict(flatten(locked)), dict(flatten(new))
    if "format" not in locked:
        # A lock of kwrap 0.1 says nothing of these.
        after = {key: value for key, value in after.items() if not key.startswith(LATER) or key in before}
    return [
        Problem(key, f"locked {describe(before, key)}, here {describe(after, key)}")
        for key in sorted(before.keys() | after.keys())
        if key not in OF_ONE_RUN and not key.startswith("files.") and before.get(key) != after.get(key)
    ]


def describe(entries: Mapping[str, Any], key: str) -> str:
    return repr(entries[key]) if key in entries else "unset"


def refuse_other_lock(path: Path, new: Mapping[str, Any]) -> None:
    """Raise ProblemsFound with every difference between a lock file and the lock of the run to be made."""
    problems = compare_locks(read_lock(path), new)
    if problems:
        raise ProblemsFound(str(path), problems, "Fix what differs, or train without --locked.")


def read_lock(path: Path) -> dict[str, Any]:
    """The tables of a lock file."""
    with refusing(KwrapError, f"{path}: not a lock", "Give the run.lock.toml of a run."):
        tables = parse_toml(read_regular(path))
    refuse_other_format(path, tables)
    return tables


def template_of_lock(path: Path) -> str:
    """The template file that a lock was made from, or its name where the file is gone. Raises KwrapError."""
    run = read_lock(path).get("run", {})
    if "template" not in run:
        raise KwrapError(f"{path}: [run] template is missing", "Give the run.lock.toml of a run, or name the template.")
    files = run.get("template_files") or []
    return files[-1] if files and Path(files[-1]).is_file() else str(run["template"])


def compare_options(lock: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key and both values of every option, seed, batch and length in which two runs differ; None is unset."""
    sides = []
    for tables in (lock, other):
        names = ("run", "values", "dataset", *ARGUMENT_TABLES, "preset", "plan", "validation")
        chosen = {name: tables.get(name, {}) for name in names}
        sides.append({key: value for key, value in flatten(chosen) if key not in OF_ONE_RUN and key not in NOT_OPTIONS})
    before, after = sides
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [(key.removeprefix("values."), before.get(key), after.get(key)) for key in keys]
