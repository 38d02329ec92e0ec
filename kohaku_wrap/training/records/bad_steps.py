"""How many optimizer steps were skipped or had a loss that is no number, and when that ends a training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.manifest import read_manifest
from kohaku_wrap.training.records.metrics import read_metrics

FIRST_STEPS = 1000
LIMIT_AT_FIRST = 50
"""Bad steps in a row that end an attempt within FIRST_STEPS, while a GradScaler still looks for its scale."""

LIMIT_LATER = 10
"""The same after FIRST_STEPS."""

KEY_IN_STATE = "bad_steps"
"""Where a state's manifest keeps the counts."""

ALLOWED = "non-finite-loss"
NO_NUMBERS = ("nan", "inf", "-inf")
"""How the metrics write a loss that JSON does not have."""


class NonFiniteLoss(KwrapError):
    """The loss of an optimizer step is not a number."""

    kind = "non-finite-loss"


class TooManyBadSteps(NonFiniteLoss):
    """Optimizer steps in a row were skipped or had a loss that is no number; the next attempt would repeat them."""

    is_lasting = True


class MostlySkipped(KwrapError):
    """More than half of a run's optimizer steps were skipped."""

    kind = "mostly-skipped"


@dataclass
class BadSteps:
    """Counts on the line of a run, from its first step on; a state keeps them."""

    skipped: int = 0
    """Optimizer steps that the GradScaler skipped."""

    non_finite: int = 0
    """Optimizer steps whose mean loss was no number, skipped or not."""

    in_a_row: int = 0
    """The latest steps, without a gap, that were skipped or had such a loss."""

    @classmethod
    def at_start(cls, attempt: Attempt) -> BadSteps:
        """The counts of the state that the attempt starts from; those of the metrics where kwrap 0.1 wrote it."""
        is_anew = attempt.begins_branch and not attempt.start_optimizer_step
        if attempt.state is None or attempt.foreign or is_anew:
            return cls()
        kept = read_manifest(attempt.state).extra.get(KEY_IN_STATE)
        if isinstance(kept, Mapping):
            return cls(**{name: int(kept.get(name, 0)) for name in ("skipped", "non_finite", "in_a_row")})
        lines = read_metrics(attempt.run)
        return cls.of_lines(line for line in lines if line["optimizer_step"] <= attempt.start_optimizer_step)

    @classmethod
    def of_lines(cls, lines: Iterable[Mapping[str, Any]]) -> BadSteps:
        """The counts after these lines of the metrics, one an optimizer step."""
        counts = cls()
        for line in lines:
            counts.add_line(line)
        return counts

    def add_line(self, line: Mapping[str, Any]) -> None:
        """Count the optimizer step of a line of the metrics."""
        self.add(str(line.get("loss")) in NO_NUMBERS, bool(line.get("optimizer_step_skipped")))

    def add(self, is_non_finite: bool, is_skipped: bool) -> None:
        """Count one optimizer step."""
        self.skipped += is_skipped
        self.non_finite += is_non_finite
        self.in_a_row = self.in_a_row + 1 if is_skipped or is_non_finite else 0

    def document(self) -> dict[str, dict[str, int]]:
        """What a state's manifest keeps."""
        return {KEY_IN_STATE: asdict(self)}

    def check_step(self, attempt: Attempt, optimizer_step: int, loss: float, is_skipped: bool) -> None:
        """Raise TooManyBadSteps at the limit, NonFiniteLoss for a loss that is no number in a step that was made."""
        usual = LIMIT_AT_FIRST if optimizer_step <= FIRST_STEPS else LIMIT_LATER
        limit = usual if attempt.bad_steps is None else attempt.bad_steps
        if limit and self.in_a_row >= limit:
            first = optimizer_step - self.in_a_row + 1
            raise TooManyBadSteps(
                f"{self.in_a_row} optimizer steps in a row, {first:,} to {optimizer_step:,}, were skipped or had a "
                f"loss that is no number",
                f"Go back to a state before step {first:,}, or start a new run with lower rates. "
                "To wait longer: --bad-steps N.",
            )
        if not math.isfinite(loss) and not is_skipped and ALLOWED not in attempt.allow:
            raise NonFiniteLoss(
                f"the loss of optimizer step {optimizer_step} is {loss}",
                f"Resume from an earlier state with a lower rate, or with `--allow {ALLOWED}`.",
            )

    def check_end(self, total_optimizer_steps: int) -> None:
        """Raise MostlySkipped where more than half of all steps were skipped."""
        if is_mostly_skipped(self.skipped, total_optimizer_steps):
            raise MostlySkipped(
                f"{self.skipped:,} of {total_optimizer_steps:,} optimizer steps were skipped: "
                "the network was hardly trained",
                "Start a new run with lower rates, or with bf16 in place of fp16.",
            )


def check_gradients(attempt: Attempt, optimizer_step: int, norm: float) -> None:
    """Raise NonFiniteLoss where a step was made by gradients that are no numbers: some optimizers hide it.

    Lion takes their signs, and in 8 bits its moments hold no NaN, so that neither weights nor losses show it.
    """
    if not math.isfinite(norm) and ALLOWED not in attempt.allow:
        raise NonFiniteLoss(
            f"the gradients of optimizer step {optimizer_step} are no numbers, its loss is one",
            f"Resume from an earlier state with a lower rate, or with `--allow {ALLOWED}`.",
        )


def check_weights(attempt: Attempt, optimizer_step: int, is_finite: bool) -> None:
    """Raise NonFiniteLoss where a network is to be saved that has weights which are no numbers."""
    if not is_finite and ALLOWED not in attempt.allow:
        raise NonFiniteLoss(
            f"weights of the network are no numbers after optimizer step {optimizer_step}; nothing was saved of it",
            f"Resume from an earlier state, or start a new run with lower rates. To save it all the same: "
            f"`--allow {ALLOWED}`.",
        )


def is_mostly_skipped(skipped: int, optimizer_steps: int) -> bool:
    """Whether more than half of the steps were skipped."""
    return 2 * skipped > optimizer_steps
