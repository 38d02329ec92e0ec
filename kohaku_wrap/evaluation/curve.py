"""Sorted scores of several models, laid over each other as an SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDE, HIGH, LEFT, TOP, BELOW = 640, 320, 44, 34, 40
COLOURS = ("#2563c9", "#d1462f", "#2f8f4e", "#8b46c1", "#b9770e", "#0e8a99", "#c23a7d", "#5b6472")
STYLE = "text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}.curve{fill:none;stroke-width:2}"


def draw_curves(curves: Sequence[tuple[str, Sequence[float]]], title: str, note: str) -> str:
    """An SVG of scores from 0 to 1, the highest first; each curve is as wide as it has characters."""
    most = max([len(values) for _, values in curves], default=1)
    height = TOP + HIGH + BELOW + 18 * len(curves)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDE + 16}" height="{height}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{LEFT}" y="18">{escape(title)}</text>',
    ]
    for tenth in range(0, 11, 2):
        y = TOP + HIGH * (1 - tenth / 10)
        parts.append(f'<path class="grid" d="M{LEFT},{y:.1f}h{WIDE}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tenth / 10:g}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP + HIGH + 16}">1</text>')
    parts.append(f'<text x="{LEFT + WIDE}" y="{TOP + HIGH + 16}" text-anchor="end">{most:,} characters</text>')
    for number, (name, values) in enumerate(curves):
        points = [
            f"{LEFT + WIDE * place / max(most - 1, 1):.1f},{TOP + HIGH * (1 - value):.1f}"
            for place, value in enumerate(sorted(values, reverse=True))
        ]
        colour = COLOURS[number % len(COLOURS)]
        if points:
            ends = " ".join(points if len(points) > 1 else points * 2)
            parts.append(f'<path class="curve" stroke="{colour}" stroke-linecap="round" d="M{ends}"/>')
        y = TOP + HIGH + BELOW + 18 * number
        parts.append(f'<path class="curve" stroke="{colour}" d="M{LEFT},{y - 4}h24"/>')
        parts.append(f'<text x="{LEFT + 32}" y="{y}">{escape(name)}</text>')
    parts.append(f'<text x="{LEFT + WIDE}" y="18" text-anchor="end">{escape(note)}</text></svg>\n')
    return "\n".join(parts)
