"""`kwrap extend`: a run made longer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.options import open_run, retype, site_option, workers_option
from kohaku_wrap.cli.output import (
    counting_bytes,
    print_answer,
    print_aside,
    verb,
)
from kohaku_wrap.cli.supervised import (
    print_findings,
    print_finished,
    print_start,
    source_of,
    supervisor_options,
    watch_options,
    watch_run,
)
from kohaku_wrap.errors import command_line
from kohaku_wrap.wording import show_path

if TYPE_CHECKING:
    from kohaku_wrap.training.starting.extend import Extension
    from kohaku_wrap.training.starting.resume import ResumePlan

MOST_MORE = 1_000_000_000
"""Steps or epochs more, so that their product stays a number of 64 bits."""


@verb(
    """
  kwrap extend epsilon --epochs 1
  kwrap extend epsilon --steps 2000 --schedule stretch --dry-run
  kwrap extend epsilon --epochs 2 --schedule again --repeat-warmup
""",
    unless=("dry_run",),
)
@click.argument("name", metavar="RUN")
@click.option("--epochs", type=click.IntRange(1, MOST_MORE), metavar="N", help="So many epochs more.")
@click.option("--steps", type=click.IntRange(1, MOST_MORE), metavar="N", help="So many optimizer steps more.")
@click.option(
    "--schedule",
    type=click.Choice(("stretch", "again")),
    help="Where the rates depend on the length: those of the longer plan from here on, or a new cycle.",
)
@click.option("--repeat-warmup", "repeats_warmup", is_flag=True, help="Begin the new cycle with its warm-up again.")
@workers_option
@click.option("--dry-run", is_flag=True, help="Print the new length and the rates; change nothing.")
@site_option
@supervisor_options
def command(
    name: str,
    epochs: int | None,
    steps: int | None,
    schedule: str | None,
    repeats_warmup: bool,
    workers: int | None,
    dry_run: bool,
    site_file: Path | None,
    allow: tuple[str, ...],
    **watch: Any,
) -> None:
    """Train a run for longer than it was planned.

    It goes on from its newest state, at the end or in the middle. The lock gets a new chapter. A run whose rates do not
    depend on its length (constant, or a warm-up in steps) comes out bit for bit as one that was planned so long from
    the start. For others (cosine, linear, polynomial, a warm-up given as a share) --schedule says how the rates go on;
    the ledger records it. Images and models that were moved are taken from --site, as `kwrap resume` does.
    """
    from kohaku_wrap.training.starting.extend import plan_extension

    options = watch_options(**watch)
    run = open_run(name, site_file)

    def plan() -> Extension:
        with counting_bytes("verifying state and models", 0) as count:
            return plan_extension(
                run, epochs, steps, schedule or "", repeats_warmup, count,
                retype("dry_run"), workers=workers, allow=allow, site_file=site_file,
            )  # fmt: skip

    def begin() -> ResumePlan:
        extension = plan()
        print_findings(extension.resume)
        print_aside(describe(extension))
        print_start(extension.resume)
        extension.write()
        run.forget_lock()
        return extension.resume

    if dry_run:
        show(plan())
        return
    print_finished(watch_run(run, begin, allow, options))


def describe(extension: Extension) -> str:
    """The new length in one line."""
    chapter, before = extension.chapter, extension.before
    rule = f", --schedule {chapter.schedule}" if chapter.schedule else ""
    return (
        f"extended from {before.total_optimizer_steps:,} to {chapter.total_optimizer_steps:,} optimizer steps, "
        f"from step {chapter.from_optimizer_step:,} on{rule}"
    )


def show(extension: Extension) -> None:
    """The chapter, and the rates around it."""
    from kohaku_wrap.training.starting.expected_rates import NoExpectedRates, preview_rates

    run, chapter, before = extension.run, extension.chapter, extension.before
    rates: dict[int, list[float]] = {}
    why_not = ""
    try:
        rates = preview_rates(run, chapter.from_updates) if extension.depends else {}
    except NoExpectedRates as error:
        why_not = error.message
    payload = {
        "run": str(run.folder),
        "chapter": len(run.lock.chapters),
        "state": None if extension.resume.state is None else str(extension.resume.state),
        "from_optimizer_step": chapter.from_optimizer_step,
        "optimizer_steps_before": before.total_optimizer_steps,
        "total_optimizer_steps": chapter.total_optimizer_steps,
        "schedule": chapter.schedule or None,
        "repeats_warmup": chapter.repeats_warmup,
        "depends_on_length": list(extension.depends),
        "rates_of_updates": rates,
    }
    rows: list[tuple[str, Any]] = [
        ("optimizer steps", f"{chapter.total_optimizer_steps:,}, until now {before.total_optimizer_steps:,}"),
        ("from", source_of(extension.resume)),
        ("depends on the length", ", ".join(extension.depends) or "nothing"),
        *([("schedule", chapter.schedule)] if chapter.schedule else []),
        *(
            (f"rates of update {update:,}", ", ".join(f"{each:.4g}" for each in group))
            for update, group in rates.items()
        ),
        *([("rates", why_not)] if why_not else []),
    ]
    next_step = command_line("extend", show_path(run.folder), *retype("dry_run"))
    print_answer(payload, f"Longer: {run.name}", rows, next_step)
