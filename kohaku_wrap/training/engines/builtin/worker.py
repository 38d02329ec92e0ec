"""The builtin engine's worker, started in a run's folder by `accelerate launch -m` and this module."""

from __future__ import annotations

import os
import sys

from kohaku_wrap.training.engines.failures import report_failures
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.saving import wait_for_room

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
    rank = int(os.environ.get("RANK", "0"))
    attempt = Attempt.load()
    attempt.open_log(rank)
    attempt.stop_on_signals()
    attempt.beat(rank, "start-up", attempt.start_optimizer_step)
    report_failures(attempt, rank, lambda: attempt.start_optimizer_step)
    for name, value in SETTLED.items():
        os.environ.setdefault(name, value)
    # After the environment is settled: torch and LyCORIS read it when they are imported.
    from kohaku_wrap.training.engines.builtin.loop import BuiltinRun

    run = BuiltinRun(attempt, rank)
    report_failures(attempt, rank, lambda: run.optimizer_steps_done)
    run.prepare()
    outcome = run.train()
    if rank == 0:
        done = run.optimizer_steps_done
        wait_for_room(attempt, lambda: attempt.finish(outcome, done), done)
    run.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
