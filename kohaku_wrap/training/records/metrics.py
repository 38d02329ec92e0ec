"""One line an optimizer step: loss, rates and speed, for people and for their plots."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import atomic_write, open_regular
from kohaku_wrap.training.records.attempts import Attempt, last_kept_steps, list_attempts
from kohaku_wrap.training.records.documents import is_whole
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.saving import wait_for_room

STEPS_LOOKED_AT = 500
"""The newest measured steps that the step time is taken from."""


BLOCK_BYTES = 1 << 20
"""Of lines that are parsed in one go."""

APART = ("sampling", "validating", "saving", "paused")
"""What takes time beside the optimizer steps; a line has `KIND_seconds` of it where there was some."""


STEPS_COMPARED = 8
"""Of two runs that are held beside each other."""

RATE_WINDOW_STEPS = 20
"""The newest optimizer steps that a rate and a mean loss are of."""


class NoMeasurement(KwrapError):
    """The run has measured no step yet."""


class MetricsWriter:
    """Appends to `metrics.jsonl`; used by rank 0 alone."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(attempt.run.metrics, flags, 0o644)
        size_bytes = os.fstat(self._descriptor).st_size
        is_torn = size_bytes and os.pread(self._descriptor, 1, size_bytes - 1) != b"\n"
        self._unwritten = b"\n" if is_torn else b""

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one optimizer step's line; the attempt is added. A full disk is waited out.

        Keys: `optimizer_step` (steps done, from 1), `epoch`, `micro_batch`, `loss`, `lr_unet`, `lr_text_encoder`,
        `seconds`, `images`, and `nan_latents` and `substitutes` where there are any. Numbers that JSON
        does not have are written as the words "nan", "inf" and "-inf".
        """
        plain = {key: plain_number(value) for key, value in line.items()}
        text = json.dumps({**plain, "attempt": self.attempt.number}, allow_nan=False)
        self._unwritten += text.encode() + b"\n"
        wait_for_room(self.attempt, self.write_out, int(line["optimizer_step"]), phase="step")

    def write_out(self) -> None:
        """Hand the line to the system; a full disk takes a part of it."""
        while self._unwritten:
            self._unwritten = self._unwritten[os.write(self._descriptor, self._unwritten) :]

    def close(self) -> None:
        os.close(self._descriptor)


def plain_number(value: Any) -> Any:
    """The value as JSON has it; non-finite floats as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def number_of(value: Any) -> float:
    """A number of a metrics line, where non-finite ones are words; NaN for what is not there."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def mean_of(lines: list[dict[str, Any]], name: str) -> float | None:
    """The mean of a column; None where it has no finite number."""
    values = [value for line in lines if (value := number_or_none(line.get(name))) is not None]
    return sum(values) / len(values) if values else None


def number_or_none(value: Any) -> float | None:
    """A number of a metrics line; None for what is not there or not finite."""
    number = number_of(value)
    return number if math.isfinite(number) else None


def read_metrics(run: Run) -> list[dict[str, Any]]:
    """The lines that count, by optimizer step: what a later attempt trained again is left out."""
    return keep_lines(iterate_lines(run.metrics), list_attempts(run))


def compare_losses(run: Run, other: Run) -> list[tuple[int, float, float]]:
    """Steps that both runs have, STEPS_COMPARED of them spread evenly, with the mean loss of each run up to there."""
    sides = [{int(line["optimizer_step"]): line for line in read_metrics(each)} for each in (run, other)]
    common = sorted(sides[0].keys() & sides[1].keys())
    chosen = sorted(
        {common[(at + 1) * len(common) // STEPS_COMPARED - 1] for at in range(STEPS_COMPARED)} if common else ()
    )
    found = []
    for step in chosen:
        within = [at for at in common if step - RATE_WINDOW_STEPS < at <= step]
        one, two = (mean_of([lines[at] for at in within], "loss") for lines in sides)
        if one is not None and two is not None:
            found.append((step, one, two))
    return found


def keep_lines(lines: Iterable[dict[str, Any]], attempts: list[Attempt]) -> list[dict[str, Any]]:
    """Of all lines those that count, by optimizer step."""
    kept = last_kept_steps(attempts)
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        step = line["optimizer_step"]
        if step <= kept.get(line.get("attempt", 0), math.inf):
            by_step[step] = line
    return [by_step[step] for step in sorted(by_step)]


def read_step_seconds(run: Run) -> float:
    """The median seconds of an optimizer step that a run measured. Raises NoMeasurement."""
    if not run.metrics.is_file():
        raise NoMeasurement(f"{run.metrics}: not there", "Name the folder of a run, or give --seconds-per-step.")
    newest = deque(iterate_lines(run.metrics), STEPS_LOOKED_AT)
    seconds = [value for line in newest if isinstance(value := line.get("seconds"), int | float) and value > 0]
    if not seconds:
        raise NoMeasurement(f"{run.metrics}: holds no measured step", "Give --seconds-per-step instead.")
    return float(statistics.median(seconds))


def write_metrics_table(run: Run, path: Path) -> None:
    """Write `read_metrics` as CSV for plots: a row an optimizer step, a column a key, empty where a line lacks it."""
    import pandas as pd

    with atomic_write(path) as stream:
        pd.DataFrame(read_metrics(run)).to_csv(stream, index=False)


def iterate_lines(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file from byte `start` on; torn ones are left out."""
    try:
        stream = open_regular(path)
    except OSError:
        return
    with stream:
        stream.seek(start)
        while data := stream.readlines(BLOCK_BYTES):
            yield from parse_lines(data)


def parse_lines(data: list[bytes]) -> Iterator[dict[str, Any]]:
    """Those of the lines that are whole: all in one go, and each by itself where one is not."""
    found: list[Any]
    try:
        # A line break within a list of JSON is nothing; a line of two values would be one too many.
        found = json.loads(b"[" + b",".join(data) + b"]")
    except (ValueError, RecursionError):
        found = []
    if len(found) != len(data):
        found = [parse_line(each.decode("utf-8", "replace")) for each in data]
    for line in found:
        if is_line(line):
            yield line


def is_line(line: Any) -> bool:
    """Whether it is one of the metrics."""
    return isinstance(line, dict) and is_whole(line.get("optimizer_step")) and is_whole(line.get("attempt", 0))


def parse_line(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


class MetricsTail:
    """Follows the metrics of one attempt as they are written."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.path = path
        self.attempt = attempt
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def new_lines(self) -> list[dict[str, Any]]:
        """The lines that came since the last call."""
        try:
            with open_regular(self.path) as stream:
                stream.seek(self._offset)
                data = stream.read()
        except OSError:
            return []
        self._offset += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        return [line for line in parse_lines(whole) if line.get("attempt") == self.attempt]
