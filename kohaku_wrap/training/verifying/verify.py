"""Proof from the ledger: every batch position trained once, in order, on the images that the seed says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from kohaku_wrap.config.fates import list_unverified
from kohaku_wrap.config.site import load_site
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.caption_rows import read_captions_metadata
from kohaku_wrap.formats.caption_writer import DamagedCaptions
from kohaku_wrap.training.comparing.differences import (
    NOT_KEPT_BY_0_1,
    check_captions,
    list_changes,
    list_missing_records,
)
from kohaku_wrap.training.comparing.places import Places
from kohaku_wrap.training.comparing.site_places import settle_places
from kohaku_wrap.training.records.ancestry import Until, find_origin
from kohaku_wrap.training.records.attempts import Attempt, last_kept_steps, list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import (
    FILL,
    SUBSTITUTE,
)
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.records.networks import compare_networks, is_finished
from kohaku_wrap.training.records.states import read_manifests
from kohaku_wrap.training.verifying.deep_checks import check_caches, check_deep
from kohaku_wrap.training.verifying.held_out_checks import check_held_out
from kohaku_wrap.training.verifying.ledger_checks import (
    BoolArray,
    Checker,
    Fault,
    Records,
    limits_of,
)
from kohaku_wrap.training.verifying.ledger_files import list_conditions, read_files
from kohaku_wrap.training.verifying.line_checks import Check, check_steps
from kohaku_wrap.training.verifying.origin_checks import check_origin
from kohaku_wrap.training.verifying.run_order import read_order
from kohaku_wrap.training.verifying.verify_report import (
    Repeat,
    VerifyReport,
    describe_losses,
    describe_networks,
)


def verify_run(
    run: Run,
    deep_samples: int = 0,
    on_bytes: Callable[[int], None] | None = None,
    site_file: Path | None = None,
    until: Until | None = None,
) -> VerifyReport:
    """Check the ledger of all attempts against seed, dataset, lock and each other.

    `until`: only the part that a branch began from. Of a branch its parents are looked at too, where they are at hand.

    `on_bytes` gets the bytes that were read of models whose hash is not kept. `site_file`: where images and models lie
    now. Raises NoLedger, BadLedger for a file that is not one, and what `load_site` raises.
    """
    if site_file is not None:
        load_site(site_file)
    places: Places | None = None
    with suppress(KwrapError):
        places = settle_places(run, site_file, on_bytes)
        run = places.find_run()
    count = run.lock.count
    last_attempt, last_step = (until.attempt, until.optimizer_step) if until else (math.inf, math.inf)
    files = read_files(run, last_attempt)
    records = Records.of_files(files, count)
    attempts = [attempt for attempt in list_attempts(run) if attempt.number <= last_attempt]
    kept_until = {number: min(step, last_step) for number, step in last_kept_steps(attempts).items()}
    kept = records.optimizer_step <= limits_of(kept_until, records.attempt)
    checker = Checker(count, records)
    checker.check_bits()
    checker.check_places()
    checker.check_file_order()
    total = until.optimizer_step if until else run.lock.total_optimizer_steps
    steps_due = total if until or is_finished(run) else max([0, *list_saved_steps(run, attempts)])
    begun = list_foreign(attempts, kept_until)
    foreign = max([run.first_optimizer_step, *(each.start_optimizer_step for each in begun)])
    steps, in_progress = checker.check_coverage(kept, total, steps_due, foreign)
    notes = [NOT_KEPT_BY_0_1] if run.lock.format == 1 else []
    if begun:
        by, word = ("another run", "--allow other-run") if begun[-1].lineage else ("plain sd-scripts", "--foreign")
        notes.append(f"trained by {by} up to optimizer step {foreign:,} ({word}): proved from there on")
    notes += [
        f"attempt {each.number} accepted {where}: {what}"
        for each in attempts
        for where, what in each.differences.items()
    ]
    changed = [] if until else list_changed(run, places, on_bytes)
    networks = [] if until else list(compare_networks(run, on_bytes))
    damage = "" if until else find_damaged_captions(run)
    captions_changed = bool(damage) or has_other_captions(run)
    order = check_order(run, checker, captions_changed)
    held_out = check_held_out(run, checker, order)
    overlaps = checker.check_overlaps(list_conditions(run, attempts, files))
    line = check_steps(run, files, kept_until, steps, steps_due, foreign)
    on_line = kept & (records.optimizer_step <= steps)
    ancestry, ancestry_faults = check_ancestry(run, on_bytes)
    latents, latents_changed = check_caches(run, deep_samples)
    deep, deep_samples = check_deep(run, checker, np.flatnonzero(on_line), deep_samples, captions_changed)
    if not order.is_looked_at:
        notes.append(f"order: {order.detail}")
    return VerifyReport(
        run=run,
        attempts=len(set(records.attempt.tolist())),
        records=len(records),
        optimizer_steps=steps,
        total_optimizer_steps=total,
        is_finished=is_finished(run),
        positions=int(np.unique(records.global_index[on_line]).size),
        fills=int(((records.flags & FILL) > 0)[on_line].sum()),
        substitutes=int(((records.flags & SUBSTITUTE) > 0)[on_line].sum()),
        in_progress=in_progress,
        order_checked=order.is_looked_at,
        compared=overlaps.positions,
        skipped_images_loaded=max((int(each.get("skipped_images_loaded", 0)) for each in read_metrics(run)), default=0),
        repeats=tuple(list_repeats(records, kept)),
        faults=tuple(checker.faults + line.faults + ancestry_faults),
        notes=tuple(notes),
        deep_samples=deep_samples,
        skipped_steps=line.bad_steps.skipped,
        non_finite_steps=line.bad_steps.non_finite,
        checks=(
            order,
            *held_out,
            describe_losses(overlaps),
            *line.checks,
            *ancestry,
            describe_networks(networks),
            *deep,
            *latents,
        ),
        unverified=list_unverified(run.lock.files),
        changed_after=(
            *changed,
            *filter(None, [damage]),
            *latents_changed,
            *(network.change for network in networks if network.is_changed),
        ),
    )


def check_ancestry(run: Run, on_bytes: Callable[[int], None] | None) -> tuple[list[Check], list[Fault]]:
    """What a branch began from, and the part of its parent up to there; nothing for a run that is none."""
    checks, faults = check_origin(run, on_bytes)
    origin = run.lock.origin
    if origin is None:
        return checks, faults
    found = find_origin(run)
    if found is None:
        why = f"run {origin.run} is not at hand: proved from the state on that this run holds"
        return [*checks, Check("line", False, why)], faults
    parent, until = found
    try:
        report = verify_run(parent, on_bytes=on_bytes, until=until)
    except KwrapError as error:
        return [*checks, Check("line", False, f"run {parent.name}: {error.message}")], faults
    faults += [replace(fault, what=f"in run {parent.name}: {fault.what}") for fault in report.faults]
    own = f"run {parent.name}, optimizer steps {parent.first_optimizer_step + 1:,} to {report.optimizer_steps:,}"
    above = [check for check in report.checks if check.name == "line"]
    detail = "; ".join([f"{own}: {'proved' if report.is_proved else 'not proved'}", *(each.detail for each in above)])
    return [*checks, Check("line", all(each.is_looked_at for each in above), detail)], faults


def list_changed(run: Run, places: Places | None, on_bytes: Callable[[int], None] | None = None) -> list[str]:
    """What of the run's files, models and captions is no longer what its lock says, and of its attempts' records."""
    records = list(list_missing_records(run))
    try:
        return [f"{problem.where}: {problem.what}" for problem in list_changes(run, None, on_bytes, places)] + records
    except KwrapError as error:
        return [error.message, *records]


def find_damaged_captions(run: Run) -> str:
    """What is wrong with captions whose rows do not have the digest that their file records; empty for none."""
    try:
        check_captions(run.lock.data, run.find_images(), run.lock.dataset_digest)
    except DamagedCaptions as error:
        return error.message
    except KwrapError:
        return ""
    return ""


def has_other_captions(run: Run) -> bool:
    """Whether the captions are others by now than those that the run was made with, or gone."""
    digest = run.lock.dataset_digest
    with suppress(KwrapError):
        return bool(digest) and read_captions_metadata(run.find_images(), digest).get("digest") != digest
    return True


def check_order(run: Run, checker: Checker, captions_changed: bool) -> Check:
    """Recompute the order from seed and dataset, unless the dataset is another one by now."""
    if run.lock.data != "kwrap":
        return Check(
            "order", False, 'data = "sd-scripts": the images at each position are compared between attempts only'
        )
    try:
        order, ids = read_order(run)
    except KwrapError as error:
        return Check("order", False, f"the dataset cannot be read ({error.message})")
    before = len(checker.faults)
    checker.check_order(order, ids)
    if len(checker.faults) > before and captions_changed:
        # The ledger cannot be held against a dataset that it was not made from.
        del checker.faults[before:]
        return Check("order", False, "the captions were changed after the run; compared between attempts only")
    return Check("order", True, "recomputed from seed and dataset")


def list_foreign(attempts: list[Attempt], kept: Mapping[int, float]) -> list[Attempt]:
    """The attempts on the line that began from a state of plain sd-scripts or of another run."""
    return [
        each for each in attempts if (each.foreign or each.lineage) and each.start_optimizer_step <= kept[each.number]
    ]


def list_saved_steps(run: Run, attempts: list[Attempt]) -> Iterator[int]:
    """Optimizer steps that the line has a state of, or had: the ledger is on disk before a state is written."""
    yield from (attempt.start_optimizer_step for attempt in attempts[-1:])
    kept = last_kept_steps(attempts)
    yield from (step for step, manifest in read_manifests(run.states) if step <= kept.get(manifest.attempt, 0))


def list_repeats(records: Records, kept: BoolArray) -> Iterator[Repeat]:
    """What each attempt trained beyond the state from which a later one went on."""
    for attempt in np.unique(records.attempt[~kept]).tolist():
        steps = records.optimizer_step[~kept & (records.attempt == attempt)]
        yield Repeat(attempt, int(steps.min()), int(steps.max()), len(steps))
