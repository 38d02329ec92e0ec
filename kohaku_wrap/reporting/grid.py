"""The page that compares the merges of a grid: their scores in one table, their pictures side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.files import read_json, write_text
from kohaku_wrap.merging.replays import is_shallow
from kohaku_wrap.reporting.evaluations import DEEPEST, list_single
from kohaku_wrap.reporting.page import render
from kohaku_wrap.reporting.pictures import list_files, name_row, refer
from kohaku_wrap.training.records.samples import CONTACT_SHEETS, read_sheet_record
from kohaku_wrap.wording import by_numbers

LEFT_OUT = ("scores", "pictures", "pictures_without_known_tag", "unknown_tags", "threshold", "reference_pictures")
"""Of a score, what says nothing of how good the model is in all, by a part of its name."""


@dataclass(frozen=True)
class GridPoint:
    """One merge as the page shows it."""

    name: str
    """What its files are called."""

    values: Mapping[str, str]
    """A number for each letter."""

    command: str
    """What makes it again."""

    pictures: Path
    """The folder of its pictures."""

    scores: tuple[Path, ...]
    """Results of `kwrap evaluate`."""

    is_kept: bool
    """Whether its file is there."""


def read_scores(point: GridPoint) -> dict[str, float]:
    """Every number that the results say of the model, by measure and name."""
    found: dict[str, float] = {}
    for path in point.scores:
        document: Any = read_json(path)
        models = document.get("models") if is_shallow(document, DEEPEST) else None
        first = models[0] if isinstance(models, list) and models and isinstance(models[0], dict) else {}
        measure = str(document.get("measure") or path.parent.name)
        for name, value in list_single("", first):
            is_told = isinstance(value, int | float) and not isinstance(value, bool)
            if is_told and not {*name.split(": ")} & {*LEFT_OUT}:
                found[f"{measure}: {name}"] = value
    return found


def list_rows(points: Sequence[GridPoint], folder: Path) -> list[tuple[str, list[str]]]:
    """What was asked for, and the address of its picture by each merge; empty where that is not drawn."""
    rows: dict[str, list[str]] = {}
    for place, point in enumerate(points):
        labels = read_sheet_record(point.pictures).get("pictures", {})
        for path in list_files(point.pictures):
            if not CONTACT_SHEETS.fullmatch(path.name):
                row = rows.setdefault(name_row(path, labels.get(path.name), []), [""] * len(points))
                row[place] = refer(path, folder)
    return sorted(rows.items(), key=lambda row: by_numbers(row[0]))


def write_grid_page(formula: str, points: Sequence[GridPoint], path: Path, waiting: int) -> None:
    """Write the page beside the grid's folders; `waiting`: merges that are not done yet."""
    scores = [read_scores(point) for point in points]
    names = list(dict.fromkeys(name for each in scores for name in each))
    document = {
        "formula": formula,
        "points": [
            {"name": point.name, "values": point.values, "scores": each}
            for point, each in zip(points, scores, strict=True)
        ],
    }
    text = render(
        "grid.html",
        "merges compared",
        document,
        formula=formula,
        letters=list(points[0].values) if points else [],
        points=list(zip(points, scores, strict=True)),
        names=names,
        rows=list_rows(points, path.absolute().parent),
        waiting=waiting,
    )
    write_text(path, text)
