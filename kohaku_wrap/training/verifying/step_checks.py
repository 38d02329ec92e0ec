"""What the ledger says of each optimizer step: its place, its rates, whether it was skipped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kohaku_wrap.steps import StepCount
from kohaku_wrap.training.records.ledger import NON_FINITE, SKIPPED, STEP_RATES, LedgerFile
from kohaku_wrap.training.verifying.ledger_checks import BoolArray, Columns, Fault, Int64Array, read_columns

RATE_TOLERANCE = 1e-9
"""Relative; libraries of two machines may round a cosine differently in its last bits."""

Rates = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Steps(Columns):
    """All records of optimizer steps of a run."""

    updates: Int64Array
    """(records,) of the weights, after the step."""

    groups: Int64Array
    """(records,) of the optimizer."""

    first_group: Int64Array
    """(records,) of the rates in this record."""

    rates: Rates
    """(records, STEP_RATES)"""

    @classmethod
    def of_files(cls, files: list[LedgerFile]) -> Steps:
        """The columns of all files."""
        table, columns = read_columns(files, [file.steps for file in files])
        columns["misplaced"] |= np.concatenate([find_misplaced(file) for file in files])
        columns |= {name: table[name].astype(np.int64) for name in ("updates", "groups", "first_group")}
        return cls(rates=table["rates"], **columns)


def find_misplaced(file: LedgerFile) -> BoolArray:
    """(steps,) whether the micro-batch before each record of a step is of another step, or none is there."""
    before = file.records["optimizer_step"].astype(np.int64)
    if not len(before):
        return np.ones(len(file.steps), dtype=bool)
    last: Int64Array = before[np.maximum(file.steps_after - 1, 0)]
    found: BoolArray = (file.steps_after == 0) | (last != file.steps["optimizer_step"])
    return found


@dataclass(frozen=True)
class LineOfSteps:
    """The optimizer steps on a run's line of which the ledger holds a record, in order, as rank 0 wrote them."""

    optimizer_step: Int64Array
    """(steps,) ascending, counted from 1."""

    attempt: Int64Array
    """(steps,)"""

    is_skipped: BoolArray
    """(steps,)"""

    is_non_finite: BoolArray
    """(steps,)"""

    updates: Int64Array
    """(steps,) of the weights, after the step."""

    rates: Rates
    """(steps, groups) those that the step was made with; NaN for groups that a step does not have."""

    def __len__(self) -> int:
        return len(self.optimizer_step)


class StepChecker:
    """Collects the faults of a run's optimizer steps."""

    def __init__(self, count: StepCount, steps: Steps, kept: BoolArray) -> None:
        self.count = count
        self.steps = steps
        self.kept = kept
        self.faults: list[Fault] = []

    def report(self, kind: str, attempt: Int64Array, rank: Int64Array, steps: Int64Array, what: str) -> None:
        """Add a fault for these steps, if any; the first is the earliest."""
        if not len(steps):
            return
        first = int(np.lexsort((attempt, steps))[0])
        step = int(steps[first])
        epoch, within = divmod(max(step, 1) - 1, self.count.optimizer_steps_per_epoch)
        place = within * self.count.group
        fault = Fault(kind, len(steps), int(attempt[first]), int(rank[first]), step, epoch, place, what)
        self.faults.append(fault)

    def report_records(self, kind: str, bad: BoolArray | Int64Array, what: str) -> None:
        """Add a fault for the records that `bad` marks or lists, if any."""
        steps = self.steps
        self.report(kind, steps.attempt[bad], steps.rank[bad], steps.optimizer_step[bad], what)

    def check_records(self) -> None:
        """Each record is as it was written, and stands where it belongs."""
        steps = self.steps
        self.report_records("damaged", steps.damaged, "differs from its checksum: the file has changed since training")
        epochs = (steps.optimizer_step - 1) // self.count.optimizer_steps_per_epoch
        wrong = steps.misplaced | (steps.epoch != epochs)
        self.report_records("misplaced", wrong & ~steps.damaged, "an optimizer step recorded in the place of another")

    def check_coverage(self, due: Int64Array) -> None:
        """Each of `due`, (n, 3) attempt, rank and optimizer step, has all records that its groups need."""
        steps = self.steps
        have = np.stack([steps.attempt, steps.rank, steps.optimizer_step], axis=1)
        needed = np.maximum(-(-steps.groups // STEP_RATES), 1)
        found, first, times = np.unique(have, axis=0, return_index=True, return_counts=True)
        many = found[times != needed[first]]
        self.report("step", many[:, 0], many[:, 1], many[:, 2], "recorded in more or fewer parts than its groups need")
        rows = {tuple(row) for row in found.tolist()}
        missing = np.array([row for row in due.tolist() if tuple(row) not in rows], dtype=np.int64).reshape(-1, 3)
        what = "the optimizer step was not recorded after its micro-batches"
        self.report("step", missing[:, 0], missing[:, 1], missing[:, 2], what)

    def check_ranks(self) -> None:
        """All ranks of an attempt made each step with the same rates, and skipped the same."""
        steps = self.steps
        place = np.lexsort((steps.rank, steps.first_group, steps.optimizer_step, steps.attempt))
        key = np.stack([steps.attempt, steps.optimizer_step, steps.first_group], axis=1)[place]
        again = np.flatnonzero((key[1:] == key[:-1]).all(axis=1)) + 1
        later, earlier = place[again], place[again - 1]
        same_rates = (steps.rates[later].view(np.int64) == steps.rates[earlier].view(np.int64)).all(axis=1)
        for same, kind, what in (
            (same_rates, "rate", "another rate than an earlier rank had in the same step"),
            (steps.flags[later] == steps.flags[earlier], "skip", "one rank skipped the step and another did not"),
        ):
            self.report_records(kind, later[~same], what)

    def line(self) -> LineOfSteps:
        """The steps that count, one row each."""
        steps = self.steps
        chosen = np.flatnonzero(self.kept & (steps.rank == 0) & ~steps.damaged)
        chosen = chosen[np.lexsort((steps.first_group[chosen], steps.optimizer_step[chosen]))]
        numbers, row = np.unique(steps.optimizer_step[chosen], return_inverse=True)
        groups = int(steps.groups[chosen].max(initial=0))
        rates = np.full((len(numbers), groups + STEP_RATES), np.nan)
        for slot in range(STEP_RATES):
            group = steps.first_group[chosen] + slot
            fits = group < np.minimum(steps.groups[chosen], groups)
            rates[row[fits], group[fits]] = steps.rates[chosen[fits], slot]
        one = np.zeros(len(numbers), dtype=np.int64)
        one[row] = chosen
        return LineOfSteps(
            optimizer_step=numbers,
            attempt=steps.attempt[one],
            is_skipped=(steps.flags[one] & SKIPPED) > 0,
            is_non_finite=(steps.flags[one] & NON_FINITE) > 0,
            updates=steps.updates[one],
            rates=rates[:, :groups],
        )

    def report_line(self, kind: str, line: LineOfSteps, bad: BoolArray, what: str) -> None:
        """Add a fault for steps of the line."""
        ranks = np.zeros(int(bad.sum()), dtype=np.int64)
        self.report(kind, line.attempt[bad], ranks, line.optimizer_step[bad], what)

    def check_updates(self, line: LineOfSteps) -> None:
        """Each step that was not skipped is one update more than the step before it."""
        if not len(line):
            return
        follows = np.diff(line.optimizer_step) == 1
        bad = np.zeros(len(line), dtype=bool)
        bad[1:] = follows & (np.diff(line.updates) != ~line.is_skipped[1:])
        bad[0] = line.optimizer_step[0] == 1 and line.updates[0] != int(not line.is_skipped[0])
        self.report_line("skip", line, bad, "the updates counted do not follow from the steps that were skipped")

    def check_rates(self, line: LineOfSteps, expected: Rates) -> int:
        """The rates of each step are those of the schedule, at the updates done before it; how many steps agree.

        `expected`: (updates, groups), from the lock.
        """
        before = line.updates - ~line.is_skipped
        known = (before >= 0) & (before < len(expected))
        if expected.shape[1] != line.rates.shape[1]:
            known[:] = False
        wanted = np.zeros_like(line.rates)
        wanted[known] = expected[before[known]]
        bad = ~np.isclose(line.rates, wanted, rtol=RATE_TOLERANCE, atol=0.0).all(axis=1) | ~known
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            shown = [", ".join(f"{rate:.6g}" for rate in each[at]) for each in (line.rates, wanted)]
            where = f"{shown[0]} in place of {shown[1]} after {before[at]:,} updates"
            self.report_line("rate", line, bad, f"other rates than the schedule of the run's lock: {where}")
        return int((~bad).sum())
