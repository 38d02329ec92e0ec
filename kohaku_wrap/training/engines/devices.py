"""Whether the GPUs and processes here are those that an attempt was planned for."""

from __future__ import annotations

import torch

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.records.attempts import Attempt


class WrongProcesses(KwrapError):
    """accelerate joined another number of processes than the attempt was planned for."""

    def __init__(self, joined: int, planned: int) -> None:
        super().__init__(
            f"{joined} processes train together, the attempt is one of {planned}",
            "Start the run with `kwrap train` or `kwrap resume`, or give accelerate the same number.",
        )


class NoGpu(KwrapError):
    """The run is one of GPUs, and torch sees fewer here than its processes need."""

    is_lasting = True

    def __init__(self, seen: int, needed: int) -> None:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        super().__init__(
            f"torch sees {seen} GPUs, the run needs {needed} on this machine; torch {torch.__version__} is {build}",
            "Look with `kwrap doctor`; or train a new run on the CPU: gpus = 0 in the site.",
        )


def require_gpus(attempt: Attempt) -> None:
    """Raise NoGpu where a run of GPUs would train on the CPU, slowly and without a word. Locks of 0.1 may not tell."""
    if attempt.lock.is_on_cpu or "gpus" not in attempt.lock.table("machine"):
        return
    devices = torch.accelerator if hasattr(torch, "accelerator") else torch.cuda
    if (seen := devices.device_count()) < attempt.processes_here:
        raise NoGpu(seen, attempt.processes_here)
