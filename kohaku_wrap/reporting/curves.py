"""The metrics of a run as curves: a piece for each stretch of each attempt, thinned so that no spike is lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.training.records.attempts import Attempt, last_kept_steps
from kohaku_wrap.training.records.evaluations import Evaluation
from kohaku_wrap.training.records.metrics import APART

AXES = {"steps": "optimizer steps", "images": "images seen", "hours": "hours of training, what was repeated too"}
BINS = 360
"""Of one curve: each keeps its lowest and its highest value."""

SMOOTHED_SHARE = 50
"""The smoothed loss is the mean over this part of the steps, and at least SMOOTHED_LEAST."""

SMOOTHED_LEAST = 5
DIGITS = 6
TITLES = {
    "loss": ("Loss", "mean over neighbouring steps; the band reaches from the lowest to the highest of each spot"),
    "held_out": ("Held-out loss", "of posts that are not trained, by time step"),
    "rates": ("Learning rates", ""),
    "seconds": ("Seconds a step", "without samples, saving and pauses"),
    "memory_gib": ("Memory", "GiB"),
}

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Piece:
    """A curve without a gap: one quantity over steps of one attempt."""

    label: str
    """What the legend says."""

    run: int
    """The place of its run on the page."""

    attempt: int
    """Counted from 1."""

    kept: bool
    """Whether its steps count; otherwise a later attempt trained them again."""

    x: Mapping[str, list[float]]
    """A list of (spots,) by axis of AXES."""

    low: list[float]
    """(spots,) the lowest value of each."""

    high: list[float]
    """(spots,) the highest one."""

    value: list[float]
    """(spots,) the mean, for the loss the smoothed one."""


@dataclass(frozen=True)
class Table:
    """All lines of the metrics as columns, in the order in which they were trained."""

    step: Numbers
    """(lines,) optimizer steps done."""

    attempt: npt.NDArray[np.int64]
    """(lines,)."""

    kept: npt.NDArray[np.bool_]
    """(lines,) whether the line counts."""

    x: Mapping[str, Numbers]
    """(lines,) by axis."""

    columns: Mapping[str, Numbers]
    """(lines,) by key of the metrics; NaN where a line has no finite number."""


def read_number(value: Any) -> float:
    """A finite number of a metrics line, else NaN."""
    return float(value) if type(value) in (int, float) and math.isfinite(value) else math.nan


def read_column(lines: Sequence[Mapping[str, Any]], name: str) -> Numbers:
    """(lines,) a key of the metrics; NaN where a line has no finite number."""
    values = [line.get(name) for line in lines]
    if {*map(type, values)} <= {int, float, type(None)}:
        with suppress(OverflowError):
            column = np.array(values, dtype=np.float64)
            column[~np.isfinite(column)] = np.nan
            return column
    return np.array([read_number(value) for value in values])


def tabulate(lines: Sequence[Mapping[str, Any]], attempts: Sequence[Attempt], effective_batch: int) -> Table:
    """The lines as columns, with where each stands on each axis."""
    step = np.array([line["optimizer_step"] for line in lines], dtype=np.float64)
    attempt = np.array([line.get("attempt", 0) for line in lines], dtype=np.int64)
    # A run of several attempts writes one after another, each in ascending order; anything else is sorted so.
    order = np.lexsort((step, attempt))
    step, attempt = step[order], attempt[order]
    ends = [lines[at] for at in (order[:1].tolist() + order[-1:].tolist())]
    names = {name for line in ends for name in line} | {"loss", "seconds", "images"}
    drawn = sorted(name for name in names if name in (*TITLES, "images") or name.startswith("lr_"))
    columns = {name: read_column(lines, name)[order] for name in drawn}
    limits = last_kept_steps(list(attempts))
    numbers, places = np.unique(attempt, return_inverse=True)
    kept = step <= np.array([limits.get(number, math.inf) for number in numbers.tolist()])[places]
    apart = sum((np.nan_to_num(read_column(lines, f"{kind}_seconds")) for kind in APART), np.zeros(len(lines)))[order]
    x = {
        "steps": step,
        "images": count_images(step, attempt, columns["images"], attempts, effective_batch),
        "hours": np.cumsum(np.nan_to_num(columns["seconds"]) + apart) / 3600,
    }
    return Table(step, attempt, kept, x, columns)


def count_images(
    step: Numbers, attempt: npt.NDArray[np.int64], images: Numbers, attempts: Sequence[Attempt], effective_batch: int
) -> Numbers:
    """(lines,) images seen on the line up to each step; a step that was not recorded counts as a whole batch."""
    seen = np.zeros(len(step))
    at_step: dict[float, float] = {}
    starts = {each.number: float(each.start_optimizer_step) for each in attempts}
    for number in np.unique(attempt):
        mine = np.flatnonzero(attempt == number)
        start = starts.get(int(number), step[mine[0]] - 1)
        base = at_step.get(start, start * effective_batch)
        seen[mine] = base + np.cumsum(np.where(np.isnan(images[mine]), effective_batch, images[mine]))
        at_step.update(zip(step[mine].tolist(), seen[mine].tolist(), strict=True))
    return seen


def smooth_losses(table: Table) -> Numbers:
    """(lines,) the mean of the finite losses around each step, over the line that counts; the others' within theirs."""
    smoothed = np.full(len(table.step), np.nan)
    width = max(SMOOTHED_LEAST, int(table.kept.sum()) // SMOOTHED_SHARE)
    groups = [np.flatnonzero(table.kept)]
    groups += [np.flatnonzero(~table.kept & (table.attempt == number)) for number in np.unique(table.attempt)]
    for rows in groups:
        rows = rows[np.argsort(table.step[rows], kind="stable")]
        losses = table.columns["loss"][rows]
        sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(losses))])
        counts = np.concatenate([[0], np.cumsum(~np.isnan(losses))])
        at = np.arange(len(rows))
        begin, end = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(rows))
        with np.errstate(invalid="ignore"):
            smoothed[rows] = (sums[end] - sums[begin]) / (counts[end] - counts[begin])
    return smoothed


def list_columns(table: Table) -> dict[str, list[tuple[str, str]]]:
    """By chart the columns in it with their labels; charts of which nothing is known are left out."""
    known = [name for name, column in table.columns.items() if not np.isnan(column).all()]
    rates = [(name, name.removeprefix("lr_").replace("_", " ")) for name in known if name.startswith("lr_")]
    charts = {"loss": [("loss", "loss")], "rates": rates}
    charts |= {name: [(name, TITLES[name][0].lower())] for name in ("seconds", "memory_gib")}
    return {chart: [each for each in columns if each[0] in known] for chart, columns in charts.items()}


def cut_pieces(table: Table, column: str, label: str, run: int) -> list[Piece]:
    """One column as pieces, thinned to so many spots over the whole run."""
    values = table.columns[column]
    mean = smooth_losses(table) if column == "loss" else values
    last = table.step.max(initial=1.0)
    pieces = []
    for number in np.unique(table.attempt):
        for kept in (True, False):
            rows = np.flatnonzero((table.attempt == number) & (table.kept == kept) & ~np.isnan(values))
            if not len(rows):
                continue
            spot = np.floor((table.step[rows] - 1) * BINS / last) if last > BINS else table.step[rows]
            begin = np.flatnonzero(np.diff(spot, prepend=-1.0))
            sizes = np.diff(np.append(begin, len(rows)))
            # The last step of each spot, so that a curve ends where its attempt does.
            ends = rows[begin + sizes - 1]
            middle = mean[ends] if column == "loss" else np.add.reduceat(values[rows], begin) / sizes
            pieces.append(
                Piece(
                    label, run, int(number), kept,
                    {axis: shorten(places[ends]) for axis, places in table.x.items()},
                    shorten(np.minimum.reduceat(values[rows], begin)),
                    shorten(np.maximum.reduceat(values[rows], begin)),
                    shorten(middle),
                )
            )  # fmt: skip
    return pieces


def shorten(values: Numbers) -> list[float]:
    """The numbers with as many digits as a chart can show; whole ones stay whole."""
    return [int(value) if value.is_integer() else float(f"{value:.{DIGITS}g}") for value in values.tolist()]


def draw_curves(table: Table, run: int, name: Callable[[str], str]) -> dict[str, list[Piece]]:
    """All charts of one run; `name` makes the label of a column on the page."""
    if not len(table.step):
        return {}
    return {
        chart: [piece for column, label in columns for piece in cut_pieces(table, column, name(label), run)]
        for chart, columns in list_columns(table).items()
        if columns
    }


def draw_evaluations(
    table: Table, evaluations: Sequence[Evaluation], run: int, name: Callable[[str], str]
) -> dict[str, list[Piece]]:
    """The held-out loss of one run by time step, and its mean; nothing where none was measured."""
    if not evaluations:
        return {}
    steps = np.array([each.optimizer_step for each in evaluations], dtype=np.float64)
    order = np.argsort(table.step[table.kept], kind="stable")
    known = {axis: np.append(0.0, places[table.kept][order]) for axis, places in table.x.items()}
    x = {axis: shorten(np.interp(steps, known["steps"], known[axis])) for axis in AXES if axis in known}
    x["steps"] = shorten(steps)
    means: dict[str, list[float]] = {}
    for each in evaluations:
        whole = each.losses[np.isfinite(each.losses).all(axis=1)]
        by_step = whole.mean(axis=0) if len(whole) else np.full(len(each.timesteps), np.nan)
        for step, value in zip(each.timesteps, by_step.tolist(), strict=True):
            means.setdefault(f"time step {step}", []).append(value)
        means.setdefault("mean", []).append(float(by_step.mean()))
    pieces = []
    for label, values in means.items():
        if len(values) == len(steps) and np.isfinite(values).all():
            spots = shorten(np.array(values))
            pieces.append(Piece(name(label), run, 1, True, x, spots, spots, spots))
    return {"held_out": pieces} if pieces else {}
