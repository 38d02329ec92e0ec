"""Proof from the ledger: every batch position trained once, in order, on the images that the seed says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kohaku_wrap.config.plan import open_captions
from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.attempts import last_kept_steps, list_attempts
from kohaku_wrap.training.ledger import FILL, SUBSTITUTE, LedgerHeader, list_ledger_files, read_ledger_file
from kohaku_wrap.training.order import NO_IMAGE, BatchOrder, StepCount, order_digests
from kohaku_wrap.training.resume import is_finished
from kohaku_wrap.training.runs import Run

POSITIONS_A_BLOCK = 1 << 20

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]


class NoLedger(KwrapError):
    """The run has trained nothing yet, or its ledger is gone."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault, with its first place."""

    kind: str
    """`missing`, `duplicate`, `out-of-order`, `misplaced`, `order`, `content`, `rate`, `mark` or `unfinished`."""

    count: int
    """Records or positions that have it."""

    attempt: int
    """Of the first one."""

    rank: int
    """Of the first one."""

    optimizer_step: int
    """Of the first one, counted from 1."""

    epoch: int
    """Of the first one, counted from 0."""

    position: int
    """Of the first one: the global batch position in its epoch."""

    what: str
    """In words."""


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


@dataclass
class Records:
    """All records of a run as columns, in the order of attempt, rank and time."""

    attempt: Int64Array
    """(records,)"""

    rank: Int64Array
    """(records,)"""

    processes: Int64Array
    """(records,) W of the attempt."""

    optimizer_step: Int64Array
    """(records,) counted from 1."""

    epoch: Int64Array
    """(records,)"""

    position: Int64Array
    """(records,) in the epoch."""

    flags: Int64Array
    """(records,)"""

    order_digest: UInt64Array
    """(records,)"""

    content_digest: UInt64Array
    """(records,)"""

    learning_rate: npt.NDArray[np.float64]
    """(records,)"""

    global_index: Int64Array
    """(records,) epoch times positions per epoch, plus position."""

    file_starts: list[int] = field(default_factory=list)
    """Where each file's records begin."""

    def __len__(self) -> int:
        return len(self.attempt)


def verify_run(run: Run, deep_samples: int = 0) -> VerifyReport:
    """Check the ledger of all attempts against seed, dataset and each other.

    Raises NoLedger, and BadLedger for a file that is not one.
    """
    count = run.lock.count
    headers, records = read_records(run, count)
    kept_until = last_kept_steps(list_attempts(run))
    limits = np.array(
        [min(kept_until.get(int(number), np.inf), 2.0**62) for number in range(records.attempt.max() + 1)]
    )
    kept = records.optimizer_step <= limits[records.attempt].astype(np.int64)
    checker = Checker(count, records)
    checker.check_places()
    checker.check_file_order()
    steps, in_progress = checker.check_coverage(kept, run.lock.total_optimizer_steps, is_finished(run))
    notes = []
    order_checked = run.lock.data == "kwrap"
    if order_checked:
        order, ids = read_order(run, headers)
        checker.check_order(order, ids)
    else:
        notes.append('data = "sd-scripts": the images at each position are compared between attempts only')
    compared = checker.check_overlaps()
    on_line = kept & (records.optimizer_step <= steps)
    faults = checker.faults
    if deep_samples:
    return VerifyReport(
        run=run,
        attempts=len(set(records.attempt.tolist())),
        records=len(records),
        optimizer_steps=steps,
        total_optimizer_steps=run.lock.total_optimizer_steps,
        is_finished=is_finished(run),
        positions=int(np.unique(records.global_index[on_line]).size),
        fills=int(((records.flags & FILL) > 0)[on_line].sum()),
        substitutes=int(((records.flags & SUBSTITUTE) > 0)[on_line].sum()),
        in_progress=in_progress,
        order_checked=order_checked,
        compared=compared,
        repeats=tuple(list_repeats(records, kept)),
        faults=tuple(faults),
        notes=tuple(notes),
        deep_samples=deep_samples,
    )


def read_records(run: Run, count: StepCount) -> tuple[list[LedgerHeader], Records]:
    """The headers and records of all files. Raises NoLedger where there are none."""
    headers, parts, starts, processes = [], [], [], []
    total = 0
    for _, _, path in list_ledger_files(run.ledger):
        header, part = read_ledger_file(path)
        if len(part):
            headers.append(header)
            parts.append(part)
            starts.append(total)
            processes.append(np.full(len(part), header.processes))
            total += len(part)
    if not total:
        raise NoLedger(f"{run.ledger}: no record of any training", f"Train first; see `kwrap status {run.folder}`.")
    table = np.concatenate(parts)
    epoch, position = table["epoch"].astype(np.int64), table["position"].astype(np.int64)
    records = Records(
        attempt=table["attempt"].astype(np.int64),
        rank=table["rank"].astype(np.int64),
        processes=np.concatenate(processes).astype(np.int64),
        optimizer_step=table["optimizer_step"].astype(np.int64),
        epoch=epoch,
        position=position,
        flags=table["flags"].astype(np.int64),
        order_digest=table["order_digest"],
        content_digest=table["content_digest"],
        learning_rate=table["learning_rate"],
        global_index=epoch * count.positions_per_epoch + position,
        file_starts=starts,
    )
    return headers, records


def read_order(run: Run, headers: Sequence[LedgerHeader]) -> tuple[BatchOrder, Int64Array]:
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
    return BatchOrder(bucket_of_entry, headers[0].batch_size, headers[0].seed, lock.group), ids


class Checker:
    """Collects the faults of a run's records."""

    def __init__(self, count: StepCount, records: Records) -> None:
        self.count = count
        self.records = records
        self.faults: list[Fault] = []

    def report(self, kind: str, bad: BoolArray, what: str) -> None:
        """Add a fault for the records marked in `bad`, if any; the first is the earliest in training order."""
        found = np.flatnonzero(bad)
        if len(found):
            first = found[np.lexsort((self.records.attempt[found], self.records.global_index[found]))[0]]
            records = self.records
            self.faults.append(
                Fault(
                    kind, len(found), int(records.attempt[first]), int(records.rank[first]),
                    int(records.optimizer_step[first]), int(records.epoch[first]), int(records.position[first]), what,
                )
            )  # fmt: skip

    def report_position(self, kind: str, places: Int64Array, what: str) -> None:
        """Add a fault for positions that no single record stands for."""
        if len(places):
            epoch, position = divmod(int(places[0]), self.count.positions_per_epoch)
            step = self.count.optimizer_step_of(epoch, position)
            self.faults.append(Fault(kind, len(places), 0, 0, step, epoch, position, what))

    def check_places(self) -> None:
        """Rank, step and mark of each record follow from its position."""
        records, count = self.records, self.count
        steps = records.epoch * count.optimizer_steps_per_epoch + records.position // count.group + 1
        wrong = (records.position >= count.positions_per_epoch) | (records.optimizer_step != steps)
        wrong |= records.position % records.processes != records.rank
        self.report("misplaced", wrong, "recorded under another optimizer step or rank than its position has")
        is_fill = records.position >= count.batches
        self.report("mark", is_fill != ((records.flags & FILL) > 0), "marked as a fill and is none, or the other way")

    def check_file_order(self) -> None:
        """Each rank of each attempt went from position to position without a gap."""
        records = self.records
        if len(records) < 2:
            return
        expected = np.ones(len(records), dtype=bool)
        expected[1:] = np.diff(records.global_index) == records.processes[1:]
        expected[records.file_starts] = True
        self.report("out-of-order", ~expected, "does not follow the record before it")

    def check_coverage(self, kept: BoolArray, total_steps: int, finished: bool) -> tuple[int, int]:
        """Every position of the line trained once; the whole steps proved, and records of a step not whole yet."""
        group = self.count.group
        index = self.records.global_index[kept]
        trained = np.bincount(index[(index >= 0) & (index < total_steps * group)], minlength=total_steps * group)
        seen = np.flatnonzero(trained)
        last = int(seen[-1]) // group + 1 if len(seen) else 0
        # The last step seen may be in progress; any other must be whole.
        whole = last if last and trained[(last - 1) * group : last * group].all() else max(last - 1, 0)
        steps = total_steps if finished else whole
        missing = np.flatnonzero(trained[: steps * group] == 0)
        self.report_position("missing", missing, "never trained on the run's line")
        twice = np.zeros(len(trained), dtype=bool)
        twice[trained > 1] = True
        many = kept.copy()
        many[kept] = twice[np.clip(index, 0, len(twice) - 1)] if len(twice) else False
        self.report("duplicate", many, "trained more than once on the run's line")
        return steps, int(trained[steps * group :].sum())

    def check_order(self, order: BatchOrder, ids: Int64Array) -> None:
        """The images of each record are those that the seed puts at its position."""
        records = self.records
        wrong = np.zeros(len(records), dtype=bool)
        for epoch in np.unique(records.epoch).tolist():
            laid_out = order.epoch(epoch)
            places = np.arange(len(laid_out), dtype=np.int64)
            digests = np.concatenate(list(digest_blocks(laid_out.image_table, places, ids, order.batch_size)))
            here = np.flatnonzero((records.epoch == epoch) & (records.position < len(laid_out)))
            wrong[here] = digests[records.position[here]] != records.order_digest[here]
        self.report("order", wrong, "other images than seed and dataset put there")

    def check_overlaps(self) -> int:
        """Positions recorded more than once agree in images, content and rate; how many there are."""
        records = self.records
        by_place = np.lexsort((records.attempt, records.global_index))
        index = records.global_index[by_place]
        again = np.flatnonzero(index[1:] == index[:-1]) + 1
        if not len(again):
            return 0
        later, earlier = by_place[again], by_place[again - 1]
        columns: list[tuple[str, npt.NDArray[np.generic], str]] = [
            ("order", records.order_digest, "other images than an earlier attempt had there"),
            (
                "content",
                records.content_digest,
                "other captions, crops or time steps than an earlier attempt had there",
            ),
            ("rate", records.learning_rate, "another learning rate than an earlier attempt had there"),
        ]
        for kind, values, what in columns:
            bad = np.zeros(len(records), dtype=bool)
            bad[later] = values[later] != values[earlier]
            self.report(kind, bad, what)
        return int(np.unique(index[again]).size)


def digest_blocks(image_table: object, places: Int64Array, ids: Int64Array, batch_size: int) -> Iterator[UInt64Array]:
    """The order digests of an epoch, a block of positions at a time."""
    for start in range(0, len(places), POSITIONS_A_BLOCK):
        table = image_table(places[start : start + POSITIONS_A_BLOCK], batch_size)  # type: ignore[operator]
        yield order_digests(np.where(table == NO_IMAGE, NO_IMAGE, ids[table]))


def list_repeats(records: Records, kept: BoolArray) -> Iterator[Repeat]:
    """What each attempt trained beyond the state from which a later one went on."""
    for attempt in np.unique(records.attempt[~kept]).tolist():
        steps = records.optimizer_step[~kept & (records.attempt == attempt)]
        yield Repeat(attempt, int(steps.min()), int(steps.max()), len(steps))
