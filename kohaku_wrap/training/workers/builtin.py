"""The builtin engine's worker: `accelerate launch -m kohaku_wrap.training.workers.builtin`, in a run's folder."""

from __future__ import annotations

import os
import sys
import traceback
from types import TracebackType
from typing import TYPE_CHECKING

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.attempts import Attempt

if TYPE_CHECKING:
    from kohaku_wrap.training.workers.builtin_run import BuiltinRun

FAILURE_KINDS = {
    "NonFiniteLoss": "non-finite-loss",
    "UnreadableImage": "bad-image",
    "DiskFull": "disk-full",
    "UnfitState": "bad-state",
    "DamagedState": "bad-state",
    "OutOfMemoryError": "out-of-memory",
}
"""What the supervisor calls each kind of failure, by the class that was raised."""

SETTLED = {
    "LYCORIS_KERNEL_BACKEND": "torch",
    "LYCORIS_KERNEL_TUNE": "off",
    "OMP_NUM_THREADS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
"""Where the launch did not say otherwise: what changes the last bits, and no question to a hub at the start."""


def report_failures(attempt: Attempt, rank: int, run: BuiltinRun) -> None:
    """Let whatever ends this process tell the supervisor why, then end it at once."""

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        known = isinstance(error, KwrapError)
        message = error.message if isinstance(error, KwrapError) else f"{kind.__name__}: {error}"
        names = [FAILURE_KINDS[each.__name__] for each in kind.mro() if each.__name__ in FAILURE_KINDS]
        if known:
            print(error, file=sys.stderr)
        else:
            traceback.print_exception(kind, error, trace)
        attempt.fail(rank, names[0] if names else "error", message, run.optimizer_steps_done)
        sys.stdout.flush()
        sys.stderr.flush()
        # The other ranks may wait for this one inside a collective: a tidy exit would wait for them in turn.
        os._exit(1)

    sys.excepthook = report


def main() -> int:
    """Train the attempt that KWRAP_RUN and KWRAP_ATTEMPT name; 0 when it finished or was stopped as asked."""
    rank = int(os.environ.get("RANK", "0"))
    attempt = Attempt.load()
    attempt.open_log(rank)
    attempt.stop_on_signals()
    attempt.beat(rank, "start-up", attempt.start_optimizer_step)
    for name, value in SETTLED.items():
        os.environ.setdefault(name, value)
    # After the environment is settled: torch and LyCORIS read it when they are imported.
    from kohaku_wrap.training.workers.builtin_run import BuiltinRun

    run = BuiltinRun(attempt, rank)
    report_failures(attempt, rank, run)
    run.prepare()
    outcome = run.train()
    if rank == 0:
        attempt.finish(outcome, run.optimizer_steps_done)
    run.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
