"""The columns of a run's ledger, and what each of them must be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.steps import StepCount
from kohaku_wrap.training.data.order import NO_IMAGE, BatchOrder, EpochOrder, order_digests
from kohaku_wrap.training.records.ledger import FILL, LedgerFile, compute_checksums

POSITIONS_A_BLOCK = 1 << 20

FARTHEST = np.uint64(1 << 62)
"""A damaged position may be any 64 bits; this one still adds up."""

LOSS_TOLERANCE = 0.1
"""Between two losses of one batch, relative to the larger, where attempts need not give the same bits: sums are rounded
in another order, and the optimizer lets that grow until the end of the overlap.
"""

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Fault:
    """One kind of fault, with its first place."""

    kind: str
    """`damaged`, `missing`, `duplicate`, `out-of-order`, `misplaced`, `order`, `content`, `loss`, `rate`, `mark`,
    `step`, `skip`, `skipped`, `options`, `parent`, `held-out` or `deep`."""

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
class Conditions:
    """Under what an attempt trained; equal and deterministic ones give the same bits."""

    is_deterministic: bool
    """Whether it would give the same bits a second time."""

    processes: int
    """W: sums over other numbers of processes are rounded in another order."""

    device_digest: int
    """Of the kind of device and of torch's version; 0 where it is not known."""

    threads: int | None
    """OMP_NUM_THREADS, for the same reason; None where it is not known."""

    accepted: frozenset[str]
    """Differences from the run's lock that the person accepted."""


UNKNOWN = Conditions(False, 0, 0, None, frozenset())
"""Of an attempt whose file is gone."""


@dataclass(frozen=True)
class Columns:
    """What all records of a run have, of micro-batches and of steps, in the order of attempt, rank and time."""

    attempt: Int64Array
    """(records,) of the file."""

    rank: Int64Array
    """(records,) of the file."""

    processes: Int64Array
    """(records,) W of the attempt."""

    optimizer_step: Int64Array
    """(records,) counted from 1."""

    epoch: Int64Array
    """(records,)"""

    flags: Int64Array
    """(records,)"""

    damaged: BoolArray
    """(records,) whether the record differs from its checksum."""

    misplaced: BoolArray
    """(records,) whether the record names another attempt or rank than its file does, or stands at a wrong place."""

    def __len__(self) -> int:
        return len(self.attempt)


def read_columns(files: Sequence[LedgerFile], parts: Sequence[npt.NDArray[np.void]]) -> tuple[Any, dict[str, Any]]:
    """The part of each file that `parts` has, as one table, and the values of `Columns`."""
    table = np.concatenate(parts)
    owners = [(file.header.attempt, file.header.rank, file.header.processes) for file in files]
    attempt, rank, processes = np.repeat(np.array(owners, dtype=np.int64), [len(part) for part in parts], axis=0).T
    columns = {name: table[name].astype(np.int64) for name in ("optimizer_step", "epoch", "flags")}
    columns |= {"attempt": attempt, "rank": rank, "processes": processes}
    misplaced = (table["attempt"] != attempt) | (table["rank"] != rank)
    return table, {**columns, "damaged": table["checksum"] != compute_checksums(table), "misplaced": misplaced}


@dataclass(frozen=True)
class Records(Columns):
    """All records of micro-batches of a run."""

    position: Int64Array
    """(records,) in the epoch."""

    order_digest: UInt64Array
    """(records,)"""

    content_digest: UInt64Array
    """(records,)"""

    loss: npt.NDArray[np.float64]
    """(records,) mean over the batch."""

    learning_rate: npt.NDArray[np.float64]
    """(records,)"""

    global_index: Int64Array
    """(records,) epoch times positions per epoch, plus position."""

    file_starts: list[int]
    """Where each file's records begin."""

    @classmethod
    def of_files(cls, files: Sequence[LedgerFile], count: StepCount) -> Records:
        """The columns of all files that hold a record, in their order."""
        files = [file for file in files if len(file.records)]
        table, columns = read_columns(files, [file.records for file in files])
        position = np.minimum(table["position"], FARTHEST).astype(np.int64)
        return cls(
            **columns,
            position=position,
            order_digest=table["order_digest"],
            content_digest=table["content_digest"],
            loss=table["loss"],
            learning_rate=table["learning_rate"],
            global_index=columns["epoch"] * count.positions_per_epoch + position,
            file_starts=np.cumsum([0, *(len(file.records) for file in files[:-1])]).tolist(),
        )


@dataclass(frozen=True)
class Overlaps:
    """Positions that more than one attempt trained."""

    positions: int
    """How many."""

    exact: int = 0
    """Pairs of records whose losses had to agree bit for bit."""

    loose: int = 0
    """Pairs whose losses had to agree within LOSS_TOLERANCE."""

    left_out: int = 0
    """Pairs of attempts with other options, accepted by the person, whose losses say nothing."""

    largest: float = 0.0
    """Difference between two losses of the loose pairs, relative to the larger."""


class Checker:
    """Collects the faults of a run's records."""

    def __init__(self, count: StepCount, records: Records) -> None:
        self.count = count
        self.records = records
        self.faults: list[Fault] = []

    def report(self, kind: str, found: Int64Array, what: str) -> None:
        """Add a fault for the records in these rows, if any; the first is the earliest in training order."""
        if len(found):
            records = self.records
            first = found[np.lexsort((records.attempt[found], records.global_index[found]))[0]]
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

    def check_bits(self) -> None:
        """Each record is as it was written."""
        damaged = np.flatnonzero(self.records.damaged)
        self.report("damaged", damaged, "differs from its checksum: the file has changed since training")

    def check_places(self) -> None:
        """Rank, step and mark of each record follow from its position."""
        records, count = self.records, self.count
        steps = records.epoch * count.optimizer_steps_per_epoch + records.position // count.group + 1
        wrong = (records.position >= count.positions_per_epoch) | (records.optimizer_step != steps)
        wrong |= (records.position % records.processes != records.rank) | records.misplaced
        what = "recorded under another optimizer step, attempt or rank than its position has"
        self.report("misplaced", np.flatnonzero(wrong), what)
        wrong = (records.position >= count.batches) != ((records.flags & FILL) > 0)
        self.report("mark", np.flatnonzero(wrong), "marked as a fill and is none, or the other way")

    def check_file_order(self) -> None:
        """Each rank of each attempt went from position to position without a gap."""
        records = self.records
        if len(records) < 2:
            return
        expected = np.ones(len(records), dtype=bool)
        expected[1:] = np.diff(records.global_index) == records.processes[1:]
        expected[records.file_starts] = True
        self.report("out-of-order", np.flatnonzero(~expected), "does not follow the record before it")

    def check_coverage(self, kept: BoolArray, total_steps: int, steps_due: int, foreign: int = 0) -> tuple[int, int]:
        """Every position of the line trained once; the whole steps proved, and records of a step not whole yet.

        `steps_due`: optimizer steps that must be there, as the run is finished or has a state of them; `foreign`: the
        first ones of them that plain sd-scripts trained.
        """
        group = self.count.group
        rows = np.flatnonzero(kept)
        index = self.records.global_index[rows]
        trained = np.bincount(index[(index >= 0) & (index < total_steps * group)], minlength=total_steps * group)
        seen = np.flatnonzero(trained)
        last = int(seen[-1]) // group + 1 if len(seen) else 0
        # The last step seen may be in progress; any other must be whole.
        whole = last if last and trained[(last - 1) * group : last * group].all() else max(last - 1, 0)
        steps = max(whole, min(steps_due, total_steps))
        missing = np.flatnonzero(trained[foreign * group : steps * group] == 0) + foreign * group
        self.report_position("missing", missing, "never trained on the run's line")
        again = rows[trained[np.clip(index, 0, len(trained) - 1)] > 1] if len(trained) else rows[:0]
        self.report("duplicate", again, "trained more than once on the run's line")
        return steps, int(trained[steps * group :].sum())

    def check_order(self, order: BatchOrder, ids: Int64Array) -> None:
        """The images of each record are those that the seed puts at its position."""
        wrong = [self.match_order(order, ids, epoch)[1] for epoch in np.unique(self.records.epoch).tolist()]
        self.report("order", np.concatenate(wrong), "other images than seed and dataset put there")

    def match_order(self, order: BatchOrder, ids: Int64Array, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The rows of an epoch's records with the images that an order puts there, and of those with others."""
        records = self.records
        digests = np.concatenate(list(digest_blocks(order.epoch(epoch), ids, order.batch_size)))
        here = np.flatnonzero((records.epoch == epoch) & (records.position < len(digests)))
        is_same = digests[records.position[here]] == records.order_digest[here]
        return here[is_same], here[~is_same]

    def check_content(self, chosen: Int64Array, digests: Sequence[int]) -> None:
        """The recomputed content of some records is what the ledger says."""
        other = chosen[self.records.content_digest[chosen] != np.array(digests, dtype=np.uint64)]
        self.report("deep", other, "other captions, crops or time steps when recomputed")

    def check_overlaps(self, conditions: Mapping[int, Conditions]) -> Overlaps:
        """Positions recorded more than once agree in images, content, rate and loss.

        `conditions`: of each attempt, which say how well losses can agree.
        """
        records = self.records
        by_place = np.lexsort((records.attempt, records.global_index))
        index = records.global_index[by_place]
        again = np.flatnonzero(index[1:] == index[:-1]) + 1
        if not len(again):
            return Overlaps(0)
        later, earlier = by_place[again], by_place[again - 1]
        columns: tuple[tuple[str, npt.NDArray[np.generic], str], ...] = (
            ("order", records.order_digest, "other images"),
            ("content", records.content_digest, "other captions, crops or time steps"),
            ("rate", records.learning_rate, "another learning rate"),
        )
        for kind, values, what in columns:
            other = later[values[later] != values[earlier]]
            self.report(kind, other, f"{what} than an earlier attempt had there")
        return self.check_losses(later, earlier, conditions, int(np.unique(index[again]).size))

    def check_losses(
        self, later: Int64Array, earlier: Int64Array, conditions: Mapping[int, Conditions], positions: int
    ) -> Overlaps:
        """The losses of pairs of records of one position: bit for bit where their attempts allow it."""
        records = self.records
        pairs, which = np.unique(
            np.stack([records.attempt[earlier], records.attempt[later]]), axis=1, return_inverse=True
        )
        both = [(conditions.get(one, UNKNOWN), conditions.get(other, UNKNOWN)) for one, other in pairs.T.tolist()]
        which = which.reshape(-1)
        comparable = np.array([one.accepted == other.accepted for one, other in both])[which]
        exact = np.array([one.is_deterministic and one == other for one, other in both])[which] & comparable
        loose = comparable & ~exact
        first, second = records.loss[earlier], records.loss[later]
        same = (first.view(np.int64) == second.view(np.int64)) | (np.isnan(first) & np.isnan(second))
        with np.errstate(invalid="ignore"):
            apart = np.abs(first - second) / np.maximum(np.maximum(np.abs(first), np.abs(second)), 1e-30)
        apart = np.where(same, 0.0, np.where(np.isfinite(apart), apart, np.inf))
        self.report("loss", later[exact & ~same], "another loss than an earlier attempt had there, bit for bit")
        far = later[loose & (apart > LOSS_TOLERANCE)]
        self.report("loss", far, f"a loss more than {LOSS_TOLERANCE:.0%} from that of an earlier attempt there")
        largest = float(apart[loose].max(initial=0.0))
        return Overlaps(positions, int(exact.sum()), int(loose.sum()), int((~comparable).sum()), largest)


def limits_of(kept_until: Mapping[int, float], attempt: Int64Array) -> Int64Array:
    """(records,) the last optimizer step of each record's attempt that still counts."""
    limits = [min(kept_until.get(number, np.inf), 2.0**62) for number in range(int(attempt.max(initial=0)) + 1)]
    return np.array(limits).astype(np.int64)[attempt]


def digest_blocks(order: EpochOrder, ids: Int64Array, batch_size: int) -> Iterator[UInt64Array]:
    """The order digests of an epoch, a block of positions at a time; `ids`: the post id of each entry."""
    places = np.arange(len(order), dtype=np.int64)
    for start in range(0, len(places), POSITIONS_A_BLOCK):
        table = order.image_table(places[start : start + POSITIONS_A_BLOCK], batch_size)
        yield order_digests(np.where(table == NO_IMAGE, NO_IMAGE, ids[table]))
