"""What `verify` asks of the optimizer steps on a run's line: options, skipped steps, rates; and what it cannot ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kohaku_wrap.training.records.bad_steps import BadSteps, is_mostly_skipped
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import LedgerFile
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.starting.expected_rates import NoExpectedRates, expect_rates
from kohaku_wrap.training.verifying.ledger_checks import Fault, Int64Array, limits_of
from kohaku_wrap.training.verifying.step_checks import LineOfSteps, StepChecker, Steps
from kohaku_wrap.wording import count_of

OLD = "kwrap 0.1 did not record"

LOST = "there is no record any more of"
"""Of files that a kwrap since then wrote."""

NAMED_ATTEMPTS = 5


@dataclass(frozen=True)
class Check:
    """One thing that `verify` looks at."""

    name: str
    """`order`, `losses`, `options`, `skipped steps`, `rates`, `chapters`, `networks`, `held out`,
    `deep`, `latents` or `text_encoders`."""

    is_looked_at: bool
    """Whether all of it could be looked at."""

    detail: str
    """What was found, or why it could not be looked at."""


@dataclass(frozen=True)
class LineReport:
    """What the optimizer steps on the line came to."""

    bad_steps: BadSteps
    """Counted over the line, from the ledger, or from the metrics for steps of kwrap 0.1."""

    checks: tuple[Check, ...]
    """Options, skipped steps, rates."""

    faults: list[Fault]
    """Empty when all is right."""


def check_steps(
    run: Run, files: Sequence[LedgerFile], kept_until: Mapping[int, float], steps: int, steps_due: int, foreign: int
) -> LineReport:
    """Check options, skipped steps and rates of the first `steps` optimizer steps.

    `steps_due`: of them, those that were whole when a state was written; the last one after them may be unfinished.
    `foreign`: the first ones of them, which plain sd-scripts trained.
    """
    table = Steps.of_files(list(files))
    kept = table.optimizer_step <= np.minimum(limits_of(kept_until, table.attempt), steps)
    checker = StepChecker(run.lock.count, table, kept)
    options = check_options(run, files, checker)
    checker.check_records()
    checker.check_coverage(list_due(files, kept_until, steps, steps_due))
    checker.check_ranks()
    line = checker.line()
    checker.check_updates(line)
    lacks = OLD if any(file.header.version < 3 for file in files) else LOST
    bad_steps, skipped = count_bad_steps(run, checker, line, steps, foreign, lacks)
    rates = check_rates(run, checker, line, steps, foreign, lacks)
    chapters = check_chapters(run, files, checker)
    return LineReport(bad_steps, (options, skipped, rates, *chapters), checker.faults)


def list_due(files: Sequence[LedgerFile], kept_until: Mapping[int, float], steps: int, steps_due: int) -> Int64Array:
    """(n, 3) attempt, rank and number of the optimizer steps on the line that must have been recorded.

    Those are the ones whose micro-batches are all there; a missing one is a fault of its own.
    """
    newest = max(file.header.attempt for file in files)
    rows = [np.zeros((0, 3), dtype=np.int64)]
    for file in files:
        if file.header.version < 3:
            continue
        numbers, micro_batches = np.unique(file.records["optimizer_step"].astype(np.int64), return_counts=True)
        numbers = numbers[micro_batches >= file.header.accumulation]
        numbers = numbers[numbers <= min(kept_until.get(file.header.attempt, steps), steps)]
        if file.header.attempt == newest:
            # A crash may have come between the last micro-batch and the step.
            numbers = numbers[(numbers < steps) | (numbers <= steps_due)]
        owner = (file.header.attempt, file.header.rank)
        rows.append(np.column_stack([np.full((len(numbers), 2), owner, dtype=np.int64), numbers]))
    return np.concatenate(rows)


def check_options(run: Run, files: Sequence[LedgerFile], checker: StepChecker) -> Check:
    """The run's id and the digest of its options in each file are those of the lock."""
    wanted = (run.lock.run_id, run.lock.options_digest)
    old = sorted({file.header.attempt for file in files if file.header.version < 3})
    new = [file for file in files if file.header.version > 2]
    unlike = [file for file in new if (file.header.run_id, file.header.options_digest) != wanted]
    if unlike:
        is_other_run = any(file.header.run_id != wanted[0] for file in unlike)
        what = (
            "trained for another run than this one" if is_other_run else "trained with other options than the lock has"
        )
        first = np.array([int(min(file.records["optimizer_step"], default=1)) for file in unlike], dtype=np.int64)
        attempt = np.array([file.header.attempt for file in unlike], dtype=np.int64)
        rank = np.array([file.header.rank for file in unlike], dtype=np.int64)
        checker.report("options", attempt, rank, first, what)
    if not any(wanted):
        return Check("options", False, f"{OLD} a digest of the options: the run was made by it")
    if old:
        return Check("options", False, f"{OLD} a digest of the options: {name_attempts(old)}")
    return Check("options", True, "unlike the lock" if unlike else "every attempt has the digest of the lock")


def check_chapters(run: Run, files: Sequence[LedgerFile], checker: StepChecker) -> list[Check]:
    """In a run that was made longer: each step was trained in a chapter that is in the lock and reaches it."""
    chapters = run.lock.chapters
    if len(chapters) == 1:
        return []
    before = len(checker.faults)
    ends = np.array([0, *(chapter.total_optimizer_steps for chapter in chapters)], dtype=np.int64)
    for file in files:
        header, steps = file.header, file.steps["optimizer_step"].astype(np.int64)
        bad = steps[steps > ends[header.chapter if header.chapter < len(ends) else 0]]
        owner = (np.full(len(bad), header.attempt), np.full(len(bad), header.rank))
        checker.report("chapter", *owner, bad, f"trained in chapter {header.chapter}, which does not reach it")
    counts = f"{len(chapters)}, of {', '.join(f'{each.total_optimizer_steps:,}' for each in chapters)} optimizer steps"
    return [Check("chapters", len(checker.faults) == before, counts)]


def count_bad_steps(
    run: Run, checker: StepChecker, line: LineOfSteps, steps: int, foreign: int, lacks: str
) -> tuple[BadSteps, Check]:
    """How many steps of the line were skipped or had a loss that is no number."""
    told = BadSteps()
    columns = (line.optimizer_step.tolist(), line.is_non_finite.tolist(), line.is_skipped.tolist())
    recorded = {step: (bad, skipped) for step, bad, skipped in zip(*columns, strict=True)}
    metrics = {}
    if len(recorded) < steps:
        metrics = {line["optimizer_step"]: line for line in read_metrics(run)}
    for step in range(1, steps + 1):
        if step in recorded:
            told.add(*recorded[step])
        elif step in metrics:
            told.add_line(metrics[step])
    if steps >= run.lock.total_optimizer_steps and is_mostly_skipped(told.skipped, steps):
        numbers = line.optimizer_step[line.is_skipped]
        zeros = np.zeros(len(numbers), dtype=np.int64)
        what = "the optimizer step was skipped, which is more than half of all steps"
        checker.report("skipped", line.attempt[line.is_skipped], zeros, numbers, what)
    own = steps - run.first_optimizer_step
    counts = f"{told.skipped:,} of {own:,} optimizer steps skipped, {told.non_finite:,} with a loss that is no number"
    left = steps - foreign - sum(step > foreign for step in recorded)
    if left:
        return told, Check(
            "skipped steps", False, f"{counts}; {lacks} them in the ledger for {count_of(left, 'step')}: by the metrics"
        )
    return told, Check("skipped steps", True, counts)


def check_rates(run: Run, checker: StepChecker, line: LineOfSteps, steps: int, foreign: int, lacks: str) -> Check:
    """The rates of all groups against the lock's schedule."""
    if steps <= foreign:
        return Check("rates", True, "no optimizer step is done yet")
    if not len(line):
        return Check("rates", False, f"{lacks} the rates of all groups")
    if foreign > run.first_optimizer_step:
        return Check("rates", False, "the updates before the state of plain sd-scripts are not known")
    try:
        expected = expect_rates(run, line.rates.shape[1])
    except NoExpectedRates as error:
        return Check("rates", False, error.message)
    right = checker.check_rates(line, expected)
    detail = f"{right:,} optimizer steps of {line.rates.shape[1]} groups as the lock's schedule has them"
    if left := steps - foreign - len(line):
        return Check("rates", False, f"{detail}; {lacks} those of {count_of(left, 'step')}")
    return Check("rates", True, detail)


def name_attempts(numbers: Sequence[int]) -> str:
    """Attempts by number, the first few of them."""
    names = ", ".join(str(number) for number in numbers[:NAMED_ATTEMPTS])
    more = f" and {len(numbers) - NAMED_ATTEMPTS} more" if len(numbers) > NAMED_ATTEMPTS else ""
    return f"attempt{'' if len(numbers) == 1 else 's'} {names}{more}"
