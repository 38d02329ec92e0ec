"""Which batches of a run were trained up to an optimizer step, by its ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kohaku_wrap.errors import KwrapError, UsageError, command_line
from kohaku_wrap.training.data.items import Items
from kohaku_wrap.training.records.ancestry import Until, find_origin
from kohaku_wrap.training.records.attempts import last_kept_steps, list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import SUBSTITUTE, LedgerFile
from kohaku_wrap.training.verifying.deep_checks import CannotRecompute, recompute_content
from kohaku_wrap.training.verifying.ledger_checks import Checker, Int64Array, Records, limits_of
from kohaku_wrap.training.verifying.ledger_files import read_files
from kohaku_wrap.training.verifying.verify import list_foreign


class LedgerDiffers(KwrapError):
    """The ledger is not of this dataset and seed, or is damaged."""


class NotTrained(UsageError):
    """The optimizer step that is asked for was not trained."""


@dataclass(frozen=True)
class Line:
    """The attempts of a run that count up to one optimizer step."""

    run: Run
    """The run."""

    optimizer_step: int
    """The last one that counts."""

    files: Sequence[LedgerFile]
    """Of the ledger, those of these attempts."""

    limits: Mapping[int, float]
    """The last optimizer step that counts of each attempt."""

    foreign_steps: int
    """Of the optimizer steps, the first ones that another trainer or run made, by `--foreign` or `--allow`."""

    parent: tuple[Run, Until] | None
    """What trained before the run as a branch, where it is at hand."""

    @property
    def key(self) -> dict[str, Any]:
        """What the records on the line follow from: equal keys have equal exposures."""
        lock, parent = self.run.lock, self.parent
        return {
            "run_id": lock.run_id,
            "options_digest": lock.options_digest,
            "captions_digest": lock.dataset_digest,
            "optimizer_step": self.optimizer_step,
            "attempts": {str(number): int(limit) for number, limit in sorted(self.limits.items())},
            "parent": [parent[0].lock.run_id, parent[1].attempt, parent[1].optimizer_step] if parent else [],
        }


def find_line(run: Run, optimizer_step: int | None = None, until: Until | None = None) -> Line:
    """The line up to an optimizer step, or up to the last whole one; `until`: the part that a branch began from.

    Raises NoLedger, BadLedger and NotTrained.
    """
    last_attempt = until.attempt if until else np.inf
    attempts = [attempt for attempt in list_attempts(run) if attempt.number <= last_attempt]
    files = [file for file in read_files(run) if file.header.attempt <= last_attempt]
    limits = last_kept_steps(attempts)
    trained = find_last_step(run, files, limits)
    first = run.first_optimizer_step
    step = (until.optimizer_step if until else trained) if optimizer_step is None else optimizer_step
    if not first < step <= trained:
        raise NotTrained(
            f"run {run.name} has trained optimizer steps {first + 1:,} to {trained:,}, not {step:,}"
            if trained > first
            else f"run {run.name} has no whole optimizer step yet",
            f"See `{command_line('status', run.folder)}`.",
        )
    kept = {
        attempt.number: min(limits[attempt.number], step) for attempt in attempts if attempt.start_optimizer_step < step
    }
    begun = [attempt.start_optimizer_step for attempt in list_foreign(attempts, limits)]
    foreign = max([start for start in begun if start <= step], default=first)
    origin = find_origin(run) if run.lock.origin else None
    return Line(run, step, [file for file in files if file.header.attempt in kept], kept, foreign - first, origin)


def find_last_step(run: Run, files: Sequence[LedgerFile], limits: Mapping[int, float]) -> int:
    """The last optimizer step on the line of which every micro-batch was recorded; 0 for none."""
    steps, positions = [], []
    for file in files:
        step = file.records["optimizer_step"]
        is_kept = step <= min(limits.get(file.header.attempt, np.inf), np.iinfo(np.uint32).max)
        steps.append(step[is_kept])
        positions.append(file.records["position"][is_kept])
    if not steps:
        return 0
    step, position = np.concatenate(steps), np.concatenate(positions)
    last = int(step.max(initial=0))
    return last if len(np.unique(position[step == last])) == run.lock.group else max(last - 1, 0)


@dataclass(frozen=True)
class TrainedBatches:
    """What was trained on a line."""

    positions: Mapping[int, Int64Array]
    """By epoch the global positions, each once, of batches without a substitute."""

    substituted: tuple[tuple[int, int], ...]
    """Epoch and position of batches with a substitute, as far as it can be made again."""

    unknown_batches: int
    """Batches with a substitute that cannot be made again."""

    missing_batches: int
    """Positions up to the optimizer step that have no record."""


def read_batches_of(line: Line, items: Items) -> TrainedBatches:
    """The batches on the line, once the ledger is known to be of these images.

    Raises LedgerDiffers.
    """
    count, run = line.run.lock.count, line.run
    records = Records.of_files(line.files, count)
    checker = Checker(count, records)
    checker.check_bits()
    checker.check_places()
    checker.check_order(items.order, items.entries.of_rows(items.columns.ids))
    if checker.faults:
        fault = checker.faults[0]
        raise LedgerDiffers(
            f"{run.ledger}: {fault.count:,} records differ, first at optimizer step {fault.optimizer_step:,}: "
            f"{fault.what}",
            f"Run `{command_line('verify', run.folder)}`, which names all of it.",
        )
    kept = np.flatnonzero(records.optimizer_step <= limits_of(line.limits, records.attempt))
    _, first = np.unique(records.global_index[kept], return_index=True)
    kept = kept[first]
    with_substitute = kept[(records.flags[kept] & SUBSTITUTE) > 0]
    known = list(make_again(run, records, with_substitute)) if len(with_substitute) else []
    plain = kept[(records.flags[kept] & SUBSTITUTE) == 0]
    epochs = records.epoch[plain]
    due = (line.optimizer_step - run.first_optimizer_step - line.foreign_steps) * count.group
    return TrainedBatches(
        positions={epoch: records.position[plain[epochs == epoch]] for epoch in np.unique(epochs).tolist()},
        substituted=tuple((int(records.epoch[each]), int(records.position[each])) for each in known),
        unknown_batches=len(with_substitute) - len(known),
        missing_batches=max(due - len(kept), 0),
    )


def make_again(run: Run, records: Records, chosen: Int64Array) -> list[int]:
    """Of records with a substitute, those whose content comes out as recorded when it is made anew."""
    try:
        digests = recompute_content(run, records, chosen)
    except CannotRecompute:
        return []
    recorded = records.content_digest[chosen].tolist()
    return [each for each, digest, was in zip(chosen.tolist(), digests, recorded, strict=True) if digest == was]
