"""Proof from the ledger: every batch position trained once, in order, on the images that the seed says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kohaku_wrap.config.plan import open_captions
from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.errors import KwrapError, command_line
from kohaku_wrap.processes import NoAnswer, ask_python
from kohaku_wrap.streams import draws, stream_key
from kohaku_wrap.training.data.order import BatchOrder, StepCount
from kohaku_wrap.training.records.ledger import (
    FILL,
    SUBSTITUTE,
    BadLedger,
    compute_checksums,
    list_ledger_files,
    read_ledger_file,
)
from kohaku_wrap.training.records.ledger_checks import BoolArray, Checker, Fault, Int64Array, Records
from kohaku_wrap.training.records.manifest import DamagedState, read_manifest
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.records.states import list_states
from kohaku_wrap.training.runs.attempts import Attempt, last_kept_steps, list_attempts
from kohaku_wrap.training.runs.folder import Run
from kohaku_wrap.training.runs.resume import is_finished

RECOMPUTE_WORKER = "kohaku_wrap.training.workers.recompute"

FARTHEST = np.uint64(1 << 62)
"""A damaged position may be any 64 bits; this one still adds up."""


class CannotRecompute(KwrapError):
    """The worker that recomputes samples could not do it."""


class NoLedger(KwrapError):
    """The run has trained nothing yet, or its ledger is gone."""


@dataclass(frozen=True)
class Repeat:
    """What an attempt trained that a later one trained again."""

    attempt: int
    """The attempt whose work was left behind."""

    first_optimizer_step: int
    """The first step trained again, counted from 1."""

    last_optimizer_step: int
    """The last one, perhaps in part."""

    records: int
    """Micro-batches."""


@dataclass(frozen=True)
class VerifyReport:
    """What the ledger proves."""

    run: Run
    """The run."""

    attempts: int
    """Attempts that left records."""

    records: int
    """Micro-batches recorded, repeats included."""

    optimizer_steps: int
    """Whole optimizer steps proved, from the first on."""

    total_optimizer_steps: int
    """Of the run."""

    is_finished: bool
    """Whether the run has its final network."""

    positions: int
    """Positions trained exactly once, fills included."""

    fills: int
    """Of these, the ones that only complete an epoch's last optimizer step."""

    substitutes: int
    """Batches in which an unreadable image was replaced."""

    in_progress: int
    """Micro-batches of an optimizer step that is not whole yet."""

    order_checked: bool
    """Whether the images at each position were recomputed from seed and dataset."""

    compared: int
    """Positions recorded by more than one attempt, whose digests were compared."""

    skipped_images_loaded: int
    """Images that resumes opened for positions already trained; 0 when skipping costs nothing."""

    repeats: tuple[Repeat, ...]
    """What crashes repeated."""

    faults: tuple[Fault, ...]
    """Empty when all is proved."""

    notes: tuple[str, ...] = ()
    """What the reader should know."""

    deep_samples: int = 0
    """Micro-batches recomputed from images and captions."""

    @property
    def is_proved(self) -> bool:
        return not self.faults


def verify_run(run: Run, deep_samples: int = 0) -> VerifyReport:
    """Check the ledger of all attempts against seed, dataset and each other.

    Raises NoLedger, and BadLedger for a file that is not one.
    """
    count = run.lock.count
    records = read_records(run, count)
    attempts = list_attempts(run)
    kept_until = last_kept_steps(attempts)
    limits = np.array(
        [min(kept_until.get(int(number), np.inf), 2.0**62) for number in range(records.attempt.max() + 1)]
    )
    kept = records.optimizer_step <= limits[records.attempt].astype(np.int64)
    checker = Checker(count, records)
    checker.check_bits()
    checker.check_places()
    checker.check_file_order()
    total = run.lock.total_optimizer_steps
    steps_due = total if is_finished(run) else max([0, *list_saved_steps(run, attempts)])
    foreign = max((each.start_optimizer_step for each in list_foreign(attempts, kept_until)), default=0)
    steps, in_progress = checker.check_coverage(kept, total, steps_due, foreign)
    notes = []
    if foreign:
        notes.append(f"trained by plain sd-scripts up to optimizer step {foreign:,} (--foreign): proved from there on")
    order_checked = run.lock.data == "kwrap"
    if order_checked:
        order, ids = read_order(run)
        checker.check_order(order, ids)
    else:
        notes.append('data = "sd-scripts": the images at each position are compared between attempts only')
    compared = checker.check_overlaps()
    on_line = kept & (records.optimizer_step <= steps)
    faults = checker.faults
    if deep_samples:
        deep_samples = min(deep_samples, int(on_line.sum()))
        chosen = choose_samples(np.flatnonzero(on_line), deep_samples)
        checker.check_content(chosen, recompute_content(run, records, chosen))
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
        order_checked=order_checked,
        compared=compared,
        skipped_images_loaded=max((int(line.get("skipped_images_loaded", 0)) for line in read_metrics(run)), default=0),
        repeats=tuple(list_repeats(records, kept)),
        faults=tuple(faults),
        notes=tuple(notes),
        deep_samples=deep_samples,
    )


def list_foreign(attempts: list[Attempt], kept: Mapping[int, float]) -> list[Attempt]:
    """The attempts on the line that began from a state of plain sd-scripts."""
    return [each for each in attempts if each.foreign and each.start_optimizer_step <= kept[each.number]]


def list_saved_steps(run: Run, attempts: list[Attempt]) -> Iterator[int]:
    """Optimizer steps that the line has a state of, or had: the ledger is on disk before a state is written."""
    yield from (attempt.start_optimizer_step for attempt in attempts[-1:])
    kept = last_kept_steps(attempts)
    for step, path in list_states(run.states):
        with suppress(DamagedState):
            if step <= kept.get(read_manifest(path).attempt, 0):
                yield step


def read_records(run: Run, count: StepCount) -> Records:
    """The records of all files. Raises NoLedger where there are none, BadLedger for a file under another's name."""
    parts, starts, owners = [], [], []
    total = 0
    for attempt, rank, path in list_ledger_files(run.ledger):
        header, part = read_ledger_file(path)
        if (header.attempt, header.rank) != (attempt, rank) or not header.processes:
            raise BadLedger(
                f"{path}: the header is of attempt {header.attempt}, rank {header.rank} of {header.processes}",
                "The file was renamed, swapped or damaged: restore it.",
            )
        if len(part):
            parts.append(part)
            starts.append(total)
            owners.append(np.full((len(part), 3), (attempt, rank, header.processes), dtype=np.int64))
            total += len(part)
    if not total and (files := sorted(path.name for path in run.ledger.glob("attempt-*"))):
        raise NoLedger(
            f"{run.ledger}: no whole record in {', '.join(files)}",
            f"If the run has trained, they are damaged: restore them. See `{command_line('status', run.folder)}`.",
        )
    if not total:
        raise NoLedger(
            f"{run.ledger}: no record of any training", f"Train first; see `{command_line('status', run.folder)}`."
        )
    table = np.concatenate(parts)
    owner = np.concatenate(owners)
    epoch = table["epoch"].astype(np.int64)
    position = np.minimum(table["position"], FARTHEST).astype(np.int64)
    return Records(
        attempt=owner[:, 0],
        rank=owner[:, 1],
        processes=owner[:, 2],
        optimizer_step=table["optimizer_step"].astype(np.int64),
        epoch=epoch,
        position=position,
        flags=table["flags"].astype(np.int64),
        order_digest=table["order_digest"],
        content_digest=table["content_digest"],
        learning_rate=table["learning_rate"],
        global_index=epoch * count.positions_per_epoch + position,
        damaged=table["checksum"] != compute_checksums(table),
        strays=(table["attempt"] != owner[:, 0]) | (table["rank"] != owner[:, 1]),
        file_starts=starts,
    )


def read_order(run: Run) -> tuple[BatchOrder, Int64Array]:
    """The order that the run's seed and dataset make, and the post id of each of its entries."""
    lock = run.lock
    options: Mapping[str, object] = lock.tables.get("dataset", {})
    table = open_captions(Path(str(options["image_dir"]))).read_all()
    buckets = assign_buckets(
        table["width"].to_numpy(), table["height"].to_numpy(), BucketOptions.from_dataset_options(options)
    )
    repeats = int(str(options.get("num_repeats", 1) or 1))
    ids = np.tile(table["id"].to_numpy().astype(np.int64), repeats)
    bucket_of_entry = np.tile(buckets.bucket_of_image, repeats)
    return BatchOrder(bucket_of_entry, lock.batch_per_gpu, lock.seed, lock.group), ids


def choose_samples(candidates: Int64Array, samples: int) -> Int64Array:
    """Some of the records, spread by a fixed draw, so that a second call looks at the same ones."""
    return np.sort(candidates[np.argsort(draws(stream_key("deep"), candidates))[:samples]])


def recompute_content(run: Run, records: Records, chosen: Int64Array) -> list[int | str]:
    """The content digest of each chosen record, made anew from images and captions, or why it could not be.

    Raises CannotRecompute when the worker fails as a whole.
    """
    samples = [[int(records.epoch[each]), int(records.position[each])] for each in chosen]
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        digests: list[int | str] = ask_python(
            RECOMPUTE_WORKER, run.folder, request=samples, added=settings, folder=run.folder
        )
    except NoAnswer as failed:
        raise CannotRecompute(
            f"the samples cannot be recomputed: {failed.message}", "Verify without --deep, or fix that."
        ) from None
    return digests


def list_repeats(records: Records, kept: BoolArray) -> Iterator[Repeat]:
    """What each attempt trained beyond the state from which a later one went on."""
    for attempt in np.unique(records.attempt[~kept]).tolist():
        steps = records.optimizer_step[~kept & (records.attempt == attempt)]
        yield Repeat(attempt, int(steps.min()), int(steps.max()), len(steps))
