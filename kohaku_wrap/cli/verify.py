"""`kwrap verify`: proof from the ledger of what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.options import open_run, site_option
from kohaku_wrap.cli.output import counting_bytes, print_error, print_json, print_note, print_table, verb, wants_json
from kohaku_wrap.errors import EXIT_FAILED, command_line, reason_of
from kohaku_wrap.wording import count_of, show_path

FILLS = "to fill an epoch's last optimizer step with a batch of it"

if TYPE_CHECKING:
    from kohaku_wrap.training.verifying.ledger_checks import Fault
    from kohaku_wrap.training.verifying.verify_report import VerifyReport


@verb("""
  kwrap verify epsilon
  kwrap verify runs/epsilon --deep 100
""")
@click.argument("name", metavar="RUN")
@click.option("--deep", "deep_samples", type=click.IntRange(0), default=0, metavar="N",
              help="Also recompute captions, crops and time steps of N random micro-batches.")  # fmt: skip
@site_option
def command(name: str, deep_samples: int, site_file: Path | None) -> int:
    """Prove from the ledger that all was trained once, in order.

    "All" is every micro-batch, across attempts. Recomputes the order from seed and dataset, shows what a crash
    repeated, and compares captions, crops, time steps, losses and rates wherever attempts overlap. Compares the rates
    of every optimizer step with the schedule of the run's lock, and each attempt's options with the lock's digest;
    counts skipped steps. What it could not look at is named. Exit code 1 if something differs, with the first place.

    Of a branch its own steps are proved, and those of its parent where that is at hand.

    Captions, models, files or networks that were changed after the run are shown, and change neither verdict nor exit
    code. The result is kept in the run for `kwrap report`, with the ledger's sha256 and the date.
    """
    from kohaku_wrap.training.comparing.site_places import bytes_to_hash
    from kohaku_wrap.training.records.networks import bytes_of_networks
    from kohaku_wrap.training.records.verification import keep_verification, seal_ledger
    from kohaku_wrap.training.verifying.verify import verify_run

    run = open_run(name, site_file)
    total = bytes_to_hash(run, site_file) + bytes_of_networks(run)
    seal = seal_ledger(run)
    with counting_bytes("comparing models", total) as count:
        report = verify_run(run, deep_samples, count, site_file)
    try:
        keep_verification(run, seal, describe(report))
    except OSError as error:
        print_note(f"note: the result is not kept for `kwrap report`: {run.folder}: {reason_of(error)}")
    if wants_json():
        print_json(describe(report))
    else:
        print_report(report, site_file)
    return 0 if report.is_proved else EXIT_FAILED


def describe(report: VerifyReport) -> dict[str, Any]:
    """The report as JSON has it."""
    from dataclasses import asdict

    return {**asdict(report), "run": report.run.folder, "proved": report.is_proved}


def print_report(report: VerifyReport, site_file: Path | None) -> None:
    """The report for people."""
    first = report.run.first_optimizer_step
    own = f", the first {first:,} of them by its parent" if first else ""
    rows: list[tuple[str, Any]] = [
        ("optimizer steps", f"{report.optimizer_steps:,} of {report.total_optimizer_steps:,}{own}"),
        (
            "positions trained once",
            f"{report.positions:,}" + (f", {report.fills:,} of them {FILLS}" if report.fills else ""),
        ),
        ("attempts", report.attempts),
        ("records", report.records),
    ]
    for repeat in report.repeats:
        steps = f"optimizer steps {repeat.first_optimizer_step:,} to {repeat.last_optimizer_step:,}"
        rows.append((f"attempt {repeat.attempt}, left behind", f"{steps} ({count_of(repeat.records, 'micro-batch')})"))
    if report.in_progress:
        rows.append(("step in progress", count_of(report.in_progress, "micro-batch")))
    if report.substitutes:
        rows.append(("with substitutes", count_of(report.substitutes, "micro-batch")))
    rows += [
        (check.name, check.detail if check.is_looked_at else f"not looked at: {check.detail}")
        for check in report.checks
    ]
    if report.attempts > 1:
        rows.append(("trained twice", f"{report.compared:,} positions, seen by more than one attempt"))
        rows.append(("loaded for skipped positions", f"{report.skipped_images_loaded:,} images"))
    proved = f"proved except {', '.join(report.unverified)}" if report.unverified else "proved"
    verdict = proved if report.is_proved else f"not proved, {count_of(len(report.faults), 'kind')} of fault"
    print_table(f"Ledger of {report.run.name}: {verdict}", rows, "" if report.faults else next_step(report, site_file))
    for note in report.notes:
        print_note(f"note: {note}")
    for change in report.changed_after:
        print_note(f"note: changed after the run: {change}")
    if report.faults:
        from kohaku_wrap.training.starting.choose_state import find_step_before
        from kohaku_wrap.training.supervising.status import advise

        step = find_step_before(report.run, min(fault.optimizer_step for fault in report.faults))
        back = command_line("resume", show_path(report.run.folder), "--step", step)
        go_back = f"Go back to before the first of these: {back}"
        is_skipped = all(fault.kind == "skipped" for fault in report.faults)
        lines = "\n".join(f"  {describe_fault(fault)}" for fault in report.faults)
        print_error(
            f"run {report.run.name}: the ledger does not prove the run\n{lines}",
            (is_skipped and advise(report.run)) or go_back,
        )


def next_step(report: VerifyReport, site_file: Path | None) -> str:
    from kohaku_wrap.publishing.publishing import BAKE_FORMULA
    from kohaku_wrap.training.comparing.site_places import find_base_model
    from kohaku_wrap.training.supervising.status import advise

    if not report.is_finished:
        return advise(report.run) or command_line("resume", show_path(report.run.folder))
    run = report.run
    network = next((path for path in run.networks if path.suffix == ".safetensors"), None)
    base = find_base_model(run, site_file) or run.lock.table("inputs").get("base_model")
    if network is None or not base:
        return command_line("status", show_path(run.folder))
    models = ("-m", f"base={show_path(Path(base))}", "-m", f"network={show_path(network)}")
    baked = run.folder / f"{run.name}-baked.safetensors"
    return command_line("merge", BAKE_FORMULA, *models, "-o", show_path(baked))


def describe_fault(fault: Fault) -> str:
    """One line: what, how often, where first."""
    where = f"optimizer step {fault.optimizer_step:,} (epoch {fault.epoch}, position {fault.position:,}"
    where += f", attempt {fault.attempt}, rank {fault.rank})" if fault.attempt else ")"
    return f"{fault.kind}: {fault.count:,} × {fault.what}; first at {where}"
