"""What each column of a ledger must be, on tables of a few records."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from kohaku_wrap.steps import StepCount
from kohaku_wrap.training.data.order import BatchOrder, order_digests
from kohaku_wrap.training.records.ledger import (
    FILL,
    RECORD,
    STEP_RECORD,
    SUBSTITUTE,
    LedgerFile,
    LedgerHeader,
    compute_checksums,
)
from kohaku_wrap.training.verifying import ledger_checks
from kohaku_wrap.training.verifying.ledger_checks import UNKNOWN, Checker, Conditions, Overlaps, Records, limits_of

COUNT = StepCount(batches=5, group=2)
"""Three optimizer steps of two positions; the last position of an epoch is a fill."""

SAME = Conditions(True, 1, 7, 1, frozenset())


def write_file(places: list[int], attempt: int = 1, rank: int = 0, processes: int = 1, **values: Any) -> LedgerFile:
    """A file with the records of these places of the run, epochs one after the other, all as they must be."""
    table = np.zeros(len(places), dtype=RECORD)
    table["attempt"], table["rank"] = attempt, rank
    table["epoch"], table["position"] = np.divmod(places, 6)
    table["optimizer_step"] = np.array(places, dtype=np.int64) // 2 + 1
    table["flags"] = np.where(table["position"] >= 5, FILL, 0)
    table["content_digest"], table["loss"], table["learning_rate"] = 5, 1.0, 1e-4
    for name, value in values.items():
        table[name] = value
    table["checksum"] = compute_checksums(table)
    header = LedgerHeader(attempt, rank, processes, 2 // processes, 1, 0)
    return LedgerFile(header, table, np.zeros(0, dtype=STEP_RECORD), np.zeros(0, dtype=np.int64))


def check(*files: LedgerFile) -> Checker:
    return Checker(COUNT, Records.of_files(files, COUNT))


def told(checker: Checker) -> list[tuple[str, int, int, int, int, int, int]]:
    """Kind, count, attempt, rank, optimizer step, epoch and position of each fault; then they are forgotten."""
    found = [dataclasses.astuple(fault)[:-1] for fault in checker.faults]
    checker.faults.clear()
    return found


def test_columns_of_two_ranks() -> None:
    empty = write_file([], rank=2, processes=4)
    checker = check(write_file([0, 2, 4, 6], processes=2), empty, write_file([1, 3, 5, 7], rank=1, processes=2))
    records = checker.records
    assert len(records) == 8 and records.file_starts == [0, 4]
    assert records.rank.tolist() == [0] * 4 + [1] * 4 and set(records.processes.tolist()) == {2}
    assert records.global_index.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert records.flags.tolist() == [0, 0, 0, 0, 0, 0, FILL, 0]
    checker.check_bits(), checker.check_places(), checker.check_file_order()
    assert checker.check_coverage(np.ones(8, dtype=bool), 6, 0) == (4, 0)
    assert checker.check_overlaps({1: SAME}) == Overlaps(0, 0, 0, 0, 0.0) and told(checker) == []


def test_positions_of_any_bits_add_up() -> None:
    records = check(write_file([0, 1], position=[1 << 62, (1 << 64) - 1])).records
    assert records.position.tolist() == [1 << 62, 1 << 62] == records.global_index.tolist()
    assert check(write_file([0], position=[(1 << 62) - 1])).records.position.tolist() == [(1 << 62) - 1]


def test_a_fault_names_its_first_place_in_training_order() -> None:
    checker = check(write_file([8, 9, 2], attempt=1), write_file([7, 2], attempt=2), write_file([2], attempt=3))
    checker.report("any", np.array([0, 3]), "words")
    checker.report("any", np.array([0, 2, 4, 5]), "words")
    checker.report("none", np.array([], dtype=np.int64), "words")
    assert told(checker) == [("any", 2, 2, 0, 4, 1, 1), ("any", 4, 1, 0, 2, 0, 2)]
    checker.report_position("missing", np.array([9, 11]), "words")
    checker.report_position("missing", np.array([], dtype=np.int64), "words")
    assert checker.faults[0].what == "words" and told(checker) == [("missing", 2, 0, 0, 5, 1, 3)]


def test_a_record_that_differs_from_its_checksum() -> None:
    file = write_file([0, 1, 2])
    file.records["loss"][1] = 3.0
    checker = check(file)
    checker.check_bits()
    assert told(checker) == [("damaged", 1, 1, 0, 1, 0, 1)]


@pytest.mark.parametrize(
    ("values", "processes", "rank"),
    [
        ({"optimizer_step": 6}, 1, 0),
        ({"optimizer_step": 2}, 1, 0),
        ({"position": 6, "optimizer_step": 7}, 1, 0),  # the step that position would have, in an epoch of 6
        ({"position": 7, "optimizer_step": 7}, 1, 0),
        ({"epoch": 2}, 1, 0),
        ({"attempt": 2}, 1, 0),
        ({"attempt": 0}, 1, 0),
        ({"rank": 1}, 1, 0),
        ({}, 2, 0),
        ({}, 4, 1),
    ],
)
def test_a_record_in_the_place_of_another(values: dict[str, int], processes: int, rank: int) -> None:
    """Of place 9: the third step's second position in the second epoch."""
    right = check(write_file([9], processes=2, rank=1, optimizer_step=5), write_file([9]))
    right.check_places()
    assert told(right) == []
    file = write_file([9], processes=processes, rank=rank)
    for name, value in values.items():
        file.records[name] = value
    checker = check(file)
    checker.check_places()
    assert [fault[:2] for fault in told(checker) if fault[0] != "mark"] == [("misplaced", 1)]


def test_marks_of_fills() -> None:
    checker = check(write_file([4, 5, 10, 11], flags=[FILL, 0, SUBSTITUTE, FILL | SUBSTITUTE]))
    checker.check_places()
    assert told(checker) == [("mark", 2, 1, 0, 3, 0, 4)]


def test_each_rank_goes_from_position_to_position() -> None:
    for places, files in (([3], 1), ([3, 4], 1), ([3], 2)):
        checker = check(*[write_file(places)] * files)
        checker.check_file_order()
        assert told(checker) == []
    for places in ([3, 5], [3, 3], [4, 3]):
        checker = check(write_file(places))
        checker.check_file_order()
        assert told(checker) == [("out-of-order", 1, 1, 0, places[1] // 2 + 1, 0, places[1])]
    checker = check(write_file([0, 1]), write_file([2, 4, 5, 8], processes=2))
    checker.check_file_order()
    assert told(checker) == [("out-of-order", 2, 1, 0, 3, 0, 5)]


@pytest.mark.parametrize(
    ("places", "total", "due", "foreign", "result", "faults"),
    [
        ([], 6, 0, 0, (0, 0), []),
        ([], 6, 2, 0, (2, 0), [("missing", 4, 0, 0, 1, 0, 0)]),
        ([], 0, 0, 0, (0, 0), []),
        ([0], 6, 0, 0, (0, 1), []),
        ([0, 1], 6, 0, 0, (1, 0), []),
        ([0, 1, 2], 6, 0, 0, (1, 1), []),
        ([0, 1, 2], 6, 1, 0, (1, 1), []),
        ([0, 1, 2], 6, 2, 0, (2, 0), [("missing", 1, 0, 0, 2, 0, 3)]),
        ([0, 1, 2], 2, 9, 0, (2, 0), [("missing", 1, 0, 0, 2, 0, 3)]),
        ([0, 1, 2, 3], 6, 1, 0, (2, 0), []),
        ([1, 2, 3, 8, 9], 6, 0, 0, (5, 0), [("missing", 5, 0, 0, 1, 0, 0)]),
        ([4, 5, 6, 7], 6, 3, 2, (4, 0), []),
        ([5, 6, 7], 6, 3, 2, (4, 0), [("missing", 1, 0, 0, 3, 0, 4)]),
        ([6, 7], 6, 3, 2, (4, 0), [("missing", 2, 0, 0, 3, 0, 4)]),
        ([6, 7], 6, 3, 1, (4, 0), [("missing", 4, 0, 0, 2, 0, 2)]),
        ([0, 1, 1], 6, 0, 0, (1, 0), [("duplicate", 2, 1, 0, 1, 0, 1)]),
        ([0, 0, 0, 1, 2, 2], 6, 0, 0, (1, 2), [("duplicate", 5, 1, 0, 1, 0, 0)]),
        ([0, 1, 2, 3, 4], 2, 0, 0, (2, 0), []),
        ([0, 1, 2, 3, 9], 2, 0, 0, (2, 0), []),
        (list(range(12)), 6, 6, 0, (6, 0), []),
        (list(range(11)), 6, 6, 0, (6, 0), [("missing", 1, 0, 0, 6, 1, 5)]),
    ],
)
def test_coverage(
    places: list[int], total: int, due: int, foreign: int, result: tuple[int, int], faults: list[Any]
) -> None:
    """Places that were left behind and trained again by a later attempt do not count."""
    checker = check(write_file([0, 1, 2, 3], attempt=9), write_file(places) if places else write_file([7], attempt=8))
    kept = checker.records.attempt == 1
    assert checker.check_coverage(kept, total, due, foreign) == result
    assert told(checker) == faults


def make_order(seed: int = 3) -> BatchOrder:
    return BatchOrder(np.array([0] * 6 + [1] * 4, dtype=np.int64), 2, seed, 2)


def test_the_order_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    order, ids = make_order(), np.arange(10, dtype=np.int64) * 3 + 100
    whole = [np.concatenate(list(ledger_checks.digest_blocks(order.epoch(each), ids, 2))) for each in (0, 1)]
    tables = order.epoch(0).image_table(np.arange(6), 2)
    assert whole[0].tolist() == order_digests(np.where(tables < 0, tables, ids[tables])).tolist()
    monkeypatch.setattr(ledger_checks, "POSITIONS_A_BLOCK", 4)
    blocks = list(ledger_checks.digest_blocks(order.epoch(1), ids, 2))
    assert [len(block) for block in blocks] == [4, 2] and np.concatenate(blocks).tolist() == whole[1].tolist()
    digests = np.concatenate(whole)
    checker = check(write_file(list(range(12)), order_digest=digests))
    checker.check_order(order, ids)
    assert told(checker) == []
    checker.check_order(make_order(4), ids)
    assert [fault[0] for fault in told(checker)] == ["order"]
    digests[[8, 10]] += np.uint64(1)
    checker = check(write_file(list(range(12)), order_digest=digests))
    checker.check_order(order, ids)
    assert told(checker) == [("order", 2, 1, 0, 5, 1, 2)]
    checker = check(write_file([0, 7], position=[6, 1 << 62], order_digest=0))
    checker.check_order(order, ids)
    assert told(checker) == [], "a position that is none has no images"


def test_content_that_was_recomputed() -> None:
    high = (1 << 64) - 2
    checker = check(write_file([0, 1, 2, 3], content_digest=[5, high, 7, 8]))
    checker.check_content(np.array([1, 3]), [high, 8])
    checker.check_content(np.array([], dtype=np.int64), [])
    assert told(checker) == []
    checker.check_content(np.array([1, 3, 2]), [high + 1, 8, 6])
    assert told(checker) == [("deep", 2, 1, 0, 1, 0, 1)]


@pytest.mark.parametrize("name", ["order_digest", "content_digest", "learning_rate"])
@pytest.mark.parametrize("value", [1.0, 9.0])
def test_attempts_agree_where_they_meet(name: str, value: float) -> None:
    first: dict[str, Any] = {name: [3, 3, 3]}
    second: dict[str, Any] = {name: [3, value]}
    checker = check(write_file([0, 1, 2], **first), write_file([1, 2], attempt=2, **second))
    assert checker.check_overlaps({1: SAME, 2: SAME}) == Overlaps(2, 2)
    assert told(checker) == [
        ({"order_digest": "order", "content_digest": "content"}.get(name, "rate"), 1, 2, 0, 2, 0, 2)
    ]
    third: dict[str, Any] = {name: 8}
    checker = check(write_file([0, 1], **second), write_file([2], attempt=2, **third))
    assert checker.check_overlaps({}) == Overlaps(0) and told(checker) == []


def test_each_attempt_is_compared_with_the_one_before_it() -> None:
    """The records of a place by attempt, whatever the order of files."""
    files = [write_file([1], attempt=each, loss=loss) for each, loss in ((3, 2.0), (1, 1.0), (2, 1.0))]
    checker = check(*files)
    assert checker.check_overlaps(dict.fromkeys((1, 2, 3), SAME)) == Overlaps(1, 2)
    assert told(checker) == [("loss", 1, 3, 0, 1, 0, 1)]


@pytest.mark.parametrize(
    ("losses", "is_bit_exact", "is_near", "apart"),
    [
        ((1.0, 1.0), True, True, 0.0),
        ((1.0, float(np.nextafter(1.0, 2.0))), False, True, 0.0),
        ((0.0, -0.0), False, True, 0.0),
        ((1.0, 0.9), False, True, 0.1),
        ((1.0, 0.8999), False, False, 0.1001),
        ((0.8999, 1.0), False, False, 0.1001),
        ((-1.0, 1.0), False, False, 2.0),
        ((4.0, 3.0), False, False, 0.25),
        ((0.01, 0.02), False, False, 0.5),
        ((float("nan"), -float("nan")), True, True, 0.0),
        ((float("nan"), 1.0), False, False, float("inf")),
        ((1.0, float("nan")), False, False, float("inf")),
        ((float("inf"), float("inf")), True, True, 0.0),
        ((float("inf"), -float("inf")), False, False, float("inf")),
        ((1e-31, 2e-31), False, False, 0.1),
    ],
)  # fmt: skip
def test_losses_of_a_position(losses: tuple[float, float], is_bit_exact: bool, is_near: bool, apart: float) -> None:
    def compare(other: Conditions | None, first: Conditions | None = SAME) -> tuple[Overlaps, int]:
        checker = check(write_file([0, 1], loss=losses[0]), write_file([1], attempt=2, loss=losses[1]))
        given = {number: each for number, each in ((1, first), (2, other)) if each is not None}
        overlaps = checker.check_overlaps(given)
        found = told(checker)
        assert found in ([], [("loss", 1, 2, 0, 1, 0, 1)])
        return overlaps, len(found)

    overlaps, bad = compare(SAME)
    assert overlaps == Overlaps(1, exact=1) and bad == int(not is_bit_exact)
    for other, first in (
        (dataclasses.replace(SAME, is_deterministic=False), SAME),
        (dataclasses.replace(SAME, processes=2), SAME),
        (dataclasses.replace(SAME, device_digest=8), SAME),
        (dataclasses.replace(SAME, threads=None), SAME),
        (None, SAME),
        (UNKNOWN, UNKNOWN),
        (None, None),
    ):
        overlaps, bad = compare(other, first)
        assert (overlaps.positions, overlaps.exact, overlaps.loose, overlaps.left_out) == (1, 0, 1, 0)
        assert overlaps.largest == pytest.approx(apart, abs=1e-9) or losses[0] == 1e-31
        assert bad == int(not is_near) or losses[0] == 1e-31
    overlaps, bad = compare(dataclasses.replace(SAME, accepted=frozenset({"seed"})))
    assert overlaps == Overlaps(1, left_out=1) and bad == 0
    both = dataclasses.replace(SAME, accepted=frozenset({"seed"}))
    assert compare(both, both)[0] == Overlaps(1, exact=1)


def test_the_last_step_that_counts_is_that_of_each_records_attempt() -> None:
    attempts = np.array([1, 3, 2, 3])
    assert limits_of({1: 4, 3: 9.0, 4: 1}, attempts).tolist() == [4, 9, 2**62, 9]
    assert limits_of({1: np.inf}, attempts[:1]).tolist() == [2**62]
    assert limits_of({}, attempts[:0]).tolist() == []
