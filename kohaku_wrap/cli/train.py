"""`kwrap train`: a new run, from template to final network."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from kohaku_wrap.cli.output import (
    ESCAPES,
    beyond_output,
    format_duration,
    format_share,
    json_option,
    print_json,
    print_note,
    print_table,
    progress_bar,
    show_path,
)
from kohaku_wrap.cli.trust import describe_trust, print_trust, trust_option
from kohaku_wrap.errors import UsageError, command_line
from kohaku_wrap.training.records.signs import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from kohaku_wrap.training.records.folder import Run
    from kohaku_wrap.training.supervising.create import NewRun
    from kohaku_wrap.training.supervising.resume import ResumePlan
    from kohaku_wrap.training.supervising.supervise import RunReport
    from kohaku_wrap.training.supervising.watch import Event, WatchOptions

PHASES = get_args(Phase)
SECONDS_BETWEEN_LINES = 10.0


def supervisor_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `train` and `resume` share."""
    options = (
        click.option("--restarts", type=click.IntRange(0), default=0, show_default=True, metavar="N",
                     help="Start again this often after a failure, from the last good state."),
        click.option("--restart-pause", type=click.FloatRange(0), default=10.0, show_default=True, metavar="SECONDS",
                     help="Before the first restart; doubles with each."),
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
                     help="Shell command on start, state, crash, stop, finish; KWRAP_EVENT and KWRAP_MESSAGE tell."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def watch_options(
    restarts: int,
    restart_pause: float,
    timeouts: tuple[str, ...],
    nan_latents_share: float,
    bad_steps: int | None,
    hook: str,
) -> WatchOptions:
    """The supervisor's options from those of the command line."""
    from kohaku_wrap.training.supervising.watch import WatchOptions

    by_phase: dict[Any, float] = {}
    for text in timeouts:
        phase, _, seconds = text.partition("=")
        try:
            by_phase[phase] = float(seconds)
        except ValueError:
            phase = ""
        if phase not in PHASES or by_phase[phase] <= 0:
            raise UsageError(f"--timeout {text}: not PHASE=SECONDS", f"Phases: {', '.join(PHASES)}.")
    return WatchOptions(
        restarts=restarts,
        first_pause_seconds=restart_pause,
        timeouts_seconds=by_phase,
        nan_latents_share=nan_latents_share,
        bad_steps=bad_steps,
        hook=hook,
    )


class EventPrinter:
    """Prints a run's events on stderr: one line of progress, kept up to date, and a line for all else."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr.isatty()
        self.last_seconds = float("-inf")
        self.open_line = False

    def __call__(self, event: Event) -> None:
        import time

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


def print_finished(command: str, report: RunReport, as_json: bool) -> None:
    """The closing table of a run that reached its end."""
    run = report.run
    networks = sorted(run.checkpoints.glob(f"{run.name}.*"))
    if as_json:
        print_json(
            command,
            {
                "run": str(run.folder),
                "attempts": report.attempts,
                "optimizer_steps": report.optimizer_step,
                "networks": [str(network) for network in networks],
            },
        )
        return
    rows: list[tuple[str, Any]] = [
        ("run", run.folder),
        ("optimizer steps", report.optimizer_step),
        *([("attempts just now", report.attempts)] if report.attempts > 1 else []),
        *(("network", network) for network in networks),
    ]
    print_table(f"Trained {run.name}", rows, command_line("verify", show_path(run.folder)))


@click.command(
    epilog="""\b
Examples:
  kwrap train demo --site world/site.toml --run first
  kwrap train epsilon --site site.toml --run epsilon --restarts 5
  kwrap train epsilon --site site.toml --set seed=7 --dry-run
  kwrap train --locked runs/epsilon/run.lock.toml --site site.toml --run again"""
)
@click.argument("template", required=False)
@click.option("--site", "site_file", type=click.Path(path_type=Path), default=Path("site.toml"), show_default=True,
              help="What is true of this machine.")  # fmt: skip
@click.option("--run", "name", metavar="NAME", help="The run's name; the template's where it is not given.")
@click.option("--engine", metavar="ENGINE", help="sd-scripts or builtin, in place of the site's.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value; again for more.")
@trust_option
@click.option("--locked", type=click.Path(path_type=Path), metavar="LOCK",
              help="Repeat the run of this run.lock.toml: refuse whatever would differ from it.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print the command that would run; make nothing.")
@supervisor_options
@json_option
@beyond_output("dry_run")
def command(
    template: str | None,
    site_file: Path,
    name: str | None,
    engine: str | None,
    overrides: tuple[str, ...],
    trust: tuple[str, ...],
    locked: Path | None,
    dry_run: bool,
    restarts: int,
    restart_pause: float,
    timeouts: tuple[str, ...],
    nan_latents_share: float,
    bad_steps: int | None,
    allow: tuple[str, ...],
    hook: str,
    as_json: bool,
) -> None:
    """Train a template as a new run, watched until it is done.

    Renders and locks everything the run depends on, then launches the trainer under accelerate. The first Ctrl-C
    finishes the optimizer step, saves a state and ends with exit code 130; a second one ends at once. Exit code 3: the
    trainer failed.
    """
    from kohaku_wrap.training.supervising.create import plan_new_run
    from kohaku_wrap.training.supervising.differences import refuse_unknown

    if template is None and locked is not None:
        from kohaku_wrap.training.supervising.other_lock import template_of_lock

        template = template_of_lock(locked)
    if template is None:
        raise UsageError("no TEMPLATE given", "See `kwrap template ls`.")
    options = watch_options(restarts, restart_pause, timeouts, nan_latents_share, bad_steps, hook)
    refuse_unknown(allow)
    new = plan_new_run(template, site_file, name, engine, overrides, trust)
    if not as_json:
        print_trust(new.effective)
        print_note(f"engine: {new.engine} ({new.engine_origin})")
    if dry_run:
        if as_json:
            payload = {
                "run": str(new.folder),
                "engine": new.engine,
                "engine_origin": new.engine_origin,
                "argv": list(new.launch.argv),
                "environment": dict(new.launch.environment),
                "folder": str(new.launch.folder),
                "trust": describe_trust(new.effective),
            }
            print_json("train", payload)
        else:
            click.echo(new.launch.text())
        return
    run = make_run(new, locked, as_json)
    report = train_run(run, allow, options, as_json)
    print_finished("train", report, as_json)


def make_run(new: NewRun, locked: Path | None, as_json: bool) -> Run:
    """The run's folder, with a bar while the base model is hashed."""
    from kohaku_wrap.training.supervising.create import create_run, hashed_bytes

    total = hashed_bytes(new)
    done = 0
    with progress_bar("hashing the base model", "bytes", quiet=as_json) as report:

        def count(size_bytes: int) -> None:
            nonlocal done
            done += size_bytes
            report(done, total)

        run = create_run(new, sys.argv, locked, count)
    if not as_json:
        print_note(f"run: {show_path(run.folder)}, {run.lock.total_optimizer_steps:,} optimizer steps")
    return run


def train_run(run: Run, allow: tuple[str, ...], options: WatchOptions, as_json: bool) -> RunReport:
    """The first attempt of a new run and its restarts; a run that was refused before its first step is taken back."""
    from kohaku_wrap.training.supervising.causes import find_first_cause
    from kohaku_wrap.training.supervising.create import RunRefused, take_back_run
    from kohaku_wrap.training.supervising.resume import plan_resume
    from kohaku_wrap.training.supervising.supervise import TrainerFailed

    try:
        return watch_run(run, lambda: plan_resume(run, allow=allow), allow, options, as_json)
    except TrainerFailed as failed:
        if failed.end.kind == "refused" and failed.end.optimizer_step == 0:
            cause = find_first_cause(failed.attempt, failed.end.optimizer_step)
            told = [cause.next_step] if cause is not None and cause.next_step else []
            take_back_run(run)
            raise RunRefused(
                f"run {run.name} was refused before its first step: {failed.end.message}",
                "\n".join([*told[:1], "Nothing of the run is kept: fix this and give the same command again."]),
            ) from None
        raise


def watch_run(
    run: Run, first: Callable[[], ResumePlan], allow: tuple[str, ...], options: WatchOptions, as_json: bool
) -> RunReport:
    """Supervise a run from the attempt that `first` plans; the following ones start from the newest whole state."""
    from kohaku_wrap.training.supervising.resume import begin_attempt, plan_resume
    from kohaku_wrap.training.supervising.supervise import supervise_run

    printer = EventPrinter()
    try:
        return supervise_run(
            run,
            first=lambda: begin_attempt(replace(first(), bad_steps=options.bad_steps)),
            following=lambda: begin_attempt(replace(plan_resume(run, allow=allow), bad_steps=options.bad_steps)),
            options=options,
            on_event=(lambda event: None) if as_json else printer,
        )
    finally:
        printer.end_line()
