"""A folder of ONNX files opened as a judge: its kind, labels and threshold, by its files or its `judge.toml`."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import Problem, ProblemsFound, refusing
from kohaku_wrap.evaluation.judges import KINDS, OWN_FILE, BadJudge, Judge, Kind
from kohaku_wrap.file_hashes import sha256_of_file
from kohaku_wrap.files import describe_absence, parse_json, read_regular
from kohaku_wrap.toml_files import TableReader, load_toml

OWN_KEYS = ("kind", "title", "model", *(each.name for each in fields(Kind)[4:]))
"""Of `judge.toml`: how a kind takes a picture, and more."""


def open_judge(folder: Path, wanted: Sequence[str] = tuple(KINDS), threads: int = 1) -> Judge:
    """The judge in a folder, of one of these kinds. Raises BadJudge, ProblemsFound for its `judge.toml`."""
    if not folder.is_dir():
        raise BadJudge(f"{folder}: {describe_absence(folder, 'folder')}", list_kinds(wanted))
    own = read_own(folder) if os.path.lexists(folder / OWN_FILE) else {}
    kind = own["kind"] if own else guess_kind(folder, wanted)
    model = str(own.get("model") or kind.files[0])
    files = [model, *kind.files[1:]]
    needed = [name for name in files if name != "meta.json" or not kind.labels]
    if missing := [name for name in needed if not (folder / name).is_file()]:
        odd = [name for name in missing if os.path.lexists(folder / name)]
        what = f"{odd[0]} is not a regular file" if odd else f"a judge of kind {kind.name} without {', '.join(missing)}"
        raise BadJudge(
            f"{folder}: {what}",
            f"It needs {', '.join(files)}. They are published at {kind.published}.",
        )
    if kind.name not in wanted:
        raise BadJudge(f"{folder}: a judge of kind {kind.name}; {' or '.join(wanted)} is needed", list_kinds(wanted))
    labels = read_labels(folder, kind)
    if kind.name == "ccip" and kind.threshold is None:
        kind = replace(kind, threshold=read_threshold(folder))
    hashes = {name: sha256_of_file(folder / name) for name in needed}
    title = str(own.get("title") or folder.resolve().name)
    return Judge(folder, kind, title, model, labels, hashes, threads)


def list_kinds(wanted: Sequence[str]) -> str:
    """What to do where a folder is none of these kinds."""
    return f"See `kwrap evaluate judges` for {' and '.join(wanted)}: which files, and where they are published."


def guess_kind(folder: Path, wanted: Sequence[str]) -> Kind:
    """The kind of a published layout, by its files. Raises BadJudge."""
    if (folder / "selected_tags.csv").exists():
        return KINDS["tagger"]
    if any((folder / name).exists() for name in KINDS["ccip"].files):
        return KINDS["ccip"]
    if (folder / "meta.json").exists():
        labels = read_meta(folder)
        return KINDS["corruption" if "corrupted" in labels else "aesthetic"]
    if len(wanted) == 1:
        return KINDS[wanted[0]]
    raise BadJudge(f"{folder}: no judge of a known layout, and no {OWN_FILE}", list_kinds(wanted))


def read_meta(folder: Path) -> tuple[str, ...]:
    """The labels of `meta.json`. Raises BadJudge."""
    path = folder / "meta.json"
    with refusing(BadJudge, f"{path}: its labels cannot be read", "Get the file again."):
        labels = parse_json(read_regular(path))["labels"]
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels) or not labels:
            raise ValueError("labels is no list of words")
    return tuple(labels)


def read_labels(folder: Path, kind: Kind) -> tuple[str, ...]:
    """What each output stands for; empty where they are features. Raises BadJudge."""
    if kind.name == "ccip":
        return ()
    if kind.name != "tagger":
        return kind.labels or read_meta(folder)
    path = folder / "selected_tags.csv"
    with refusing(BadJudge, f"{path}: its tags cannot be read", "Get the file again.", csv.Error):
        return tuple(row["name"] for row in csv.DictReader(io.StringIO(read_regular(path))))


def read_threshold(folder: Path) -> float:
    """The largest difference of one character, of `metrics.json`. Raises BadJudge."""
    path = folder / "metrics.json"
    with refusing(BadJudge, f"{path}: no threshold in it", "Get the file again."):
        if not 0 < (threshold := float(parse_json(read_regular(path))["threshold"])) < math.inf:
            raise ValueError(f"{threshold} is none")
        return threshold


def read_own(folder: Path) -> dict[str, Any]:
    """What `judge.toml` says: the kind with its changes, title and model. Raises ProblemsFound."""
    path = folder / OWN_FILE
    problems: list[Problem] = []
    table = load_toml(path)
    reader = TableReader("", table, OWN_KEYS, problems)
    if "kind" not in table:
        reader.fault("kind", f"missing; one of {', '.join(KINDS)}")
    kind = KINDS[reader.choice("kind", tuple(KINDS))]
    changes: dict[str, Any] = {"output": reader.text("output"), "labels": reader.words("labels", ())}
    for key, count in (("mean", 3), ("deviation", 3), ("scale", 1), ("threshold", 1)):
        if key not in table:
            continue
        numbers = table[key] if count > 1 else [table[key]]
        divides = key in ("deviation", "scale")
        if not is_numbers(numbers, count) or (divides and min(numbers) <= 0):
            wanted = "three numbers" if count > 1 else "a number"
            reader.fault(key, f"{table[key]!r} is not {wanted}{' above 0' if divides else ''}")
        else:
            changes[key] = tuple(map(float, numbers)) if count > 1 else float(numbers[0])
    choices = {
        "resize": ("stretch", "pad"), "interpolation": ("bilinear", "bicubic"),
        "layout": ("nchw", "nhwc"), "channels": ("rgb", "bgr"),
    }  # fmt: skip
    changes |= {key: reader.choice(key, known) for key, known in choices.items() if key in table}
    if size := reader.integer("size", 1):
        changes["size"] = size
    kind = replace(kind, **changes)
    model, title = reader.text("model"), reader.text("title")
    if problems:
        raise ProblemsFound(str(path), problems, "Fix these places; see `kwrap evaluate judges`.")
    return {"kind": kind, "model": model, "title": title}


def is_numbers(value: Any, count: int) -> bool:
    """Whether it is a list of so many numbers."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(one, int | float) and not isinstance(one, bool) and abs(one) < math.inf for one in value)
    )
