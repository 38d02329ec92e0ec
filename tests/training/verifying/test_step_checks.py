"""What each record of an optimizer step must be, on tables of a few steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from kohaku_wrap.steps import StepCount
from kohaku_wrap.training.records.ledger import (
    NON_FINITE,
    RECORD,
    SKIPPED,
    STEP,
    STEP_RECORD,
    LedgerFile,
    LedgerHeader,
    compute_checksums,
)
from kohaku_wrap.training.verifying.step_checks import StepChecker, Steps, find_misplaced

COUNT = StepCount(batches=5, group=2)
"""Three optimizer steps an epoch, of two positions each."""


def write_file(numbers: list[int], attempt: int = 1, rank: int = 0, groups: int = 1, **values: Any) -> LedgerFile:
    """A file with these optimizer steps after two micro-batches each, as they must be; rates 1, 2, 3, … of groups."""
    parts = max(-(-groups // 4), 1)
    records = np.zeros(2 * len(numbers), dtype=RECORD)
    records["optimizer_step"] = np.repeat(np.array(numbers, dtype=np.int64), 2)
    steps = np.zeros(parts * len(numbers), dtype=STEP_RECORD)
    steps["attempt"], steps["rank"], steps["flags"], steps["groups"] = attempt, rank, STEP, groups
    steps["optimizer_step"] = steps["updates"] = np.repeat(np.array(numbers, dtype=np.int64), parts)
    steps["epoch"] = (steps["optimizer_step"].astype(np.int64) - 1) // 3
    steps["first_group"] = np.tile(np.arange(parts) * 4, len(numbers))
    of_group = steps["first_group"][:, None] + np.arange(4)
    steps["rates"] = np.where(of_group < groups, of_group + 1.0, 0.0)
    for name, value in values.items():
        steps[name] = value
    steps["checksum"] = compute_checksums(steps)
    after = np.repeat(np.arange(len(numbers)) * 2 + 2, parts)
    return LedgerFile(LedgerHeader(attempt, rank, 1, 2, 1, 0), records, steps, after)


def check(*files: LedgerFile, kept: list[bool] | None = None) -> StepChecker:
    steps = Steps.of_files(list(files))
    return StepChecker(COUNT, steps, np.ones(len(steps), dtype=bool) if kept is None else np.array(kept))


def told(checker: StepChecker) -> list[tuple[str, int, int, int, int, int, int]]:
    """Kind, count, attempt, rank, optimizer step, epoch and position of each fault; then they are forgotten."""
    found = [dataclasses.astuple(fault)[:-1] for fault in checker.faults]
    checker.faults.clear()
    return found


def test_columns_of_two_ranks() -> None:
    checker = check(write_file([1, 2, 3, 4], groups=6), write_file([1, 2], rank=1, groups=6))
    steps = checker.steps
    assert len(steps) == 12 and steps.rates.shape == (12, 4)
    assert steps.rank.tolist() == [0] * 8 + [1] * 4 and set(steps.attempt.tolist()) == {1}
    assert steps.first_group.tolist() == [0, 4] * 6 and set(steps.groups.tolist()) == {6}
    assert steps.epoch.tolist() == [0] * 6 + [1] * 2 + [0] * 4
    checker.check_records(), checker.check_ranks()
    checker.check_coverage(np.array([[1, 0, 4], [1, 1, 2]]))
    line = checker.line()
    checker.check_updates(line)
    assert told(checker) == [] and len(line) == 4
    assert line.rates.tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 4


def test_a_fault_names_its_first_step() -> None:
    checker = check(write_file([4, 2]), write_file([5, 2], attempt=2, rank=1))
    checker.report_records("any", np.array([True, False, True, False]), "words")
    checker.report_records("any", np.ones(4, dtype=bool), "words")
    checker.report_records("any", np.zeros(4, dtype=bool), "words")
    assert checker.faults[0].what == "words"
    assert told(checker) == [("any", 2, 1, 0, 4, 1, 0), ("any", 4, 1, 0, 2, 0, 2)]
    checker.report("any", np.array([2]), np.array([3]), np.array([0]), "damaged")
    assert told(checker) == [("any", 1, 2, 3, 0, 0, 0)]
    checker.report("any", np.array([2, 1]), np.array([3, 4]), np.array([6, 6]), "of one step")
    assert told(checker) == [("any", 2, 1, 4, 6, 1, 4)]


def test_a_step_follows_its_own_micro_batches() -> None:
    file = write_file([1, 2, 3])
    for after, found in (
        ([2, 4, 6], [0, 0, 0]),
        ([0, 4, 6], [1, 0, 0]),
        ([2, 2, 5], [0, 1, 0]),
        ([4, 6, 6], [1, 1, 0]),
    ):
        assert find_misplaced(dataclasses.replace(file, steps_after=np.array(after))).tolist() == found
    empty = dataclasses.replace(file, records=file.records[:0], steps_after=np.zeros(3, dtype=np.int64))
    assert find_misplaced(empty).tolist() == [True] * 3
    # Nothing stands before the first record, although the last micro-batch of the file is of that step.
    assert find_misplaced(dataclasses.replace(write_file([3]), steps_after=np.array([0]))).tolist() == [True]


@pytest.mark.parametrize(
    ("name", "values", "step"),
    [("attempt", [1, 2, 1, 1], 2), ("rank", [0, 0, 3, 0], 3), ("epoch", [0, 0, 0, 0], 4), ("epoch", [0, 0, 1, 1], 3)],
)
def test_a_record_in_the_place_of_another(name: str, values: list[int], step: int) -> None:
    file = write_file([1, 2, 3, 4])
    file.steps[name] = values
    file.steps["checksum"] = compute_checksums(file.steps)
    checker = check(file)
    checker.check_records()
    assert told(checker) == [("misplaced", 1, 1, 0, step, (step - 1) // 3, (step - 1) % 3 * 2)]


def test_a_damaged_record_is_told_once() -> None:
    file = write_file([1, 2, 3])
    file.steps["epoch"][1] = 7
    checker = check(file)
    checker.check_records()
    assert told(checker) == [("damaged", 1, 1, 0, 2, 0, 2)]
    assert checker.line().optimizer_step.tolist() == [1, 3]


@pytest.mark.parametrize("groups", [0, 1, 4, 5, 8, 9])
def test_each_step_has_all_its_parts(groups: int) -> None:
    whole = write_file([1, 2, 3], groups=groups)
    parts = len(whole.steps) // 3
    assert parts == {0: 1, 1: 1, 4: 1, 5: 2, 8: 2, 9: 3}[groups]
    due = np.array([[1, 0, 1], [1, 0, 2], [1, 0, 3]])
    checker = check(whole)
    checker.check_coverage(due)
    assert told(checker) == []
    for keep in (np.delete(np.arange(3 * parts), parts), np.insert(np.arange(3 * parts), parts, parts)):
        checker = check(dataclasses.replace(whole, steps=whole.steps[keep], steps_after=whole.steps_after[keep]))
        checker.check_coverage(due)
        assert told(checker) == [("step", 1, 1, 0, 2, 0, 2)]
    checker = check(whole)
    checker.check_coverage(np.array([[1, 0, 1], [2, 1, 5], [1, 1, 4]]))
    assert told(checker) == [("step", 2, 1, 1, 4, 1, 0)]


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({}, []),
        ({"flags": STEP | SKIPPED}, [("skip", 3, 1, 1, 2, 0, 2)]),
        ({"attempt": 2}, []),
        ({"rates": np.full((3, 4), np.nan)}, [("rate", 3, 1, 1, 2, 0, 2)]),
        ({"rates": np.array([[1, 2, 3, 4]] * 2 + [[1, 2, 3, 5]])}, [("rate", 1, 1, 1, 4, 1, 0)]),
        ({"rates": np.array([[1, 2, 3, 4]] * 2 + [[1, 2, 2, 4]])}, [("rate", 1, 1, 1, 4, 1, 0)]),
    ],
)
def test_ranks_of_an_attempt_agree(change: dict[str, Any], faults: list[Any]) -> None:
    attempt = change.pop("attempt", 1)
    other = write_file([2, 3, 4], attempt=attempt, rank=1, groups=4, **change)
    checker = check(write_file([2, 3, 4, 5], groups=4), other)
    checker.check_ranks()
    assert told(checker) == faults


def test_each_rank_is_compared_with_the_one_before_it() -> None:
    flags = [STEP, STEP | SKIPPED]
    checker = check(*(write_file([1, 2], rank=rank, flags=flags if rank == 2 else STEP) for rank in range(4)))
    checker.check_ranks()
    assert told(checker) == [("skip", 2, 1, 2, 2, 0, 2)]


def test_rates_that_are_no_number_are_compared_by_their_bits() -> None:
    nan = np.full((2, 4), np.nan)
    checker = check(write_file([1, 2], rates=nan), write_file([1, 2], rank=1, rates=nan))
    checker.check_ranks()
    assert told(checker) == []


def test_the_line_has_what_rank_0_wrote_of_each_step_that_counts() -> None:
    flags = [STEP, STEP | SKIPPED, STEP | NON_FINITE, STEP | SKIPPED | NON_FINITE]
    first = write_file([1, 2, 3, 4], groups=2, flags=flags, updates=[1, 1, 2, 2])
    checker = check(
        write_file([3, 4, 9], attempt=2, groups=5), write_file([1, 3], rank=1), first,
        kept=[*[True] * 2, *[True] * 2, *[False] * 2, True, True, True, True, False, False],
    )  # fmt: skip
    line = checker.line()
    assert line.optimizer_step.tolist() == [1, 2, 3, 4] and line.attempt.tolist()[:2] == [1, 1]
    assert line.is_skipped.tolist()[:2] == [False, True] and line.is_non_finite.tolist()[:2] == [False, False]
    assert line.updates.tolist()[:2] == [1, 1] and line.rates.shape == (4, 5)
    assert line.rates[2:].tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0]] * 2
    assert line.rates[:2, :2].tolist() == [[1.0, 2.0]] * 2 and np.isnan(line.rates[:2, 2:]).all()
    alone = check(first).line()
    assert alone.is_skipped.tolist() == [False, True, False, True]
    assert alone.is_non_finite.tolist() == [False, False, True, True]
    assert len(check(write_file([1, 2], rank=1)).line()) == 0


@pytest.mark.parametrize(
    ("steps", "skipped", "updates", "faults"),
    [
        ([1, 2, 3], [], [1, 2, 3], []),
        ([1, 2, 3], [2], [1, 1, 2], []),
        ([1, 2, 3], [1], [0, 1, 2], []),
        ([1, 2, 3], [1], [1, 2, 3], [("skip", 1, 1, 0, 1, 0, 0)]),
        ([1, 2, 3], [], [0, 1, 2], [("skip", 1, 1, 0, 1, 0, 0)]),
        ([1, 2, 3], [], [2, 3, 4], [("skip", 1, 1, 0, 1, 0, 0)]),
        ([1, 2, 3], [], [1, 1, 2], [("skip", 1, 1, 0, 2, 0, 2)]),
        ([1, 2, 3], [], [1, 3, 4], [("skip", 1, 1, 0, 2, 0, 2)]),
        ([1, 2, 3], [3], [1, 2, 3], [("skip", 1, 1, 0, 3, 0, 4)]),
        ([1, 2, 3], [3], [1, 2, 1], [("skip", 1, 1, 0, 3, 0, 4)]),
        ([2, 3, 4], [], [9, 10, 11], []),
        ([1, 4, 5], [], [1, 9, 10], []),
    ],
)
def test_updates_follow_from_the_steps_that_were_skipped(
    steps: list[int], skipped: list[int], updates: list[int], faults: list[Any]
) -> None:
    flags = [STEP | SKIPPED * (each in skipped) for each in steps]
    checker = check(write_file(steps, flags=flags, updates=updates))
    checker.check_updates(checker.line())
    assert told(checker) == faults
    checker.check_updates(check(write_file([1], rank=1)).line())
    assert told(checker) == []


def test_rates_are_those_of_the_schedule_at_the_updates_before() -> None:
    flags, updates = [STEP, STEP | SKIPPED, STEP, STEP], [1, 1, 2, 3]
    rates = np.zeros((4, 4))
    rates[:, :2] = [[0.5, 5.0], [0.25, 2.5], [0.25, 2.5], [0.125, 0.0]]
    expected = np.array([[0.5, 5.0], [0.25, 2.5], [0.125, 0.0], [9.0, 9.0]])
    checker = check(write_file([1, 2, 3, 4], groups=2, flags=flags, updates=updates, rates=rates))
    line = checker.line()
    assert checker.check_rates(line, expected) == 4 and told(checker) == []
    assert checker.check_rates(line, expected * (1 + 5e-10)) == 4 and told(checker) == []
    other = expected.copy()
    other[1, 1] *= 1 + 2e-9
    assert checker.check_rates(line, other) == 2 and told(checker) == [("rate", 2, 1, 0, 2, 0, 2)]
    other[2, 1] = 1e-12
    assert checker.check_rates(line, other) == 1 and told(checker)[0][1] == 3
    assert checker.check_rates(line, expected[:1]) == 1 and told(checker)[0][1] == 3
    assert checker.check_rates(line, expected[:2]) == 3
    assert checker.faults[0].what == (
        "other rates than the schedule of the run's lock: 0.125, 0 in place of 0, 0 after 2 updates"
    )
    assert told(checker) == [("rate", 1, 1, 0, 4, 1, 0)]
    assert checker.check_rates(line, expected[:, :1]) == 0 and told(checker)[0][1] == 4
    early = check(write_file([1, 2], groups=1, updates=[0, 1], rates=np.zeros((2, 4))))
    assert early.check_rates(early.line(), np.zeros((3, 1))) == 1 and told(early) == [("rate", 1, 1, 0, 1, 0, 0)]
