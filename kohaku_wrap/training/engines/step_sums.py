"""What both engines add up over an optimizer step, over its micro-batches and over the ranks."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from kohaku_wrap.config.kernels import DETERMINISTIC_VARIABLE
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.ledger import LedgerHeader, LedgerWriter


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

    def mean_loss(self, attempt: Attempt) -> float:
        """Over the step's micro-batches of all ranks, once they are added up."""
        return self.loss / attempt.group

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
            "loss": self.mean_loss(attempt),
            "loss_average": loss_average,
            **rates,
            "seconds": round(time.monotonic() - self.started, 4),
            "images": self.images,
            "skipped_images_loaded": skipped_images_loaded,
            **{name: count for name, count in wrong.items() if count},
        }


def begin_ledger(attempt: Attempt, rank: int) -> LedgerWriter:
    """The rank's file of the ledger, with what the run's lock says in its header."""
    lock = attempt.lock
    header = LedgerHeader(
        attempt.number,
        rank,
        attempt.processes,
        attempt.accumulation,
        lock.batch_per_gpu,
        lock.seed,
        lock.run_id,
        lock.options_digest,
        is_deterministic=not torch.cuda.is_available() or os.environ.get(DETERMINISTIC_VARIABLE) == "1",
        device_digest=digest_of_device(),
    )
    return LedgerWriter(attempt.run.ledger, header)


def digest_of_device() -> int:
    """Of what decides how this machine rounds: torch's version, the instructions of its CPU, the kind of its GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return int.from_bytes(hashlib.blake2b(f"{torch.__version__} {name}".encode(), digest_size=8).digest(), "little")
