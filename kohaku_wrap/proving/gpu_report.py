"""The report of `make gpu`: what was measured, what was not and why, as JSON and as tables for docs/measurements.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import write_text

SCHEMA_VERSION = 1
JSON_FILE, TABLE_FILE = "gpu-report.json", "gpu-report.md"
BEGIN, END = "<!-- make gpu: begin -->", "<!-- make gpu: end -->"
"""Between them docs/measurements.md holds the last report of full size."""

Status = Literal["ok", "failed", "not measured"]


class NoPlaceForReport(KwrapError):
    """The document has no place for the report."""


@dataclass(frozen=True)
class Measure:
    """One line of the report."""

    name: str
    """What was asked."""

    status: Status
    """`failed`: measured and beyond its bar, or the measurement itself failed."""

    result: str
    """What was found, or why it was not measured."""

    bar: str = ""
    """What it should reach; empty where nothing was promised."""

    numbers: Mapping[str, Any] = field(default_factory=dict)
    """The same for programs; names carry their units."""


@dataclass(frozen=True)
class Report:
    """All that one call measured."""

    scale: str
    """`full`: SDXL of full size on GPUs. `tiny`: the embedded world's model on a CPU, which proves the command only."""

    engine: str
    """builtin or sd-scripts."""

    machine: Mapping[str, Any]
    """torch, GPUs, versions."""

    measures: tuple[Measure, ...] = ()
    """In the order of measuring."""

    def with_measure(self, measure: Measure) -> Report:
        return replace(self, measures=(*self.measures, measure))

    @property
    def failed(self) -> list[Measure]:
        return [each for each in self.measures if each.status == "failed"]

    @property
    def not_measured(self) -> list[Measure]:
        return [each for each in self.measures if each.status == "not measured"]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "schema_version": SCHEMA_VERSION,
            "scale": self.scale,
            "engine": self.engine,
            "machine": dict(self.machine),
            "measures": [asdict(each) for each in self.measures],
            "not_measured": [each.name for each in self.not_measured],
            "ok": not self.failed,
        }

    def lines(self) -> Iterator[str]:
        """Markdown."""
        gpus = ", ".join(gpu["name"] for gpu in self.machine.get("gpus", ())) or "no GPU"
        versions = ", ".join(f"{name} {version}" for name, version in self.machine.get("versions", {}).items())
        yield f"Machine: {gpus}. Engine {self.engine}. {versions}."
        if self.scale == "tiny":
            yield "The model is the embedded world's tiny one: these lines prove the command, and measure no GPU."
        yield ""
        yield "| what | measured | bar |"
        yield "|---|---|---|"
        for each in self.measures:
            if each.status != "not measured":
                word = "**failed**: " if each.status == "failed" else ""
                yield f"| {each.name} | {word}{each.result.replace('|', '/')} | {each.bar} |"
        if self.not_measured:
            yield ""
            yield "Not measured:"
            yield ""
            for each in self.not_measured:
                yield f"- {each.name}: {each.result}"

    def write(self, folder: Path) -> None:
        """Both files into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / JSON_FILE, json.dumps(self.as_json(), indent=2) + "\n")
        write_text(folder / TABLE_FILE, "\n".join(self.lines()) + "\n")


def fill_document(document: Path, report: Report) -> None:
    """Put the report between the marks of a document. Raises NoPlaceForReport."""
    text = document.read_text(encoding="utf-8") if document.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise NoPlaceForReport(
            f"{document}: has no place for the report", f"Put the lines {BEGIN} and {END} where it should stand."
        )
    write_text(document, f"{before}{BEGIN}\n" + "\n".join(report.lines()) + f"\n{END}{after}")
