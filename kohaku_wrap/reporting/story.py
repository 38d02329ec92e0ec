"""What happened to a run, in words: what it is, where it stands, whether it is proved, what needs attention first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from kohaku_wrap.errors import command_line
from kohaku_wrap.files import read_json
from kohaku_wrap.reporting.charts import Mark
from kohaku_wrap.reporting.curves import AXES, Table
from kohaku_wrap.training.records.attempts import ATTEMPT_FILE, Attempt, last_kept_steps
from kohaku_wrap.training.records.documents import is_whole
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.verification import Verdict
from kohaku_wrap.training.supervising.status import AttemptStatus, RunStatus
from kohaku_wrap.wording import count_of, format_duration

CONDITIONS = {
    "new": "not begun",
    "running": "running",
    "finished": "finished",
    "stopped": "stopped by a person",
    "failed": "failed",
    "interrupted": "interrupted",
}
SILENT_SECONDS = 600.0
"""Without a sign of life for so long a run that counts as running is named."""


@dataclass(frozen=True)
class Chapter:
    """One attempt as the page tells it."""

    status: AttemptStatus
    """As `kwrap status` tells it."""

    began: str
    """What it started from."""

    counts_to: int
    """The last of its optimizer steps that counts."""

    started: str
    """When, where it is recorded."""

    ended: str
    """When, where it has ended."""

    accepted: tuple[str, ...]
    """What the person accepted."""

    @property
    def repeated(self) -> int:
        """Optimizer steps that a later attempt trained again."""
        return max(0, self.status.optimizer_step - self.counts_to)


def show_time(unix_seconds: float | None) -> str:
    """A moment for people, in UTC; empty for none."""
    try:
        return datetime.fromtimestamp(unix_seconds, UTC).strftime("%-d %b %Y, %H:%M UTC") if unix_seconds else ""
    except (OverflowError, ValueError, OSError):
        return ""


def describe_kind(run: Run) -> str:
    """What the run trains, in one phrase."""
    lock = run.lock
    module, algo = str(lock.values.get("network_module", "")), str(lock.table("network_args").get("algo", ""))
    network = f"LyCORIS {algo}" if algo else module or "network"
    origin = lock.table("run")
    dataset = f" on {lock.images:,} images of {origin['dataset']}" if origin.get("dataset") else ""
    parent = f", trained on from {lock.parent_network}" if lock.parent_network else ""
    return f"{network} by the template {origin.get('template', '?')}{dataset}, engine {lock.engine}{parent}"


def describe_standing(status: RunStatus, now: float) -> str:
    """Where the run stands, and when it ends."""
    done, total = status.optimizer_step, status.total_optimizer_steps
    if status.condition == "finished":
        ended = show_time(next((each.ended_unix_seconds for each in reversed(status.attempts)), None))
        return f"finished: all {count_of(total, 'optimizer step')} are done{f', {ended}' if ended else ''}"
    at = f"{CONDITIONS[status.condition]} at optimizer step {done:,} of {total:,} ({done / max(total, 1):.1%})"
    if status.eta_seconds is not None:
        return f"{at}, ends in {format_duration(status.eta_seconds)}, about {show_time(now + status.eta_seconds)}"
    if status.seconds_per_step and status.condition != "new":
        return f"{at}; the rest would take {format_duration((total - done) * status.seconds_per_step)}"
    return at


def describe_proof(verdict: Verdict, name: str) -> str:
    """Whether it is proved, with what that word is bound to."""
    again = command_line("verify", name)
    when = show_time(verdict.unix_seconds)
    left_out = verdict.not_looked_at
    except_for = f"; not looked at: {'; '.join(left_out)}" if left_out else "; nothing was left out"
    if verdict.standing == "proved":
        return f"proved up to step {verdict.optimizer_step:,} by verify on {when}{except_for}"
    if verdict.standing == "partly":
        grew = "the ledger grew since"
        return f"verified up to step {verdict.optimizer_step:,} on {when}, {grew}: {again}{except_for}"
    if verdict.standing == "faults":
        kinds = "; ".join(
            f"{each.get('kind')}: {each.get('what')}" for each in (verdict.report or {}).get("faults", ())
        )
        return f"NOT proved: verify found faults on {when}: {kinds}"
    if verdict.standing == "changed":
        return f"not verified: {verdict.why} since {when}: {again}"
    return f"not verified: {again}"


def tell_attempts(attempts: Sequence[Attempt], status: RunStatus) -> list[Chapter]:
    """Each attempt: from what it began, how far it counts, how it ended."""
    limits = last_kept_steps(list(attempts))
    told = {each.number: each for each in status.attempts}
    chapters = []
    for attempt in attempts:
        one = told[attempt.number]
        record = read_json(attempt.folder / ATTEMPT_FILE)
        started = record.get("started_unix_seconds")
        accepted = (*one.allow, *(f"{where}: {what}" for where, what in attempt.differences.items()))
        chapters.append(
            Chapter(
                one,
                describe_beginning(attempt),
                int(min(limits.get(attempt.number, math.inf), one.optimizer_step)),
                show_time(started if isinstance(started, int | float) else None),
                show_time(one.ended_unix_seconds),
                accepted,
            )
        )
    return chapters


def describe_beginning(attempt: Attempt) -> str:
    """What an attempt started from."""
    at = f"step {attempt.start_optimizer_step:,}"
    if attempt.lineage:
        return f"a state of another run, {str(attempt.lineage.get('run_id', ''))[:12] or 'unknown'}, at {at}"
    if attempt.foreign:
        return f"a state of plain sd-scripts at {at}"
    if attempt.state is None:
        return "the beginning"
    return f"the state of {at}"


def list_marks(run: Run, place: int, attempts: Sequence[Attempt], table: Table) -> Iterator[Mark]:
    """Resumes, extensions and states of other runs, where they stand on each axis."""
    named = f"{run.name}: "
    for attempt in attempts:
        rows = np.flatnonzero(table.attempt == attempt.number)
        if not len(rows) or (attempt.number == 1 and not attempt.start_optimizer_step):
            continue
        kind = "branch" if attempt.lineage or attempt.foreign else "resume"
        text = f"{named}attempt {attempt.number} from {describe_beginning(attempt)}"
        yield Mark(kind, place, where_is(table, rows[0], attempt.start_optimizer_step), text)
    for chapter in run.lock.chapters[1:]:
        rows = np.flatnonzero(table.kept & (table.step > chapter.from_optimizer_step))
        if len(rows):
            text = f"{named}extended at step {chapter.from_optimizer_step:,} to {chapter.total_optimizer_steps:,} steps"
            yield Mark("extend", place, where_is(table, rows[0], chapter.from_optimizer_step), text)


def where_is(table: Table, row: int, step: int) -> dict[str, float]:
    """The place of an event before the step of a row, by axis."""
    at = {axis: float(table.x[axis][row]) for axis in AXES}
    before = np.flatnonzero(table.step[:row] == step)
    images = float(table.x["images"][before[-1]]) if len(before) else at["images"]
    return {**at, "steps": float(step), "images": images}


def list_attention(
    status: RunStatus, chapters: Sequence[Chapter], lines: Sequence[Mapping[str, Any]], verdict: Verdict
) -> Iterator[str]:
    """What a person should look at first; nothing where all is well."""
    if verdict.standing == "faults":
        yield "verify found faults: the run is not what its ledger should tell"
    newest = status.attempts[-1].number if status.attempts else 0
    if status.last_error.startswith(f"attempt {newest}:"):
        yield f"{status.last_error}{f'. {status.advice}' if status.advice else ''}"
    if status.condition == "running" and (status.silent_seconds or 0.0) > SILENT_SECONDS:
        yield f"no sign of life for {format_duration(status.silent_seconds or 0.0)}"
    if status.skipped_steps:
        yield f"{count_of(status.skipped_steps, 'optimizer step')} skipped: the weights stayed as they were there"
    if status.non_finite_steps:
        yield f"{count_of(status.non_finite_steps, 'optimizer step')} with a loss that is no number"
    for chapter in chapters:
        one = chapter.status
        if chapter.repeated:
            yield (
                f"optimizer steps {chapter.counts_to + 1:,} to {one.optimizer_step:,} of attempt {one.number} do not "
                "count: they were trained again"
            )
        if one.end == "hang":
            yield f"attempt {one.number} hung: {one.message}"
    damaged = [f"{state.optimizer_step:,}" for state in status.states if not state.is_sealed]
    if damaged:
        yield f"damaged states: optimizer step {', '.join(damaged)}"
    for name, what in (
        ("substitutes", "missing or unreadable, another one was trained in its place"),
        ("nan_latents", "with latents that are no numbers"),
    ):
        found = sum(line[name] for line in lines if name in line and is_whole(line[name]))
        if found:
            yield f"{count_of(found, 'image')} {what}"
