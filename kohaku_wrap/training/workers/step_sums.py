"""What both engines add up over an optimizer step, over its micro-batches and over the ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.runs.attempts import Attempt


class NonFiniteLoss(KwrapError):
    """The loss of an optimizer step is not a number."""


@dataclass
class StepSums:
    """What is summed over the micro-batches of one optimizer step, first on this rank, then over all."""

    loss: float = 0.0
    """Sum of the micro-batches' losses."""

    images: int = 0
    """Images trained."""

    nan_latents: int = 0
    """Images whose latents were not numbers, which sd-scripts makes zeros."""

    substitutes: int = 0
    """Unreadable images that were replaced."""

    started: float = field(default_factory=time.monotonic)
    """When the step's first micro-batch was asked for."""

    def sum_over_ranks(self, attempt: Attempt, rank: int, device: torch.device) -> bool:
        """Add up over all ranks, so that each has the same; whether rank 0 was asked to stop."""
        stop = rank == 0 and attempt.stop_requested()
        if attempt.processes == 1:
            return stop
        numbers = [self.loss, float(self.images), float(self.nan_latents), float(self.substitutes), float(stop)]
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        self.loss, *counts, stops = total.tolist()
        self.images, self.nan_latents, self.substitutes = (int(count) for count in counts)
        return bool(stops)

    def check_loss(self, attempt: Attempt, optimizer_step: int) -> None:
        """Raise NonFiniteLoss where the mean loss is not a number and that was not allowed."""
        loss = self.loss / attempt.group
        if not math.isfinite(loss) and "non-finite-loss" not in attempt.allow:
            raise NonFiniteLoss(
                f"the loss of optimizer step {optimizer_step} is {loss}",
                "Resume from an earlier state with a lower rate, or with `--allow non-finite-loss`.",
            )

    def metrics_line(
        self,
        attempt: Attempt,
        optimizer_step: int,
        epoch: int,
        loss_average: float,
        rates: Mapping[str, float],
        skipped_images_loaded: int,
        **extras: int,
    ) -> dict[str, Any]:
        """The step's line of metrics.jsonl; counts of what went wrong stand there only where there are any."""
        wrong = {"nan_latents": self.nan_latents, "substitutes": self.substitutes, **extras}
        return {
            "optimizer_step": optimizer_step,
            "epoch": epoch,
            "micro_batch": optimizer_step * attempt.accumulation,
            "loss": self.loss / attempt.group,
            "loss_average": loss_average,
            **rates,
            "seconds": round(time.monotonic() - self.started, 4),
            "images": self.images,
            "skipped_images_loaded": skipped_images_loaded,
            **{name: count for name, count in wrong.items() if count},
        }
