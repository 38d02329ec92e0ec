"""A run's metrics in other tools: TensorBoard, Weights & Biases and trackio, each optimizer step once, in one line.

All three are written from `metrics.jsonl`, never by the trainer: so both engines log the same, a resume goes on in the
same line, and what a tool has not got is written from the file later.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from glob import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from kohaku_wrap.config.fates import list_decisive
from kohaku_wrap.config.needs import list_trackers
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import read_json, read_regular, write_json
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.trainer.options import flatten_sections
from kohaku_wrap.training.records.documents import is_whole
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.metrics import read_metrics

PROJECT = "network_train"
"""What sd-scripts calls it where `log_tracker_name` is not set."""

NOT_LOGGED = ("optimizer_step", "attempt")
ID_LENGTH = 8


class NoTracker(KwrapError):
    """The package of a tool is not installed."""


@dataclass(frozen=True)
class Logbook:
    """Where the metrics of a run go, the same for all its attempts."""

    trackers: tuple[str, ...]
    """What `log_with` names; empty for none."""

    folder: Path
    """Holds what they write, absolute."""

    run_id: str
    """Of the line; that of the run."""

    name: str
    """What people see: the name that the run was made with, or `wandb_run_name`."""

    project: str = PROJECT
    """`log_tracker_name`, for tools that have projects."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """The options that decide the weights, where `log_config` is set."""

    given: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By tracker what `log_tracker_config` of the site's `[secrets]` gives it."""


def read_logbook(run: Run, secrets: Mapping[str, Any] | None = None) -> Logbook:
    """What trainer.toml asks for; a folder that several runs share gets one of its own for this one."""
    options: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        options = flatten_sections(parse_toml(read_regular(run.trainer_config)))
    run_id, made_as = run.lock.run_id or run.output_name, run.output_name
    folder = Path(options.get("logging_dir") or run.logs)
    if not folder.is_relative_to(run.folder):
        folder = folder / f"{options.get('log_prefix') or ''}{made_as}-{run_id[:ID_LENGTH]}"
    return Logbook(
        list_trackers(options),
        folder.absolute(),
        run_id,
        str(options.get("wandb_run_name") or made_as),
        str(options.get("log_tracker_name") or PROJECT),
        dict(list_decisive(run.lock.tables)) if options.get("log_config") else {},
        read_given(secrets or {}),
    )


def read_given(secrets: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables of the file that `log_tracker_config` names. Raises OSError, ValueError."""
    file = secrets.get("log_tracker_config")
    return dict(parse_toml(read_regular(Path(file)))) if file else {}


class Tracker(Protocol):
    """One tool, open for the line of one run."""

    last_step: int
    """The last optimizer step that it has; later ones are to be written."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the numbers of one step; the caller notes it as the last one."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files; what they hold is read from them, so that not even a killed writer makes a step stand twice."""

    def __init__(self, book: Logbook) -> None:
        self.folder, self.suffix = book.folder, f".{book.run_id[:ID_LENGTH]}"
        self.last_step = max((read_last_step(path) for path in book.folder.glob(f"*{escape(self.suffix)}")), default=0)
        self.writer: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One event with all numbers of the step, whole or not there."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self.writer is None:
            self.writer = EventFileWriter(str(self.folder), filename_suffix=self.suffix)
        numbers = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=numbers)))

    def flush(self) -> None:
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def read_last_step(path: Path) -> int:
    """The largest step of an event file; what a crash cut off is not read."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    return max((int(Event.FromString(data).step) for data in RawEventFileLoader(str(path)).Load()), default=0)


class Line:
    """The line of a run as the package of a tool holds it open."""

    line: Any
    last_step: int

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.line.log(dict(values), step=step)

    def close(self) -> None:
        self.line.finish()


class WeightsAndBiases(Line):
    """A line of Weights & Biases under the run's id; its server leaves out a step that came twice.

    It cannot be asked offline what it has: a file beside its own says so, by run id.
    """

    def __init__(self, book: Logbook) -> None:
        import wandb

        self.mark = book.folder / f"wandb-{book.run_id[:ID_LENGTH]}.json"
        last_step = read_json(self.mark).get("last_step")
        self.last_step = last_step if is_whole(last_step) else 0
        book.folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(console="off", quiet=True, disable_git=True, disable_code=True, x_disable_stats=True)
        chosen = {
            "project": book.project,
            "name": book.name,
            "config": dict(book.config),
            **book.given.get("wandb", {}),
        }
        self.line = wandb.init(dir=str(book.folder), id=book.run_id, resume="allow", settings=settings, **chosen)

    def flush(self) -> None:
        """Called after what was written is with the tool."""
        write_json(self.mark, {"last_step": self.last_step}, None)


class Trackio(Line):
    """A line of trackio, in a database of its own in the folder, which is asked what it has."""

    def __init__(self, book: Logbook) -> None:
        # trackio reads it when it is imported.
        os.environ["TRACKIO_DIR"] = str(book.folder)
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        # Runs of one name would be one line in a folder that several share.
        chosen = {"project": book.project, "name": f"{book.name}-{book.run_id[:ID_LENGTH]}"}
        chosen |= dict(book.given.get("trackio", {}))
        self.last_step = int(SQLiteStorage.get_max_step_for_run(chosen["project"], chosen["name"]) or 0)
        self.line = trackio.init(config=dict(book.config), resume="allow", embed=False, **chosen)

    def flush(self) -> None:
        """Left to trackio, which sends in a thread of its own."""


TRACKERS: Mapping[str, Callable[[Logbook], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def write_lines(tracker: Tracker, lines: Iterable[Mapping[str, Any]]) -> int:
    """Write the lines of steps that the tracker does not have yet; how many."""
    count = 0
    for line in lines:
        step = int(line["optimizer_step"])
        if step > tracker.last_step:
            tracker.write(step, pick_numbers(line))
            tracker.last_step = step
            count += 1
    if count:
        tracker.flush()
    return count


def write_all(run: Run, name: str, folder: Path) -> tuple[Path, int, int]:
    """Write the metrics that count to a folder of the run's own in `folder`: its path, steps written, the last step.

    Raises NoTracker where the package is missing.
    """
    if find_spec(name) is None:
        raise NoTracker(f"{name} is not installed", f"Install it with: pip install {name}")
    book = read_logbook(run)
    book = replace(book, folder=folder.absolute() / f"{run.output_name}-{book.run_id[:ID_LENGTH]}")
    tracker = TRACKERS[name](book)
    try:
        count = write_lines(tracker, read_metrics(run))
    finally:
        tracker.close()
    return book.folder, count, tracker.last_step


def pick_numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics under their names there; words such as "nan" as the numbers that they mean."""
    numbers = {}
    for name, value in line.items():
        if name not in NOT_LOGGED:
            with suppress(TypeError, ValueError):
                numbers[name] = float(value)
    return numbers
