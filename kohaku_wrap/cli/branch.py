"""`kwrap branch`: a new run from another one's state, with other options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.options import PATH, open_run, print_trust, retype, trust_option
from kohaku_wrap.cli.output import (
    counting_bytes,
    print_answer,
    print_aside,
    print_notes,
    verb,
)
from kohaku_wrap.cli.supervised import make_run, print_finished, supervisor_options, train_run, watch_options
from kohaku_wrap.errors import command_line
from kohaku_wrap.wording import show_path

if TYPE_CHECKING:
    from kohaku_wrap.training.records.folder import Run
    from kohaku_wrap.training.starting.branch import Branch


@verb(
    """
  kwrap branch epsilon --step 13600 --run slower --set unet_lr=5e-5
  kwrap branch epsilon --run longer --set max_train_epochs=12 --dry-run
  kwrap branch epsilon --step 13600 --run other --site other-images.toml
""",
    unless=("dry_run",),
)
@click.argument("name", metavar="RUN")
@click.option("--step", type=click.IntRange(0), metavar="N",
              help="From the state of this optimizer step; the newest whole one where it is not given.")  # fmt: skip
@click.option("--run", "new_name", required=True, metavar="NEW", help="The new run's name.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Another value than RUN has; again for more.")  # fmt: skip
@click.option("--template", metavar="TEMPLATE", help="Take the options of this template, not those of RUN.")
@click.option("--site", "site_file", type=PATH,
              help="Take paths, images and machine of this site, not those of RUN.")  # fmt: skip
@trust_option
@click.option("--dry-run", is_flag=True, help="Print what would be another, and where it would begin; make nothing.")
@supervisor_options
def command(
    name: str,
    step: int | None,
    new_name: str,
    overrides: tuple[str, ...],
    template: str | None,
    site_file: Path | None,
    trust: tuple[str, ...],
    dry_run: bool,
    allow: tuple[str, ...],
    **watch: Any,
) -> None:
    """Begin a new run from a state of another one.

    NEW has RUN's options but for --set. It takes all weights, and the moments and counters of the optimizer as far as
    they fit; every rate, weight decay, betas, eps and the schedule come from its own options. Where seed, dataset,
    effective batch, repeats and buckets are those of RUN, it goes on at the same epoch and position, and its length
    counts from RUN's beginning; otherwise it begins at epoch 0, step 0, and says why. NEW holds the state itself and is
    whole without RUN.
    """
    from kohaku_wrap.training.comparing.accepting import refuse_unknown
    from kohaku_wrap.training.starting.branch import plan_branch

    options = watch_options(**watch)
    refuse_unknown(allow)
    parent = open_run(name, site_file)
    with counting_bytes("verifying state and models", 0) as count:
        branch = plan_branch(
            parent, new_name, step, overrides, template, site_file, trust, count, retype("step", "dry_run")
        )
    if dry_run:
        show(branch)
        return
    print_trust(branch.new.effective)
    print_notes((damaged.message for damaged in branch.damaged), "damaged, passed over")
    for note in branch.notes:
        print_aside(note)
    print_aside(f"from run {parent.name}, optimizer step {branch.origin.optimizer_step:,}: {describe_place(branch)}")
    for key, before, now in branch.changes:
        print_aside(f"{key}: {show_value(before)} in {parent.name}, {show_value(now)} here")
    run = make_run(branch.new, None, allow)
    report = train_run(run, allow, options)
    print_taken(run)
    print_finished(report)


def describe_place(branch: Branch) -> str:
    """Where the new run begins, and why not at its parent's place."""
    origin = branch.origin
    if origin.continues:
        return "goes on at its epoch and position"
    return f"begins at epoch 0, optimizer step 0, as {'; '.join(origin.begins_anew)}"


def show_value(value: Any) -> str:
    return "unset" if value is None else str(value)


def print_taken(run: Run) -> None:
    """What the first attempt found of the parent's state."""
    from kohaku_wrap.training.records.attempts import list_attempts
    from kohaku_wrap.training.records.origin import read_taken

    found = next((each for attempt in list_attempts(run) if (each := read_taken(attempt.folder))), None)
    if found:
        print_notes(found.taken, "taken")
        print_notes(found.left, "not taken")


def show(branch: Branch) -> None:
    """What the new run would be."""
    new, origin, plan = branch.new, branch.origin, branch.plan
    payload = {
        "run": str(new.folder),
        "parent": str(branch.parent.folder),
        "state": str(branch.state),
        "optimizer_step": origin.optimizer_step,
        "start_optimizer_step": origin.start_optimizer_step,
        "begins_anew": list(origin.begins_anew),
        "total_optimizer_steps": plan.total_optimizer_steps,
        "options": [{"option": key, "parent": one, "new": other} for key, one, other in branch.changes],
        "notes": list(branch.notes),
    }
    rows: list[tuple[str, Any]] = [
        ("from", f"run {branch.parent.name}, optimizer step {origin.optimizer_step:,}"),
        ("place", describe_place(branch)),
        ("optimizer steps", f"{plan.total_optimizer_steps:,}, from {origin.start_optimizer_step:,} on"),
        *((key, f"{show_value(one)}  →  {show_value(other)}") for key, one, other in branch.changes),
        *(("note", note) for note in branch.notes),
    ]
    folder = show_path(branch.parent.folder)
    words = ["--step", origin.optimizer_step, *retype("step", "dry_run")]
    following = command_line("branch", folder, *words)
    print_answer(payload, f"Branch {new.name}", rows, following)
