"""The builtin engine's worker, started in a run's folder by `accelerate launch -m` and this module."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from kohaku_wrap.training.engines.worker import run_worker
from kohaku_wrap.training.records.attempts import Attempt

if TYPE_CHECKING:
    from kohaku_wrap.training.engines.interface import Engine

SETTLED = {
    "LYCORIS_KERNEL_BACKEND": "torch",
    "LYCORIS_KERNEL_TUNE": "off",
    "OMP_NUM_THREADS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
"""Where the launch did not say otherwise: what changes the last bits, and no question to a hub at the start."""


def main() -> int:
    """Train the attempt that KWRAP_RUN and KWRAP_ATTEMPT name; 0 when it finished or was stopped as asked."""
    return run_worker(begin)


def begin(attempt: Attempt, rank: int) -> Engine:
    """The engine of the attempt."""
    for name, value in SETTLED.items():
        os.environ.setdefault(name, value)
    # After the environment is settled: torch and LyCORIS read it when they are imported.
    from kohaku_wrap.training.engines.builtin.loop import BuiltinRun

    return BuiltinRun(attempt, rank)


if __name__ == "__main__":
    sys.exit(main())
