"""Results of `kwrap evaluate` that lie in a run's `evaluation/`, laid out as numbers, tables and curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from kohaku_wrap.files import read_json
from kohaku_wrap.merging.replays import is_shallow
from kohaku_wrap.reporting.charts import COLOURS, draw_chart
from kohaku_wrap.reporting.curves import BINS, Piece
from kohaku_wrap.training.records.folder import Run

FOLDER = "evaluation"
DEEPEST = 12
"""Lists within lists of a result; one that goes deeper is of no evaluation."""

ROWS_SHOWN = 60
COLUMNS_SHOWN = 8
CURVE = "curve"
"""The key of a model's scores, from the best to the worst."""

AXIS = "place"


@dataclass(frozen=True)
class Table:
    """Records of one kind."""

    title: str
    """The key that they stand under."""

    heads: tuple[str, ...]
    """Names of the columns."""

    rows: tuple[tuple[Any, ...], ...]
    """Their values; None where a record has none."""

    left_out: int
    """Further records."""


@dataclass(frozen=True)
class Evaluation:
    """One result."""

    file: str
    """Its file, below the folder."""

    document: Mapping[str, Any]
    """What the file holds; empty where it cannot be read as a result."""

    @property
    def title(self) -> str:
        """What was measured."""
        named = (self.document.get(name) for name in ("measure", "command", "kind"))
        return next((str(each) for each in named if isinstance(each, str) and each), self.file)

    @property
    def pairs(self) -> list[tuple[str, Any]]:
        """Single values, also of tables within."""
        return [*list_single("", self.document)]

    @property
    def tables(self) -> list[Table]:
        """Lists of records."""
        return [lay_out(name, value) for name, value in self.document.items() if is_list_of_records(value)]

    @property
    def curves(self) -> tuple[list[tuple[int, str]], Markup] | None:
        """Colours with names, and the sorted scores of each model over each other; None where there are none."""
        return draw_sorted(list(find_curves(self.document)), self.title)


def read_evaluations(run: Run) -> Iterator[Evaluation]:
    """The results in the run, by file name; those that cannot be read are named too."""
    folder = run.folder / FOLDER
    found = (*folder.glob("*.json"), *folder.glob("*/*.json")) if folder.is_dir() else ()
    for path in sorted(found):
        document = read_json(path)
        yield Evaluation(str(path.relative_to(folder)), document if is_shallow(document, DEEPEST) else {})


def list_single(start: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each single value of a table and of the tables in it, with its path."""
    for name, value in table.items():
        if isinstance(value, str | int | float):
            yield f"{start}{name}", value
        elif isinstance(value, dict):
            yield from list_single(f"{start}{name}: ", value)


def is_list_of_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def lay_out(title: str, records: Sequence[Mapping[str, Any]]) -> Table:
    """The records' single values as rows."""
    shown = [dict(list_single("", {name: value for name, value in each.items() if name != "scores"}))
             for each in records[:ROWS_SHOWN]]  # fmt: skip
    heads = tuple(dict.fromkeys(name for each in shown for name in each))[:COLUMNS_SHOWN]
    rows = tuple(tuple(each.get(name) for name in heads) for each in shown)
    return Table(title, heads, rows, max(0, len(records) - ROWS_SHOWN))


def find_curves(document: Mapping[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """Each model of a result with its scores, the best first."""
    models: Any = document.get("models")
    for each in models if is_list_of_records(models) else ():
        values = each.get(CURVE)
        if (
            isinstance(values, list)
            and values
            and all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
        ):
            yield str(each.get("title", "")), sorted(map(float, values), reverse=True)


def draw_sorted(
    curves: Sequence[tuple[str, Sequence[float]]], title: str
) -> tuple[list[tuple[int, str]], Markup] | None:
    """The scores over their places; of many, an even part is drawn."""
    if not curves:
        return None
    pieces = []
    for number, (name, values) in enumerate(curves):
        count = len(values)
        places = sorted({round(at * (count - 1) / max(1, min(count, BINS) - 1)) for at in range(min(count, BINS))})
        chosen = [values[place] for place in places]
        pieces.append(Piece(name, number, 1, True, {AXIS: [place + 1 for place in places]}, chosen, chosen, chosen))
    told = f"{title}: sorted scores of {', '.join(name for name, _ in curves)}"
    drawing = draw_chart(pieces, (), AXIS, told, len(pieces) + 1, from_zero=True)
    return [(number % COLOURS, name) for number, (name, _) in enumerate(curves)], drawing
