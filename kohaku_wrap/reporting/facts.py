"""All that the page tells of one run, read from its own records; no image, caption or model is opened."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.config.run_files import LAYERS_FILE, flatten
from kohaku_wrap.config.schema import ARGUMENT_TABLES
from kohaku_wrap.errors import command_line
from kohaku_wrap.files import read_json
from kohaku_wrap.formats.data_summary import read_summary
from kohaku_wrap.reporting.charts import Mark
from kohaku_wrap.reporting.curves import Piece, Table, draw_curves, draw_evaluations, tabulate
from kohaku_wrap.reporting.evaluations import Evaluation, read_evaluations
from kohaku_wrap.reporting.pictures import Gallery, make_gallery
from kohaku_wrap.reporting.story import (
    Chapter,
    describe_kind,
    describe_proof,
    describe_standing,
    list_attention,
    list_marks,
    tell_attempts,
)
from kohaku_wrap.reporting.way import Step, follow_way
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.evaluations import read_evaluations as read_validation
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.metrics import iterate_lines, keep_lines
from kohaku_wrap.training.records.verification import Verdict, judge_verification
from kohaku_wrap.training.supervising.status import RunStatus, read_status
from kohaku_wrap.wording import show_path

OPTION_TABLES = {"values": "", "dataset": "dataset_options.", **{name: f"{name}." for name in ARGUMENT_TABLES},
                 "samples": "samples.", "cache": "cache.", "states": "states.", "preset": "preset."}  # fmt: skip
"""The lock's tables of options, and how their keys begin in a template's layers."""

OF_THE_MOMENT = frozenset(("disk_free_bytes", "disk_used_bytes", "silent_seconds", "folder", "samples"))
"""Of a status: what nobody elsewhere can look at."""

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Option:
    """One option of the run."""

    key: str
    """As a template has it."""

    value: Any
    """As the lock has it."""

    origin: str
    """The layer that set it, and its file; `default`, or that it is not recorded."""


@dataclass(frozen=True)
class RunFacts:
    """One run on the page."""

    run: Run
    """The run."""

    place: int
    """Among the runs of the page, from 0."""

    command_name: str
    """What one types for it."""

    status: RunStatus
    """As `kwrap status` tells it."""

    verdict: Verdict
    """What the kept result of `verify` is worth now."""

    kind: str
    """What it is."""

    standing: str
    """Where it stands, and when it ends."""

    proof: str
    """Whether it is proved."""

    attention: tuple[str, ...]
    """What needs attention first."""

    chapters: tuple[Chapter, ...]
    """Its attempts."""

    marks: tuple[Mark, ...]
    """What happened where."""

    curves: Mapping[str, list[Piece]]
    """By chart."""

    options: tuple[Option, ...]
    """All of them."""

    evaluations: tuple[Evaluation, ...]
    """What `kwrap evaluate` found of it."""

    data: Mapping[str, Any]
    """What was kept of its data at a glance; empty where nothing was."""

    gallery: Gallery
    """What was drawn of it."""

    way: tuple[Step, ...]
    """From the database to merges."""

    @property
    def sentence(self) -> str:
        return f"{self.run.name}: {self.kind}; {self.standing}; {self.proof}."

    def document(self, *, is_public: bool = False) -> dict[str, Any]:
        """The run as the page's JSON has it; `status` and `verify` equal what these commands print.

        `is_public`: without what is true of the machine at this moment.
        """
        status = self.status.document()
        return {
            "name": self.run.name,
            "sentence": self.sentence,
            "status": {name: value for name, value in status.items() if not is_public or name not in OF_THE_MOMENT},
            "verify": self.verdict.report,
            "verification": {
                "standing": self.verdict.standing,
                "optimizer_step": self.verdict.optimizer_step,
                "unix_seconds": self.verdict.unix_seconds,
                "not_looked_at": self.verdict.not_looked_at,
            },
            "attention": self.attention,
            "marks": [asdict(mark) for mark in self.marks],
            "charts": {name: [vars(piece) for piece in pieces] for name, pieces in self.curves.items()},
            "evaluation": {each.file: each.document for each in self.evaluations},
            "data": {name: value for name, value in self.data.items() if name != "examples"},
            "pictures": self.gallery.document(),
            "way": [asdict(step) for step in self.way],
        }


def read_facts(run: Run, place: int = 0, several: bool = False, page_folder: Path | None = None) -> RunFacts:
    """Read one run; `place`: among the runs of the page, which will lie in `page_folder`.

    Raises what reading its lock and attempts raises.
    """
    attempts = list_attempts(run)
    lines = list(iterate_lines(run.metrics))
    kept = keep_lines(lines, attempts)
    status = read_status(run, kept)
    verdict = judge_verification(run, attempts)
    table = tabulate(lines, attempts, run.lock.effective_batch)
    chapters = tell_attempts(attempts, status)
    typed = show_path(run.folder)
    data = read_data(run)
    return RunFacts(
        run=run,
        place=place,
        command_name=typed,
        status=status,
        verdict=verdict,
        kind=describe_kind(run),
        standing=describe_standing(status, time.time()),
        proof=describe_proof(verdict, typed),
        attention=tuple(list_attention(status, chapters, kept, verdict)),
        chapters=tuple(chapters),
        marks=tuple(list_marks(run, place, attempts, table)),
        curves=name_curves(run, place, table, several),
        options=tuple(list_options(run)),
        evaluations=tuple(read_evaluations(run)),
        data=data,
        gallery=make_gallery(run, page_folder),
        way=tuple(follow_way(run, data)),
    )


def name_curves(run: Run, place: int, table: Table, several: bool) -> Mapping[str, list[Piece]]:
    """The run's curves, labelled with its name where the page has several runs."""

    def name(label: str) -> str:
        return f"{run.name}: {label}" if several else label

    return draw_curves(table, place, name) | draw_evaluations(table, list(read_validation(run)), place, name)


def list_options(run: Run) -> Iterator[Option]:
    """Every option of the lock, with the layer that set it where the run recorded that."""
    origins = read_layers(run)
    for table, start in OPTION_TABLES.items():
        for key, value in flatten(run.lock.table(table)):
            if table == "values" and key in ARGUMENT_TABLES:
                continue
            name = start + key
            layer = "preset" if table == "preset" else name
            yield Option(name, value, NOT_RECORDED if origins is None else origins.get(layer, "default"))


def read_layers(run: Run) -> dict[str, str] | None:
    """The layer of each option that one set, by key; None where the run did not record them, as before 0.2."""
    return {key: str(origin) for key, origin in read_json(run.folder / LAYERS_FILE).items()} or None


def read_data(run: Run) -> dict[str, Any]:
    """The summary that the run kept of its data, else the one beside the same captions."""
    digest = run.lock.dataset_digest
    places = (run.folder, Path(str(run.lock.table("inputs").get("images", ""))))
    return next((found for place in places if (found := read_summary(place, digest))), {})


def list_versions(run: Run) -> dict[str, str]:
    """kwrap, Python, the trainer and its packages."""
    lock = run.lock
    trainer = {"sd-scripts": lock.trainer_commit} if lock.trainer_commit else {}
    own = {"kwrap": lock.table("run").get("kwrap_version", ""), "Python": lock.table("machine").get("python", "")}
    return {**own, **trainer, **{name: str(version) for name, version in lock.table("versions").items()}}


def describe_machine(run: Run) -> dict[str, Any]:
    """The machine without private names: no address, no path."""
    named = {"gpus", "processes", "workers", "platform", "batch_per_gpu"}
    machine = {name: value for name, value in run.lock.table("machine").items() if name in named}
    return {**machine, **{f"kernels.{name}": value for name, value in run.lock.table("kernels").items()}}


def next_command(facts: RunFacts) -> str:
    """What to type next for this run."""
    if facts.status.condition == "running":
        return command_line("status", facts.command_name, "--watch")
    if facts.status.condition != "finished":
        return facts.status.advice or command_line("resume", facts.command_name)
    return command_line("verify", facts.command_name) if facts.verdict.standing != "proved" else ""
