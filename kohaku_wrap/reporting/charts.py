"""Charts as SVG: curves with bands, marks and a grid; positions in percent, so that text keeps its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from kohaku_wrap.reporting.curves import Piece

WIDE, HIGH = 1000.0, 200.0
"""Units of the plane that curves are drawn in; the page stretches it."""

COLOURS = 8
"""Classes `c0` to `c7` of the page's style."""

MARGIN = 0.06
"""Of the height, above the highest and below the lowest value."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: a line across the charts."""

    kind: str
    """`resume`, `extend`, `branch` or `state`."""

    run: int
    """The place of its run on the page."""

    x: dict[str, float]
    """Where, by axis."""

    text: str
    """What, in a few words."""


@dataclass(frozen=True)
class Range:
    """From the lowest to the highest number of an axis."""

    low: float
    """The first one shown."""

    high: float
    """The last one, above `low`."""

    def place(self, value: float) -> float:
        """Where it stands, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def span(values: Sequence[float], *, from_zero: bool = False, margin: float = 0.0) -> Range:
    """The range of values, never empty."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = min(low, 0.0) if from_zero else low
    if high <= low:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
    spare = (high - low) * margin
    return Range(low if from_zero else low - spare, high + spare)


def choose_ticks(within: Range, most: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers within a range, at most so many and one; `whole`: of things that have no half, such as steps."""
    rough = (within.high - within.low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    sizes = [power * factor for factor in (1, 2, 2.5, 5, 10)]
    step = next((size for size in sizes if size >= rough * 0.999 and not (whole and size % 1)), 1.0)
    first, last = math.ceil(within.low / step - 1e-9), math.floor(within.high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def show_number(value: float) -> str:
    """A number of an axis: with its thousands, or in powers of ten where it is tiny."""
    if value and abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.4g}"


def draw_path(xs: Sequence[float], ys: Sequence[float], x_range: Range, y_range: Range) -> str:
    """The points as an SVG path on the plane."""
    points = (
        f"{x_range.place(x) * WIDE:.1f},{HIGH - y_range.place(y) * HIGH:.2f}" for x, y in zip(xs, ys, strict=True)
    )
    return "M" + " ".join(points)


def colour_of(piece: Piece, pieces: Sequence[Piece], runs: int) -> int:
    """Runs have colours where there are several, otherwise attempts, or columns where one attempt has several."""
    if runs > 1:
        return piece.run % COLOURS
    labels = list(dict.fromkeys(each.label for each in pieces))
    return (labels.index(piece.label) if len(labels) > 1 else piece.attempt - 1) % COLOURS


def draw_chart(
    pieces: Sequence[Piece], marks: Sequence[Mark], axis: str, title: str, runs: int, *, from_zero: bool
) -> Markup:
    """The pieces over one axis. What does not count is drawn dashed; `title` is for those who cannot see it."""
    x_range = span([x for piece in pieces for x in piece.x[axis]], from_zero=True)
    y_range = span([y for piece in pieces for y in (*piece.low, *piece.high)], from_zero=from_zero, margin=MARGIN)
    parts = [
        f'<svg class="plot" data-axis="{escape(axis)}" data-x-low="{x_range.low}" data-x-high="{x_range.high}" '
        f'data-y-low="{y_range.low}" data-y-high="{y_range.high}" role="img" aria-label="{escape(title)}">',
        f'<svg class="plane" width="100%" height="{HIGH:.0f}" viewBox="0 0 {WIDE:.0f} {HIGH:.0f}" '
        'preserveAspectRatio="none" aria-hidden="true">',
    ]
    ticks = choose_ticks(y_range, 4)
    parts += [
        f'<path class="grid" d="M0,{(y := HIGH - y_range.place(each) * HIGH):.2f} {WIDE:.0f},{y:.2f}"/>'
        for each in ticks
    ]
    parts += [
        f'<path class="mark {escape(mark.kind)}" d="M{(x := x_range.place(mark.x[axis]) * WIDE):.1f},0 {x:.1f},'
        f'{HIGH:.0f}"><title>{escape(mark.text)}</title></path>'
        for mark in marks
    ]
    for piece in sorted(pieces, key=lambda each: each.kept):
        xs = piece.x[axis]
        classes = f"c{colour_of(piece, pieces, runs)}{'' if piece.kept else ' left'}"
        about = f'data-run="{piece.run}" data-attempt="{piece.attempt}" data-label="{escape(piece.label)}"'
        band = draw_path([*xs, *reversed(xs)], [*piece.low, *reversed(piece.high)], x_range, y_range)
        parts.append(f'<path class="band {classes}" d="{band}Z"/>')
        parts.append(f'<path class="curve {classes}" {about} d="{draw_path(xs, piece.value, x_range, y_range)}"/>')
    parts.append('<path class="cursor" d=""/></svg>')
    for each in ticks:
        y = HIGH - y_range.place(each) * HIGH
        parts.append(f'<text class="tick" x="3" y="{max(y - 3, 9):.1f}">{show_number(each)}</text>')
    for each in choose_ticks(x_range, 5, whole=axis in ("steps", "images")):
        place = x_range.place(each)
        anchor = "start" if place < 0.03 else "end" if place > 0.97 else "middle"
        parts.append(
            f'<text class="tick" x="{place * 100:.2f}%" y="{HIGH + 15:.0f}" text-anchor="{anchor}">'
            f"{show_number(each)}</text>"
        )
    return Markup("".join([*parts, "</svg>"]))
