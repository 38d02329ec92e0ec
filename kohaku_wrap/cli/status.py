"""`kwrap status`: what a run is doing and what happened to it."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.options import PATH, runs_folders, site_option
from kohaku_wrap.cli.output import print_answer, print_json, print_note, print_table, verb, wants_json
from kohaku_wrap.errors import KwrapError, UsageError, command_line
from kohaku_wrap.outlets import go_on_without_reader
from kohaku_wrap.wording import count_of, format_duration, format_share, show_bytes, show_path

if TYPE_CHECKING:
    from kohaku_wrap.training.records.folder import Run
    from kohaku_wrap.training.supervising.status import RunStatus

WATCH_SECONDS = 2.0


@verb(
    """
  kwrap status
  kwrap status epsilon --watch
  kwrap status epsilon --csv epsilon-metrics.csv
  kwrap status --compare epsilon epsilon-low-rate
  kwrap status epsilon --to tensorboard logs
  kwrap status epsilon --tag "hatsune miku"
  kwrap status runs/epsilon --json
""",
    writes=False,
)
@click.argument("name", metavar="[RUN]", required=False)
@click.option("--watch", is_flag=True, help="Show it again every two seconds until Ctrl-C.")
@click.option("--csv", "table", type=PATH, metavar="FILE", help="Write the metrics that count as a table.")
@click.option(
    "--compare", nargs=2, metavar="A B", help="Two runs: options that differ, losses at equal steps, time of a step."
)
@click.option("--tag", "tags", multiple=True, metavar="NAME", help="How often this tag was trained; repeatable.")
@click.option("--to", type=(click.Choice(["tensorboard"]), PATH), metavar="tensorboard DIR",
              help="Write the metrics that count to a folder of each run's own in DIR.")  # fmt: skip
@site_option
def command(
    name: str | None,
    watch: bool,
    table: Path | None,
    compare: tuple[str, str] | None,
    tags: tuple[str, ...],
    to: tuple[str, Path] | None,
    site_file: Path | None,
) -> None:
    """Show what a run is doing and what happened to it.

    Progress, rate, ETA, loss, learning rates, attempts, states, disk and the last error. Without RUN: one line for
    each run, or the whole of the only one. Only the run's folder is read: what changed beside it, such as captions,
    cached latents and models, `kwrap verify RUN` and `kwrap resume RUN --dry-run` show.
    """
    from kohaku_wrap.training.records.folder import find_run, list_runs

    folders = runs_folders(site_file)
    if compare:
        if name or watch or table or tags or to:
            raise UsageError("--compare names both runs", "Leave RUN, --watch, --csv, --to and --tag out.")
        show_comparison(find_run(compare[0], folders), find_run(compare[1], folders))
        return
    runs = [find_run(name, folders)] if name else [run for folder in folders for run in list_runs(folder)]
    if not runs:
        where = " or ".join(str(folder) for folder in folders)
        raise UsageError(
            f"no run in {where}",
            "Start one: `kwrap train epsilon`. Or say where it is: --site site.toml, or the path of the run.",
        )
    first = show_path(runs[0].folder)
    if tags:
        if len(runs) != 1 or watch:
            name_it = command_line("status", first, "--tag", tags[0])
            raise UsageError("--tag asks about one run, once", f"Name it: {name_it}")
        show_tags(runs[0], tags)
        return
    if watch and wants_json():
        call = command_line("status", first, "--json")
        raise UsageError("--watch and --json do not go together", f"Call `{call}` as often as you like.")
    if to:
        if watch or table:
            raise UsageError("--to writes the metrics and ends", "Leave --watch and --csv out.")
        write_to(runs, *to)
        return
    if table:
        if len(runs) != 1:
            name_it = command_line("status", first, "--csv", table)
            raise UsageError("--csv writes the metrics of one run", f"Name it: {name_it}")
        from kohaku_wrap.training.records.metrics import write_metrics_table

        write_metrics_table(runs[0], table)
        if not watch:
            go_on_without_reader(is_document=wants_json())
    while True:
        if watch and sys.stdout.isatty():
            click.clear()
        show(runs, single=name is not None)
        if not watch:
            return
        time.sleep(WATCH_SECONDS)


def show_tags(run: Run, tags: tuple[str, ...]) -> None:
    """Print how often tags were trained."""
    from kohaku_wrap.cli.exposure_shown import describe_exposure, find_exposure, list_counts, list_facts

    found = find_exposure(str(run.folder), None, None, 0)
    rows = [found.find(tag) for tag in tags]
    shown = [*list_facts(found), *list_counts("tags", rows)]
    print_answer({**describe_exposure(found), "tags": rows}, f"Run {run.name}", shown)


def write_to(runs: list[Run], tracker: str, folder: Path) -> None:
    """Write the metrics of runs for another tool; steps that are there stay as they are."""
    from kohaku_wrap.training.records.trackers import write_all

    go_on_without_reader(is_document=wants_json())
    written = [(run, *write_all(run, tracker, folder)) for run in runs]
    told = [{"run": run.folder, "folder": own, "written": count, "last_optimizer_step": last}
            for run, own, count, last in written]  # fmt: skip
    rows: list[tuple[str, Any]] = [
        (run.name, f"{count_of(count, 'optimizer step')} written, up to step {last:,}, in {show_path(own)}")
        for run, own, count, last in written
    ]
    next_step = shlex.join(["tensorboard", "--logdir", show_path(folder)])
    print_answer({"to": tracker, "runs": told}, f"Metrics for {tracker}", rows, next_step)


def show(runs: list[Run], single: bool) -> None:
    """Print the state of these runs."""
    from kohaku_wrap.training.supervising.status import read_status

    statuses = []
    for run in runs:
        try:
            statuses.append(read_status(run))
        except KwrapError as error:
            if len(runs) == 1:
                raise
            print_note(f"note: left out: {error.message.splitlines()[0]}")
    if not statuses:
        raise UsageError("no run here can be read", "The notes say why; restore their files.")
    if wants_json():
        documents = [each.document() for each in statuses]
        print_json(documents[0] if single else {"runs": documents})
    elif len(statuses) == 1:
        print_run(statuses[0])
    else:
        rows: list[tuple[str, Any]] = [(status.run.name, one_line(status)) for status in statuses]
        newest = next((each for each in statuses if each.condition == "running"), statuses[-1])
        print_table("Runs", rows, command_line("status", show_path(newest.run.folder)))


def show_comparison(run: Run, other: Run) -> None:
    """What two runs have otherwise, and their losses at equal steps."""
    from kohaku_wrap.training.comparing.other_lock import compare_options
    from kohaku_wrap.training.records.metrics import compare_losses

    options = compare_options(run.lock.tables, other.lock.tables)
    losses = compare_losses(run, other)
    seconds = [find_step_seconds(each) for each in (run, other)]
    described = [{"option": key, "a": one, "b": two} for key, one, two in options]
    steps = [{"optimizer_step": step, "a": one, "b": two} for step, one, two in losses]
    taken = dict(zip("ab", seconds, strict=True))
    compared = {"options": described, "losses": steps, "seconds_per_step": taken}
    payload = {"a": run.folder, "b": other.folder, **compared}
    unset = "not set"
    rows: list[tuple[str, Any]] = [
        (key, f"{unset if one is None else one}  |  {unset if two is None else two}") for key, one, two in options
    ]
    rows += [(f"mean loss by step {step:,}", f"{one:.4f}  |  {two:.4f}") for step, one, two in losses]
    if not losses:
        rows.append(("losses", "no optimizer step that both have"))
    one, two = ("unknown" if each is None else f"{each:.3g} s" for each in seconds)
    rows.append(("time of a step", f"{one}  |  {two}"))
    next_step = command_line("status", show_path(other.folder))
    print_answer(payload, f"{run.name}  |  {other.name}", rows, next_step)


def find_step_seconds(run: Run) -> float | None:
    """The median seconds of an optimizer step; None where none was measured yet."""
    from kohaku_wrap.training.records.metrics import NoMeasurement, read_step_seconds

    try:
        return read_step_seconds(run)
    except NoMeasurement:
        return None


def one_line(status: RunStatus) -> str:
    share = format_share(status.optimizer_step / max(status.total_optimizer_steps, 1))
    steps = f"{status.optimizer_step:,} of {status.total_optimizer_steps:,} ({share})"
    eta = "" if status.eta_seconds is None else f", {format_duration(status.eta_seconds)} left"
    return f"{status.condition}, optimizer step {steps}{eta}"


def print_run(status: RunStatus) -> None:
    """One run in full."""

    rows: list[tuple[str, Any]] = [("progress", one_line(status))]
    if parent := status.run.lock.parent_network:
        rows.append(("trained on from", parent))
    rows += list_chapters(status.run)
    if status.phase:
        silent = "unknown: it was left on another boot or machine"
        if status.silent_seconds is not None:
            silent = f"{status.silent_seconds:,.0f} s ago"
        rows.append(("doing", f"{status.phase}, last sign of life {silent}"))
    if status.stop_waits_for:
        rows.append(("stop", f"asked for; waits for {status.stop_waits_for}"))
    if status.seconds_per_step is not None:
        rows.append(("rate", f"{status.seconds_per_step:.2f} s per optimizer step"))
    if status.apart_seconds:
        times = (f"{kind} {format_duration(seconds)}" for kind, seconds in status.apart_seconds.items())
        rows.append(("beside the steps", ", ".join(times)))
    if status.loss is not None:
        mean = "" if status.mean_loss is None else f", mean of the last steps {status.mean_loss:.4f}"
        rows.append(("loss", f"{status.loss:.4f}{mean}"))
    if status.held_out_loss is not None:
        rows.append(("held-out loss", f"{status.held_out_loss:.5f} after step {status.held_out_optimizer_step:,}"))
    if status.skipped_steps or status.non_finite_steps:
        numbers = f"{status.skipped_steps:,} skipped, {status.non_finite_steps:,} with a loss that is no number"
        latest = f"; the latest {status.bad_steps_in_a_row:,} in a row" if status.bad_steps_in_a_row else ""
        rows.append(("bad steps", f"{numbers}{latest}"))
    rows += [(name, f"{rate:.3g}") for name, rate in status.learning_rates.items()]
    for attempt in status.attempts:
        steps = f"steps {attempt.start_optimizer_step:,} to {attempt.optimizer_step:,}"
        shape = f"{count_of(attempt.processes, 'process')}, accumulation {attempt.accumulation}"
        rows.append((f"attempt {attempt.number}", f"{steps}, {shape}, {attempt.end}: {attempt.message}"))
    marks = [f"{state.optimizer_step:,}" + ("" if state.is_sealed else " (damaged)") for state in status.states]
    rows.append(("states", ", ".join(marks) or "none"))
    rows.append(("disk", f"{show_bytes(status.disk_used_bytes)} used, {show_bytes(status.disk_free_bytes)} free"))
    if status.samples:
        rows.append(("pictures", status.samples))
    if status.samples_waiting:
        steps = ", ".join(f"{step:,}" for step in status.samples_waiting)
        again = command_line("sample", "--run", show_path(status.run.folder), "--queued")
        rows.append(("pictures to draw", f"of optimizer step {steps}: `{again}`, if nothing draws them now"))
    if status.last_error:
        rows.append(("last error", status.last_error))
    folder = show_path(status.run.folder)
    following = {"finished": ("verify", folder), "running": ("status", folder, "--watch")}
    words = following.get(status.condition, ("resume", folder))
    print_table(f"Run {status.run.name}", rows, status.advice or command_line(*words))


def list_chapters(run: Run) -> list[tuple[str, Any]]:
    """A row for each length of a run that was made longer."""
    chapters = run.lock.chapters
    if len(chapters) == 1:
        return []
    rows: list[tuple[str, Any]] = [("chapter 1", f"{chapters[0].total_optimizer_steps:,} optimizer steps")]
    for number, chapter in enumerate(chapters[1:], 2):
        rule = f", --schedule {chapter.schedule}" if chapter.schedule else ""
        rule += " with its warm-up" if chapter.repeats_warmup else ""
        made = f"{chapter.total_optimizer_steps:,} optimizer steps, decided at step {chapter.from_optimizer_step:,}"
        rows.append((f"chapter {number}", made + rule))
    return rows
