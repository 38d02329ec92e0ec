"""`kwrap resume`: the next attempt of a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.options import PATH, list_given, runs_folders, site_option, workers_option
from kohaku_wrap.cli.output import counting_bytes, print_answer, print_aside, print_json, verb, wants_json
from kohaku_wrap.cli.supervised import (
    describe_launch,
    print_findings,
    print_finished,
    print_start,
    printing_events,
    source_of,
    supervisor_options,
    watch_options,
    watch_run,
)
from kohaku_wrap.errors import UsageError, command_line
from kohaku_wrap.wording import show_bytes, show_path

if TYPE_CHECKING:
    from kohaku_wrap.training.records.folder import Run
    from kohaku_wrap.training.starting.resume import ResumePlan

JOINING = frozenset({"site_file", "machine_rank", "dry_run"})
"""What a machine may say that trains along."""


def find_unfinished_run(folders: tuple[Path, ...]) -> Run:
    """The only unfinished run there is; raises UsageError with the list when there are more, or none."""
    from kohaku_wrap.training.records.folder import list_runs
    from kohaku_wrap.training.records.networks import is_finished

    unfinished = [run for folder in folders for run in list_runs(folder) if not is_finished(run)]
    if len(unfinished) == 1:
        return unfinished[0]
    where = " or ".join(str(folder) for folder in folders)
    if not unfinished:
        raise UsageError(
            f"no unfinished run in {where}",
            "Give the path of a run, kwrap resume runs/NAME, or add --site with its site file.",
        )
    names = "\n".join(f"  {run.folder}" for run in unfinished)
    raise UsageError(
        f"{len(unfinished)} unfinished runs; which one?\n{names}",
        f"Name it: {command_line('resume', show_path(unfinished[0].folder))}",
    )


@verb(
    """
  kwrap resume
  kwrap resume epsilon --step 13600 --dry-run
  kwrap resume epsilon --processes 2 --restarts 5
  kwrap resume epsilon --machine-rank 1
  kwrap resume epsilon --foreign --state plain-step00013600-state --dry-run
""",
    unless=("dry_run",),
)
@click.argument("name", metavar="[RUN]", required=False)
@click.option(
    "--step", type=click.IntRange(0), metavar="N", help="From the state of this optimizer step; 0: from the beginning."
)
@click.option("--processes", "--gpus", "processes", type=click.IntRange(1), metavar="W",
              help="Train on another number of GPUs; the accumulation follows.")  # fmt: skip
@click.option("--machines", type=click.IntRange(1), metavar="N",
              help="Train on so many of the site's machines, from now on.")  # fmt: skip
@click.option("--machine-rank", type=click.IntRange(0), default=0, metavar="K",
              help="Train along as machine K of a run of several; machine 0 makes the attempts.")  # fmt: skip
@workers_option
@click.option(
    "--foreign", is_flag=True, help="Take a state of plain sd-scripts; the order is then not provably the same."
)
@click.option("--state", "foreign_state", type=PATH, metavar="PATH",
              help="The folder of the plain state, with --foreign.")  # fmt: skip
@click.option("--deep", is_flag=True, help="Compare the sha256 of all images where it is known, not of 100 that moved.")
@click.option("--dry-run", is_flag=True, help="Print the position and the command; change nothing.")
@site_option
@supervisor_options
def command(
    name: str | None,
    step: int | None,
    processes: int | None,
    machines: int | None,
    machine_rank: int,
    workers: int | None,
    foreign: bool,
    foreign_state: Path | None,
    deep: bool,
    dry_run: bool,
    site_file: Path | None,
    allow: tuple[str, ...],
    **watch: Any,
) -> None:
    """Go on with a run exactly where a state was saved.

    Takes the newest whole state of the run's current line, or that of --step. Later states and checkpoints move to
    abandoned/. A damaged state is named and the one before it is used; where none is whole, nothing is trained until
    --step 0 asks for the beginning. Without RUN: the only unfinished run.

    A run may be moved and renamed, and so may its images and models: --site names the site file that says where they
    lie now. They are recognised by their digests; the run remembers the site.

    With --machine-rank K this machine makes no attempt: it trains along in those of machine 0, which runs `kwrap train`
    or `kwrap resume`, joins the next one after a restart, and returns when the run is finished or stopped.
    """
    from kohaku_wrap.training.comparing.site_places import bytes_to_hash
    from kohaku_wrap.training.records.folder import find_run
    from kohaku_wrap.training.starting.resume import plan_resume
    from kohaku_wrap.training.supervising.join import join_run

    if foreign_state is not None and not foreign:
        raise UsageError("--state is for states of plain sd-scripts", "Add --foreign, or leave --state out.")
    if machine_rank:
        refuse_choices_of_machine_0()
    options = watch_options(**watch)
    folders = runs_folders(site_file)
    run = find_run(name, folders) if name else find_unfinished_run(folders)

    if machine_rank:
        if dry_run:
            show_join(run, machine_rank)
        else:
            with printing_events() as on_event:
                report = join_run(run, machine_rank, on_event)
            print_finished(report)
        return

    def plan() -> ResumePlan:
        total = states_bytes(run, step) + bytes_to_hash(run, site_file)
        started = time.monotonic()
        with counting_bytes("verifying state and models", total) as count:
            found = plan_resume(
                run, step, processes, workers, allow, foreign, foreign_state, count, machines, site_file, deep
            )
        print_findings(found)
        if not dry_run:
            print_start(found)
        if count.done:
            read = show_bytes(count.done)
            print_aside(f"verified {read} of states and models in {time.monotonic() - started:.1f} s")
        return found

    if dry_run:
        show_dry_run(plan())
        return
    print_finished(watch_run(run, plan, allow, options))


def refuse_choices_of_machine_0() -> None:
    """Raise UsageError for options that a machine which trains along has no say in."""
    if given := [option.opts[0] for option, _ in list_given() if option.name not in JOINING]:
        raise UsageError(
            f"{', '.join(given)}: for machine 0 to say, not for one that trains along",
            "Give it there; leave it out with --machine-rank.",
        )


def show_join(run: Run, machine_rank: int) -> None:
    """The command of this machine."""
    from kohaku_wrap.training.supervising.join import describe_join

    launch = describe_join(run, machine_rank)
    if wants_json():
        print_json({"run": str(run.folder), "machine_rank": machine_rank, **describe_launch(launch)})
    else:
        click.echo(launch.text())


def states_bytes(run: Run, step: int | None) -> int:
    """Bytes of the state that is looked at first."""
    from kohaku_wrap.training.records.manifest import DamagedState, read_manifest
    from kohaku_wrap.training.records.states import list_states

    states = [path for at, path in list_states(run.states) if step is None or at == step]
    try:
        return read_manifest(states[-1]).size_bytes if states else 0
    except DamagedState:
        return 0


def show_dry_run(plan: ResumePlan) -> None:
    """The exact position and the command."""
    from kohaku_wrap.training.starting.launch import plan_attempt_launch

    launch = plan_attempt_launch(plan)
    position = plan.start
    payload = {
        "run": str(plan.run.folder),
        "attempt": plan.number,
        "state": None if plan.state is None else show_path(plan.state),
        "optimizer_step": plan.start_optimizer_step,
        **vars(position),
        "processes": plan.processes,
        "accumulation": plan.accumulation,
        "ranks": [
            {"rank": rank, "micro_batch": position.micro_batch, "global_position": at}
            for rank, at in enumerate(plan.rank_positions())
        ],
        "abandons": [str(path) for path in plan.abandons],
        "damaged": [damaged.message for damaged in plan.damaged],
        "accepted": plan.differences,
        "notes": list(plan.notes),
        "lineage": plan.lineage,
        **describe_launch(launch),
    }
    rows: list[tuple[str, Any]] = [
        ("state", plan.state or f"none: from {source_of(plan)}"),
        ("optimizer steps done", f"{plan.start_optimizer_step:,} of {plan.run.lock.total_optimizer_steps:,}"),
        ("epoch", position.epoch),
        ("micro-batch of each rank", position.micro_batch),
        *(
            (f"rank {rank}", f"epoch {position.epoch}, micro-batch {position.micro_batch:,}, global position {at:,}")
            for rank, at in enumerate(plan.rank_positions())
        ),
        ("processes × accumulation", f"{plan.processes} × {plan.accumulation}"),
        ("to abandoned/", ", ".join(path.name for path in plan.abandons) or "nothing"),
    ]
    print_answer(payload, f"Resume of {plan.run.name}", rows)
    if not wants_json():
        click.echo(launch.text())
