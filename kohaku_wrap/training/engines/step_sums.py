"""What both engines add up over an optimizer step, over its micro-batches and over the ranks."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field

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

    apart: dict[str, float] = field(default_factory=dict)
    """Seconds since then that are no part of the step, by what they went into: see APART of the metrics."""

    @property
    def seconds(self) -> float:
        """That the step has taken so far, without what stands apart."""
        return time.monotonic() - self.started - sum(self.apart.values())

    def add_apart(self, kind: str, seconds: float) -> None:
        """Count a time to no step."""
        self.apart[kind] = self.apart.get(kind, 0.0) + seconds

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
        chapter=len(lock.chapters),
    )
    return LedgerWriter(attempt.run.ledger, header)


def digest_of_device() -> int:
    """Of what decides how this machine rounds: torch's version, the instructions of its CPU, the kind of its GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return int.from_bytes(hashlib.blake2b(f"{torch.__version__} {name}".encode(), digest_size=8).digest(), "little")
