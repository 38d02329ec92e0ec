"""A page of `kwrap report` taken apart: its elements, its text, its data, and the points of its drawings."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from kohaku_wrap.cli import program
from kohaku_wrap.reporting.charts import HIGH, WIDE
from kohaku_wrap.training.records.folder import Run

HOSTILE = "<img src=x onerror=alert(1)>\"'&<!--‮"


class Page(HTMLParser):
    """The elements of a page, with the text of its data and of what people read."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.inside, self.embedded = "", "", ""
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.embedded)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = "data" if dict(attrs).get("id") == "data" else tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "data":
            self.embedded += data
        elif self.inside not in ("script", "style"):
            self.text += data

    def drawn_points(self, chart: str, axis: str) -> list[tuple[float, float]]:
        """The values of a chart's curves, taken back from the positions of the drawing."""
        points: list[tuple[float, float]] = []
        name = ""
        plot: dict[str, Any] = {}
        for tag, attributes in self.elements:
            name = attributes.get("data-chart") or name
            plot = attributes if "data-axis" in attributes else plot
            if tag == "path" and name == chart and plot.get("data-axis") == axis and "data-run" in attributes:
                low_x, high_x, low_y, high_y = (
                    float(str(plot[f"data-{side}"])) for side in ("x-low", "x-high", "y-low", "y-high")
                )
                for pair in str(attributes["d"]).removeprefix("M").split(" "):
                    x, y = map(float, pair.split(","))
                    points.append((low_x + x / WIDE * (high_x - low_x), high_y - y / HIGH * (high_y - low_y)))
        return points


def run_json(*words: object) -> Any:
    result = CliRunner().invoke(program, [*map(str, words), "--json"])
    assert result.exit_code in (0, 1), result.stderr
    return json.loads(result.stdout)


def make_page(*runs: Run, out: Path | None = None) -> Page:
    words = [str(run.folder) for run in runs]
    page = Path(run_json("report", *words, *(("-o", out) if out else ()))["page"])
    return Page(page)
