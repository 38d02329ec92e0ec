"""What `train`, `resume`, `extend` and `branch` share: options, a run made and watched, events, the closing table."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from kohaku_wrap.cli.options import option_group
from kohaku_wrap.cli.output import (
    ESCAPES,
    counting_bytes,
    print_answer,
    print_aside,
    print_note,
    print_notes,
    wants_json,
)
from kohaku_wrap.errors import UsageError, command_line
from kohaku_wrap.training.records.signs import Phase
from kohaku_wrap.wording import format_duration, format_share, show_path

if TYPE_CHECKING:
    from kohaku_wrap.training.records.folder import Run
    from kohaku_wrap.training.starting.create import NewRun
    from kohaku_wrap.training.starting.launch import Launch
    from kohaku_wrap.training.starting.resume import ResumePlan
    from kohaku_wrap.training.supervising.supervise import RunReport
    from kohaku_wrap.training.supervising.watch import Event, OnEvent, WatchOptions

PHASES = get_args(Phase)
SECONDS_BETWEEN_LINES = 10.0


supervisor_options = option_group(
    click.option("--restarts", type=click.IntRange(0), default=0, show_default=True, metavar="N",
                 help="Start again this often after a failure, from the last good state."),
    click.option("--restart-pause", "first_pause_seconds", type=click.FloatRange(0), default=10.0,
                 show_default=True, metavar="SECONDS", help="Before the first restart; doubles with each."),
    click.option("--timeout", "timeouts", multiple=True, metavar="PHASE=SECONDS",
                 help=f"End an attempt that shows no sign of life for so long. Phases: {', '.join(PHASES)}."),
    click.option("--nan-latents-share", type=click.FloatRange(0, 1), default=0.05, show_default=True,
                 metavar="SHARE", help="End an attempt when more of its last images have NaN latents."),
    click.option("--bad-steps", type=click.IntRange(0), metavar="N",
                 help="End an attempt after N optimizer steps in a row that were skipped or had a non-finite "
                 "loss; 0: never.  [default: 50 in the first 1,000 steps, then 10]"),
    click.option("--allow", multiple=True, metavar="KEY",
                 help="Accept: bad-images, nan-latents, non-finite-loss; on resume a difference."),
    click.option("--hook", default="", metavar="COMMAND",
                 help="Shell command on start, state, crash, stop, finish; KWRAP_EVENT and KWRAP_MESSAGE say which."),
)  # fmt: skip
"""What `train`, `resume`, `extend` and `branch` share."""


def watch_options(timeouts: tuple[str, ...], **asked: Any) -> WatchOptions:
    """The supervisor's options from those of the command line."""
    from kohaku_wrap.training.supervising.watch import WatchOptions

    by_phase: dict[Any, float] = {}
    for text in timeouts:
        phase, _, seconds = text.partition("=")
        try:
            by_phase[phase] = float(seconds)
        except ValueError:
            phase = ""
        if phase not in PHASES or not by_phase[phase] > 0:
            raise UsageError(f"--timeout {text}: not PHASE=SECONDS", f"Phases: {', '.join(PHASES)}.")
    return WatchOptions(timeouts_seconds=by_phase, **asked)


class EventPrinter:
    """Prints a run's events on stderr: one line of progress, kept up to date, and a line for all else."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr.isatty()
        self.last_seconds = float("-inf")
        self.open_line = False

    def __call__(self, event: Event) -> None:
        if event.kind != "progress":
            self.end_line()
            print_note(f"{event.kind}: {event.message}")
            return
        now = time.monotonic()
        is_last = event.optimizer_step >= event.total_optimizer_steps
        if not self.is_terminal and now - self.last_seconds < SECONDS_BETWEEN_LINES and not is_last:
            return
        self.last_seconds = now
        share = format_share(event.optimizer_step / max(event.total_optimizer_steps, 1))
        eta = "" if event.eta_seconds is None else f"  {format_duration(event.eta_seconds)} left"
        text = f"step {event.optimizer_step:,}/{event.total_optimizer_steps:,} ({share})  {event.message}{eta}"
        text = text.translate(ESCAPES)
        if self.is_terminal:
            # A line that wrapped could not be written over.
            click.echo(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", nl=False, err=True)
            self.open_line = True
        else:
            print_note(text)

    def end_line(self) -> None:
        if self.open_line:
            click.echo("", err=True)
            self.open_line = False


@contextmanager
def printing_events() -> Iterator[OnEvent]:
    """What a run's events are given to; with `--json` none is printed."""
    printer = EventPrinter()
    try:
        yield (lambda event: None) if wants_json() else printer
    finally:
        printer.end_line()


def watch_run(run: Run, first: Callable[[], ResumePlan], allow: tuple[str, ...], options: WatchOptions) -> RunReport:
    """Supervise a run from the attempt that `first` plans; the following ones start from the newest whole state."""
    from kohaku_wrap.training.starting.resume import begin_attempt, plan_resume
    from kohaku_wrap.training.supervising.supervise import supervise_run

    with printing_events() as on_event:
        return supervise_run(
            run,
            first=lambda: begin_attempt(replace(first(), bad_steps=options.bad_steps)),
            following=lambda: begin_attempt(replace(plan_resume(run, allow=allow), bad_steps=options.bad_steps)),
            options=options,
            on_event=on_event,
        )


def print_findings(plan: ResumePlan) -> None:
    """What the resume found and how it takes it, on stderr."""
    print_notes((damaged.message for damaged in plan.damaged), "damaged, passed over")
    print_notes((f"{where}: {what}" for where, what in plan.differences.items()), "accepted")
    for note in plan.notes:
        print_aside(note)
    if plan.lineage:
        print_aside("a state of another run: what it was trained with is not in this run's ledger")
    if plan.foreign:
        print_aside("a state of plain sd-scripts: the order is not provably the same as before it")


def source_of(plan: ResumePlan) -> str:
    """The state's folder, or the beginning."""
    from kohaku_wrap.training.records.states import list_states

    if plan.state is not None:
        return show_path(plan.state)
    return "the beginning" if list_states(plan.run.states) else "the beginning, as no state is there"


def print_start(plan: ResumePlan) -> None:
    """Where the attempt starts, and what moves for it, on stderr."""
    print_aside(f"attempt {plan.number} of {plan.run.name} from {source_of(plan)}")
    print_notes((str(path.relative_to(plan.run.folder)) for path in plan.abandons), "to abandoned/")


def describe_launch(launch: Launch) -> dict[str, Any]:
    """A command for `--json`."""
    return {"argv": list(launch.argv), "environment": dict(launch.environment), "folder": str(launch.folder)}


def print_finished(report: RunReport) -> None:
    """The closing table of a run that reached its end."""
    run = report.run
    networks = run.networks
    payload = {
        "run": str(run.folder),
        "attempts": report.attempts,
        "optimizer_steps": report.optimizer_step,
        "networks": [str(network) for network in networks],
    }
    rows: list[tuple[str, Any]] = [
        ("run", run.folder),
        ("optimizer steps", report.optimizer_step),
        *[("attempts just now", report.attempts)] * (report.attempts > 1),
        *(("network", network) for network in networks),
    ]
    print_answer(payload, f"Trained {run.name}", rows, command_line("verify", show_path(run.folder)))


def make_run(new: NewRun, locked: Path | None, allow: tuple[str, ...]) -> Run:
    """The run's folder, with a bar while the base model is hashed."""
    from kohaku_wrap.config.checks import note_rare_saves
    from kohaku_wrap.config.samples import note_shared_gpu
    from kohaku_wrap.file_hashes import count_unhashed
    from kohaku_wrap.training.starting.create import create_run

    unread = count_unhashed(filter(None, (new.site.paths.base_model, new.site.paths.vae)))
    with counting_bytes("hashing the base model", unread) as count:
        run = create_run(new, sys.argv, locked, count, allow)
    print_aside(f"run: {show_path(run.folder)}, {run.lock.total_optimizer_steps:,} optimizer steps")
    print_notes(note_rare_saves(new.effective, run.lock.total_optimizer_steps) + note_shared_gpu(new.effective))
    return run


def train_run(run: Run, allow: tuple[str, ...], options: WatchOptions) -> RunReport:
    """The first attempt of a new run and its restarts; a run that was refused before its first step is taken back."""
    from kohaku_wrap.files import remove_folder
    from kohaku_wrap.training.starting.create import RunRefused
    from kohaku_wrap.training.starting.resume import plan_resume
    from kohaku_wrap.training.supervising.supervise import TrainerFailed

    try:
        return watch_run(run, lambda: plan_resume(run, allow=allow), allow, options)
    except TrainerFailed as failed:
        if failed.end.kind == "refused" and failed.end.optimizer_step == run.first_optimizer_step:
            remove_folder(run.folder)
            again = "Nothing of the run is kept: fix this and give the same command again."
            raise RunRefused(
                f"run {run.name} was refused before its first step: {failed.end.message}",
                f"{failed.end.next_step}\n{again}".lstrip(),
            ) from None
        raise
