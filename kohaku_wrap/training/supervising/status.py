"""What a run is doing and what happened to it, read from its folder without disturbing it."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kohaku_wrap.locks import is_lock_free
from kohaku_wrap.training.records.attempts import Attempt, list_attempts
from kohaku_wrap.training.records.bad_steps import BadSteps
from kohaku_wrap.training.records.evaluations import read_last_evaluation
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.manifest import DamagedState, read_manifest
from kohaku_wrap.training.records.metrics import (
    APART,
    RATE_WINDOW_STEPS,
    mean_of,
    number_of,
    number_or_none,
    read_metrics,
)
from kohaku_wrap.training.records.networks import is_finished
from kohaku_wrap.training.records.samples import TRAINER_FOLDER, list_pictures
from kohaku_wrap.training.records.signs import Heartbeat, read_boot_id
from kohaku_wrap.training.records.states import list_states
from kohaku_wrap.training.supervising.ends import AttemptEnd, advice_after, read_end, steps_done

Condition = Literal["new", "running", "finished", "stopped", "failed", "interrupted"]

WAITS = {
    "start-up": "the models to load, the first optimizer step and its state",
    "paused": "room on the disk, then a state",
    "sampling": "the samples, then a state",
    "validating": "the held-out posts to be measured, then a state",
    "step": "the optimizer step to end, then a state",
    "saving": "the state to be saved",
}
"""What a stop waits for in each phase, the longest wait first."""


@dataclass(frozen=True)
class AttemptStatus:
    """One attempt's story."""

    number: int
    """Counted from 1."""

    start_optimizer_step: int
    """Optimizer steps done before it."""

    optimizer_step: int
    """Optimizer steps done, as far as it got."""

    processes: int
    """W."""

    accumulation: int
    """A."""

    state: str | None
    """The state that it loaded."""

    allow: tuple[str, ...]
    """What the person accepted."""

    end: str
    """How it ended, as in AttemptEnd; `running`, or `interrupted` when its supervisor was killed too."""

    message: str
    """One line for people."""

    ended_unix_seconds: float | None
    """When."""


@dataclass(frozen=True)
class StateStatus:
    """One state on the disk."""

    optimizer_step: int
    """Optimizer steps done."""

    size_bytes: int
    """Of its files; 0 when its manifest is damaged."""

    is_sealed: bool
    """Whether its manifest is right; the files' content is read by `kwrap resume`."""


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment."""

    run: Run
    """The run."""

    condition: Condition
    """In one word."""

    optimizer_step: int
    """Optimizer steps done on the current line."""

    total_optimizer_steps: int
    """Of the whole run."""

    epoch: int
    """Counted from 0, of the next optimizer step."""

    loss: float | None
    """Of the last optimizer step."""

    mean_loss: float | None
    """Of the last RATE_WINDOW_STEPS optimizer steps."""

    held_out_loss: float | None
    """Of the last evaluation of held-out posts; None where there is none."""

    held_out_optimizer_step: int | None
    """After which that was."""

    learning_rates: dict[str, float]
    """Of the last optimizer step, by `lr_…`."""

    skipped_steps: int
    """Optimizer steps on the current line that the GradScaler skipped."""

    non_finite_steps: int
    """Optimizer steps on the current line whose loss was no number."""

    bad_steps_in_a_row: int
    """The latest optimizer steps, without a gap, that were skipped or had such a loss."""

    seconds_per_step: float | None
    """Mean of the last RATE_WINDOW_STEPS optimizer steps."""

    eta_seconds: float | None
    """Until the last step at that rate; None unless it runs."""

    phase: str
    """What the ranks do now; empty unless it runs."""

    stop_waits_for: str
    """What a stop that was asked for waits for; empty without one."""

    apart_seconds: dict[str, float]
    """Time beside the optimizer steps: sampling, saving, pauses; of the steps on the current line."""

    silent_seconds: float | None
    """Since the last sign of life; None unless it runs, and where it was left on another boot or machine."""

    attempts: tuple[AttemptStatus, ...]
    """In order."""

    states: tuple[StateStatus, ...]
    """Ascending."""

    samples: Path | None
    """Where its pictures lie; None where none are asked for."""

    samples_waiting: tuple[int, ...]
    """Optimizer steps of the networks whose pictures kwrap has not drawn yet."""

    last_error: str
    """Of the newest attempt that failed; empty without one."""

    advice: str
    """What to do first where a resume would only meet the same fault; empty where it goes on."""

    disk_free_bytes: int
    """Where the run lies."""

    disk_used_bytes: int
    """By its states and checkpoints."""

    def document(self) -> dict[str, Any]:
        """As `status --json` and the data of a run's page have it; paths are Path."""
        chapters = [chapter.document() for chapter in self.run.lock.chapters]
        return {**asdict(self), "run": self.run.name, "folder": self.run.folder, "chapters": chapters}


def read_status(run: Run, lines: list[dict[str, Any]] | None = None) -> RunStatus:
    """The run as its files show it now; `lines`: what `read_metrics` gives, where that was read already."""
    attempts = list_attempts(run)
    ends = {attempt.number: read_end(attempt) for attempt in attempts}
    told = tuple(describe_attempt(attempt, ends[attempt.number]) for attempt in attempts)
    lines = read_metrics(run) if lines is None else lines
    bad_steps = BadSteps.of_lines(lines)
    running = bool(told) and told[-1].end == "running"
    # As `train` counts: the steps of the attempt that runs.
    own = [line for line in lines if line.get("attempt") == attempts[-1].number] if running else lines
    recent = own[-RATE_WINDOW_STEPS:]
    last = lines[-1] if lines else {"optimizer_step": 0}
    done = int(last["optimizer_step"])
    done = max([done, *(attempt.start_optimizer_step for attempt in attempts[-1:])])
    if told and ends[told[-1].number]:
        # The metrics may be damaged or gone.
        done = max(done, told[-1].optimizer_step)
    total = run.lock.total_optimizer_steps
    seconds = mean_of(recent, "seconds")
    beats = attempts[-1].heartbeats() if running else []
    failures = [each for each in told if (end := ends[each.number]) and end.is_failure]
    states = tuple(describe_states(run))
    evaluation = read_last_evaluation(run)
    return RunStatus(
        run=run,
        condition=judge_condition(run, told),
        optimizer_step=done,
        total_optimizer_steps=total,
        epoch=run.lock.count.position_of(min(done, total), 1).epoch,
        loss=number_or_none(last.get("loss")),
        mean_loss=mean_of(recent, "loss"),
        held_out_loss=evaluation.loss if evaluation else None,
        held_out_optimizer_step=evaluation.optimizer_step if evaluation else None,
        learning_rates={name: number_of(value) for name, value in last.items() if name.startswith("lr_")},
        skipped_steps=bad_steps.skipped,
        non_finite_steps=bad_steps.non_finite,
        bad_steps_in_a_row=bad_steps.in_a_row,
        seconds_per_step=seconds,
        eta_seconds=(total - done) * seconds if running and seconds is not None else None,
        phase=", ".join(dict.fromkeys(beat.message or beat.phase for beat in beats)),
        stop_waits_for=describe_wait(beats) if running and attempts[-1].stop_file.exists() else "",
        apart_seconds=sum_apart(lines),
        silent_seconds=count_silence(beats),
        attempts=told,
        states=states,
        samples=find_samples(run),
        samples_waiting=tuple(each.optimizer_step for each in list_pictures(run) if not each.are_drawn),
        last_error=f"attempt {failures[-1].number}: {failures[-1].end}: {failures[-1].message}" if failures else "",
        advice=advise(run),
        disk_free_bytes=shutil.disk_usage(run.folder).free,
        disk_used_bytes=sum(state.size_bytes for state in states) + checkpoint_bytes(run),
    )


def advise(run: Run) -> str:
    """What to do first where a resume of the run would only meet the fault that ended it; empty where it goes on."""
    attempt = next(reversed(list_attempts(run)), None)
    end = read_end(attempt) if attempt else None
    return advice_after(attempt, end) if attempt and end and end.is_failure and not end.may_restart else ""


def find_samples(run: Run) -> Path | None:
    """Where the run's pictures lie, or will; None where none are asked for.

    What sd-scripts drew under kwrap 0.1 lies beside the networks until the run is resumed.
    """
    if not run.lock.table("samples") and not run.lock.values.get("sample_prompts"):
        return None
    earlier = run.checkpoints / TRAINER_FOLDER
    return earlier if earlier.is_dir() and not run.samples.is_dir() else run.samples


def describe_attempt(attempt: Attempt, end: AttemptEnd | None) -> AttemptStatus:
    """One attempt's story from its folder."""
    if end is not None:
        kind, message, step, ended = end.kind, end.message, end.optimizer_step, end.unix_seconds
    else:
        step, ended = steps_done(attempt), None
        if is_lock_free(attempt.supervisor_lock) or not attempt.supervisor_lock.exists():
            kind, message = "interrupted", f"its supervisor was killed after optimizer step {step:,}"
        else:
            kind, message = "running", f"at optimizer step {step:,}"
    return AttemptStatus(
        number=attempt.number,
        start_optimizer_step=attempt.start_optimizer_step,
        optimizer_step=step,
        processes=attempt.processes,
        accumulation=attempt.accumulation,
        state=None if attempt.state is None else attempt.state.name,
        allow=tuple(sorted(attempt.allow)),
        end=kind,
        message=message,
        ended_unix_seconds=ended,
    )


def judge_condition(run: Run, attempts: tuple[AttemptStatus, ...]) -> Condition:
    """The run in one word."""
    if not attempts:
        return "new"
    last = attempts[-1].end
    if last == "running":
        return "running"
    if is_finished(run):
        return "finished"
    if last in ("stopped", "killed"):
        return "stopped"
    return "interrupted" if last == "interrupted" else "failed"


def describe_states(run: Run) -> list[StateStatus]:
    """The states on the disk; their content is not read."""
    found = []
    for step, path in list_states(run.states):
        try:
            found.append(StateStatus(step, read_manifest(path).size_bytes, True))
        except DamagedState:
            found.append(StateStatus(step, 0, False))
    return found


def count_silence(beats: list[Heartbeat]) -> float | None:
    """Seconds since the last sign of life; None where it was left on another boot, whose clock is not ours."""
    here = [beat.monotonic_seconds for beat in beats if beat.boot_id and beat.boot_id == read_boot_id()]
    return max(0.0, time.monotonic() - max(here)) if here else None


def describe_wait(beats: list[Heartbeat]) -> str:
    """What a stop waits for, by the phase of the rank that is furthest behind."""
    phases = [beat.phase for beat in beats] or ["start-up"]
    return next(words for phase, words in WAITS.items() if phase in phases)


def sum_apart(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds beside the optimizer steps by what they went into, where there were any."""
    keys = {kind: f"{kind}_seconds" for kind in APART}
    sums = {kind: sum(number_or_none(line[key]) or 0.0 for line in lines if key in line) for kind, key in keys.items()}
    return {kind: seconds for kind, seconds in sums.items() if seconds}


def checkpoint_bytes(run: Run) -> int:
    """Size of all files in checkpoints/; those that vanish while they are looked at count nothing."""
    total = 0
    for path in run.checkpoints.rglob("*") if run.checkpoints.is_dir() else []:
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
