"""The JSON documents of a run's folder, read whatever they hold: records that are whole, others left out."""

from __future__ import annotations

import sys
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from kohaku_wrap.files import read_json

Record = TypeVar("Record")

LARGEST = 1 << 63


def read_json_files(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """The JSON documents of that name pattern, by name; those being written, and what is none, are left out."""
    return [document for path in sorted(folder.glob(pattern)) if (document := read_json(path))]


def read_records(folder: Path, pattern: str, kind: type[Record]) -> list[Record]:
    """The records of that name pattern, by name; keys that the dataclass `kind` does not have are ignored."""
    hints = get_type_hints(kind)
    records = []
    for document in read_json_files(folder, pattern):
        values = {name: value for name, value in document.items() if name in hints}
        # A kind is a dataclass, which its type does not say.
        needed = {each.name for each in fields(kind) if each.default is MISSING}  # type: ignore[arg-type]
        if needed <= values.keys() and all(fits(value, hints[name]) for name, value in values.items()):
            records.append(kind(**values))
    return records


def read_record(folder: Path, name: str, kind: type[Record]) -> Record | None:
    """The record in a file, likewise; None where there is none."""
    return next(iter(read_records(folder, name, kind)), None)


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a field's type: whole, finite numbers of a usual size, and words of a choice."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, each) for each in get_args(hint))
    if hint is int:
        return is_whole(value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, get_origin(hint) or hint)


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is an integer of 64 bits, which numbers of steps and processes are."""
    return type(value) is int and abs(value) < LARGEST
