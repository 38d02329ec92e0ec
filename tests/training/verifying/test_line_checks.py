"""Options, skipped steps and rates on a run's line, from files made of a few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kohaku_wrap.training.records.bad_steps import BadSteps
from kohaku_wrap.training.records.chapters import Chapter
from kohaku_wrap.training.records.folder import Run
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
from kohaku_wrap.training.records.origin import Origin
from kohaku_wrap.training.starting import expected_rates
from kohaku_wrap.training.verifying.line_checks import LineReport, check_steps, list_due, name_attempts

NewRun = Callable[..., Run]
IDS = {"run_id": "b" * 32, "options_digest": "e" * 64}


def write_file(
    first: int,
    last: int,
    attempt: int = 1,
    rank: int = 0,
    left_out: tuple[int, ...] = (),
    skipped: tuple[int, ...] = (),
    non_finite: tuple[int, ...] = (),
    **header: Any,
) -> LedgerFile:
    """The optimizer steps from `first` to `last` of four micro-batches each; a record of each but those left out."""
    numbers = np.arange(first, last + 1)
    records = np.zeros(4 * len(numbers), dtype=RECORD)
    records["optimizer_step"] = np.repeat(numbers, 4)
    start = LedgerHeader(attempt, rank, 1, 4, 2, 31337, **(IDS | header))
    kept = numbers[~np.isin(numbers, left_out)] if start.version > 2 else numbers[:0]
    steps = np.zeros(len(kept), dtype=STEP_RECORD)
    steps["attempt"], steps["rank"], steps["groups"], steps["optimizer_step"] = attempt, rank, 1, kept
    steps["epoch"] = (kept - 1) // 6
    steps["flags"] = STEP | SKIPPED * np.isin(kept, skipped) | NON_FINITE * np.isin(kept, non_finite)
    updates = np.cumsum(~np.isin(np.arange(1, last + 1), skipped))
    steps["updates"] = updates[kept - 1]
    steps["checksum"] = compute_checksums(steps)
    return LedgerFile(start, records, steps, (kept - first + 1) * 4)


@pytest.fixture
def run(new_run: NewRun) -> Run:
    """Of 12 optimizer steps, with an id and a digest of its options; its rates cannot be followed."""
    return new_run(run={"id": IDS["run_id"], "options_digest": IDS["options_digest"]}, format=2)


def check(
    run: Run, *files: LedgerFile, kept: Mapping[int, float] | None = None, steps: int = 12, due: int = 12,
    foreign: int = 0,
) -> LineReport:  # fmt: skip
    return check_steps(run, files, {1: float("inf")} if kept is None else kept, steps, due, foreign)


def told(report: LineReport) -> list[tuple[str, int, int, int, int]]:
    return [(each.kind, each.count, each.attempt, each.rank, each.optimizer_step) for each in report.faults]


def checks(report: LineReport) -> dict[str, tuple[bool, str]]:
    return {each.name: (each.is_looked_at, each.detail) for each in report.checks}


def test_all_steps_of_a_finished_run(run: Run) -> None:
    report = check(run, write_file(1, 12))
    assert told(report) == [] and report.bad_steps == BadSteps()
    said = checks(report)
    assert said["options"] == (True, "every attempt has the digest of the lock")
    assert said["skipped steps"] == (True, "0 of 12 optimizer steps skipped, 0 with a loss that is no number")
    assert not said["rates"][0] and list(said) == ["options", "skipped steps", "rates"]


@pytest.mark.parametrize(
    ("left_out", "steps", "due", "faults"),
    [
        ((12,), 12, 12, [("step", 1, 1, 0, 12)]),
        ((12,), 12, 11, []),  # a crash between the last micro-batch and its step
        ((11,), 12, 11, [("step", 1, 1, 0, 11)]),
        ((11,), 12, 0, [("step", 1, 1, 0, 11)]),
        ((11, 12), 12, 12, [("step", 2, 1, 0, 11)]),
        ((9,), 8, 8, []),
        ((8,), 8, 7, []),
        ((8,), 8, 8, [("step", 1, 1, 0, 8)]),
    ],
)
def test_only_the_last_step_may_miss_its_record(
    run: Run, left_out: tuple[int, ...], steps: int, due: int, faults: list[Any]
) -> None:
    assert told(check(run, write_file(1, 12, left_out=left_out), steps=steps, due=due)) == faults


def test_due_are_the_whole_steps_on_the_line() -> None:
    old = write_file(1, 2, attempt=1, version=2)
    second, third = write_file(3, 6, attempt=2), write_file(5, 8, attempt=3, rank=1)
    assert list_due([old, second, third], {2: 4, 3: 8}, 8, 8).tolist() == [
        [2, 0, 3], [2, 0, 4], [3, 1, 5], [3, 1, 6], [3, 1, 7], [3, 1, 8],
    ]  # fmt: skip
    assert list_due([second, third], {}, 6, 5).tolist() == [[2, 0, 3], [2, 0, 4], [2, 0, 5], [2, 0, 6], [3, 1, 5]]
    torn = LedgerFile(third.header, third.records[:-1], third.steps, third.steps_after)
    assert list_due([torn], {3: 8}, 8, 8)[:, 2].tolist() == [5, 6, 7]
    twice = LedgerFile(third.header, np.repeat(third.records, 2), third.steps, third.steps_after)
    assert list_due([twice], {3: 8}, 8, 8)[:, 2].tolist() == [5, 6, 7, 8]
    assert list_due([old], {}, 2, 2).shape == (0, 3)


def test_what_an_earlier_attempt_did_beyond_its_limit_does_not_count(run: Run) -> None:
    first, second = write_file(1, 8, skipped=(6, 7)), write_file(6, 12, attempt=2)
    report = check(run, first, second, kept={1: 5, 2: float("inf")})
    assert told(report) == [] and report.bad_steps.skipped == 0
    report = check(run, first, write_file(9, 12, attempt=2, skipped=(6, 7)), kept={1: 8, 2: float("inf")})
    assert told(report) == [] and report.bad_steps.skipped == 2


@pytest.mark.parametrize(
    ("first", "second", "fault", "what"),
    [
        ({}, {"run_id": "a" * 32}, ("options", 1, 2, 0, 7), "trained for another run than this one"),
        ({}, {"options_digest": "f" * 64}, ("options", 1, 2, 0, 7), "trained with other options than the lock has"),
        ({"options_digest": "f" * 64}, {"run_id": "a" * 32}, ("options", 2, 1, 0, 1), "trained for another run"),
        ({"options_digest": "f" * 64}, {"options_digest": "d" * 64}, ("options", 2, 1, 0, 1), "trained with other"),
    ],
)
def test_an_attempt_unlike_the_lock(
    run: Run, first: dict[str, Any], second: dict[str, Any], fault: tuple[Any, ...], what: str
) -> None:
    files = write_file(1, 6, **first), write_file(7, 12, attempt=2, **second)
    report = check(run, *files, kept={1: 6, 2: float("inf")})
    assert told(report) == [fault] and report.faults[0].what.startswith(what)
    assert checks(report)["options"] == (True, "unlike the lock")


def test_an_empty_file_unlike_the_lock_has_its_first_step(run: Run) -> None:
    report = check(run, write_file(1, 12), write_file(1, 0, attempt=2, run_id="a" * 32), kept={1: 12, 2: 12})
    assert told(report) == [("options", 1, 2, 0, 1)]


def test_files_of_kwrap_0_1_say_nothing_of_options_and_steps(run: Run, new_run: NewRun) -> None:
    files = write_file(1, 4, version=2), write_file(5, 12, attempt=2, skipped=(7,))
    limits = {1: 4.0, 2: float("inf")}
    report = check(run, *files, kept=limits)
    assert told(report) == []
    said = checks(report)
    assert said["options"] == (False, "kwrap 0.1 did not record a digest of the options: attempt 1")
    assert said["skipped steps"][0] is False and said["skipped steps"][1].endswith("for 4 steps: by the metrics")
    assert report.bad_steps == BadSteps(skipped=1)
    run.metrics.write_text(
        '{"optimizer_step": 2, "loss": "nan", "attempt": 1}\n'
        '{"optimizer_step": 3, "loss": 0.1, "optimizer_step_skipped": 1, "attempt": 1}\n'
        '{"optimizer_step": 7, "loss": "nan", "attempt": 2}\n'
        '{"optimizer_step": 13, "loss": "nan", "attempt": 2}\n'
    )
    report = check(run, *files, kept=limits)
    assert (report.bad_steps.skipped, report.bad_steps.non_finite) == (2, 1), "the ledger goes before the metrics"
    before = checks(check(new_run("old"), write_file(1, 12, run_id="", options_digest="")))["options"]
    assert before == (False, "kwrap 0.1 did not record a digest of the options: the run was made by it")


def test_lost_records_are_not_laid_to_kwrap_0_1(run: Run) -> None:
    """An attempt of today whose file is gone."""
    ok, detail = checks(check(run, write_file(1, 9)))["skipped steps"]
    assert not ok and detail.endswith("; there is no record any more of them in the ledger for 3 steps: by the metrics")


def test_nothing_is_lost_before_the_first_step(run: Run) -> None:
    assert checks(check(run, write_file(1, 0), steps=0, due=0))["rates"] == (True, "no optimizer step is done yet")


def test_steps_of_plain_sd_scripts_are_not_missed(run: Run) -> None:
    said = checks(check(run, write_file(4, 12), foreign=3))
    assert said["skipped steps"] == (True, "0 of 12 optimizer steps skipped, 0 with a loss that is no number")
    assert said["rates"] == (False, "the updates before the state of plain sd-scripts are not known")
    for first, left in ((5, 1), (7, 3)):
        said = checks(check(run, write_file(first, 12), foreign=3))
        assert f"for {left} step" in said["skipped steps"][1] and not said["skipped steps"][0]


def test_a_branch_counts_its_own_steps(new_run: NewRun) -> None:
    origin = Origin("parent", "0f" * 16, "digest", 3, 1, "state", "digest", "AdamW", 3)
    own = {"id": IDS["run_id"], "options_digest": IDS["options_digest"]}
    branch = new_run(run=own, format=2, parent=origin.document())
    said = checks(check(branch, write_file(4, 12, skipped=(5,)), foreign=3))
    assert said["skipped steps"] == (True, "1 of 9 optimizer steps skipped, 0 with a loss that is no number")


@pytest.mark.parametrize(
    ("skipped", "steps", "is_fault"),
    [((1, 2, 3, 4, 5, 6), 12, False), ((1, 2, 3, 4, 5, 6, 7), 12, True), ((1, 2, 3, 4, 5, 6, 7), 11, False)],
)
def test_more_than_half_skipped_at_the_end_is_a_fault(
    run: Run, skipped: tuple[int, ...], steps: int, is_fault: bool
) -> None:
    report = check(run, write_file(1, steps, skipped=skipped, non_finite=(1, 9)), steps=steps, due=steps)
    assert told(report) == ([("skipped", 7, 1, 0, 1)] if is_fault else [])
    assert checks(report)["skipped steps"] == (
        True, f"{len(skipped)} of {steps} optimizer steps skipped, 2 with a loss that is no number"
    )  # fmt: skip
    assert report.bad_steps.non_finite == 2 and report.bad_steps.in_a_row == 0


def test_rates_are_held_against_the_locks_schedule(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, list[str]]] = []

    def ask(_worker: str, _folder: Path, request: dict[str, Any], **_how: object) -> list[list[float]]:
        asked.append((request["groups"], request["names"]))
        return [[0.0] * request["groups"]] * 400

    monkeypatch.setattr(expected_rates, "ask_python", ask)
    monkeypatch.setattr(expected_rates, "why_not", lambda lock: "")
    assert checks(check(run, write_file(1, 12)))["rates"] == (
        True, "12 optimizer steps of 1 groups as the lock's schedule has them"
    )  # fmt: skip
    run.metrics.write_text(
        '{"optimizer_step": 1, "lr_first": 1, "attempt": 1}\n{"optimizer_step": 2, "lr_unet": 1, "attempt": 1}\n'
    )
    said = checks(check(run, write_file(1, 3, version=2), write_file(4, 12, attempt=2), kept={1: 3, 2: 12}))["rates"]
    assert not said[0] and said[1].startswith("9 optimizer steps of 1 groups as the lock's schedule has them; ")
    assert said[1].endswith("did not record those of 3 steps")
    assert asked == [(1, []), (1, ["lr_unet"])], "the newest line of the metrics names the groups"
    assert checks(check(run, write_file(1, 300), steps=300, due=300))["rates"][0]
    said = checks(check(run, write_file(1, 12, version=2)))["rates"]
    assert said == (False, "kwrap 0.1 did not record the rates of all groups")


@pytest.mark.parametrize(("chapter", "first"), [(1, 7), (2, None), (3, 1), (9, 1)])
def test_a_step_is_of_a_chapter_that_reaches_it(run: Run, chapter: int, first: int | None) -> None:
    tables: Any = run.lock.tables
    tables["chapters"] = [each.document() for each in (Chapter(0, 0, 6), Chapter(6, 6, 12))]
    report = check(run, write_file(1, 8, chapter=chapter), steps=8, due=8)
    assert [each.optimizer_step for each in report.faults if each.kind == "chapter"] == ([first] if first else [])
    assert checks(report)["chapters"] == (first is None, "2, of 6, 12 optimizer steps")


def test_attempts_are_named_up_to_five() -> None:
    assert name_attempts([3]) == "attempt 3" and name_attempts([1, 2]) == "attempts 1, 2"
    assert name_attempts([1, 2, 3, 4, 5]) == "attempts 1, 2, 3, 4, 5"
    assert name_attempts([1, 2, 3, 4, 5, 6, 9]) == "attempts 1, 2, 3, 4, 5 and 2 more"
