"""A worker's life from its start to its last word, the same for every engine; torch is not imported here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.saving import wait_for_room
from kohaku_wrap.training.records.signs import Failure
from kohaku_wrap.training.records.states import DiskFull, is_disk_full

if TYPE_CHECKING:
    from kohaku_wrap.training.engines.interface import Engine

STANDARD_ERROR = 2


def run_worker(begin: Callable[[Attempt, int], Engine]) -> int:
    """Train the attempt that KWRAP_RUN and KWRAP_ATTEMPT name; 0 when it finished or was stopped as asked.

    `begin` makes the engine of the attempt and this rank; torch is imported within it, under the settled environment.
    """
    rank = int(os.environ.get("RANK", "0"))
    attempt = Attempt.load()
    attempt.open_log(rank)
    attempt.stop_on_signals()
    attempt.beat(rank, "start-up", attempt.start_optimizer_step)
    report_failures(attempt, rank, lambda: attempt.start_optimizer_step)
    engine = begin(attempt, rank)
    report_failures(attempt, rank, lambda: engine.optimizer_steps)
    outcome = engine.train()
    if outcome == "finished":
        engine.bad_steps.check_end(engine.total_optimizer_steps)
    engine.close()
    if rank == 0:
        done = engine.optimizer_steps
        wait_for_room(attempt, lambda: attempt.finish(outcome, done), done)
    end_loader_workers()
    return 0


def end_loader_workers() -> None:
    """SIGKILL to loader workers that wait in the middle of an epoch, with nothing left to do.

    Python and torch end them by SIGTERM, which they do not take (`data/loader.py`), and wait for them for ever. torch
    would also take the death of a worker for a crash.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


def report_failures(attempt: Attempt, rank: int, optimizer_steps_done: Callable[[], int]) -> None:
    """Let whatever ends this process be told in the attempt's folder, then end the process at once."""

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KwrapError):
            message, next_step, is_lasting = error.message, error.next_step, error.is_lasting
            told = f"{error}\n"
        else:
            message, next_step, is_lasting = f"{kind.__name__}: {error}", "", False
            told = "".join(traceback.format_exception(kind, error, trace))
        # Straight into the log: sd-scripts sends sys.stderr of all ranks but the first to nowhere.
        sys.stdout.flush()
        with suppress(OSError):
            os.write(STANDARD_ERROR, told.encode("utf-8", "backslashreplace"))
        # A full disk may not take the reason; the supervisor then looks at the disk itself.
        with suppress(OSError):
            done = optimizer_steps_done()
            attempt.fail(Failure(rank, failure_kind(error), message, done, next_step, is_lasting=is_lasting))
        # The other ranks may wait for this one inside a collective: a tidy exit would wait for them in turn.
        os._exit(1)

    sys.excepthook = report


def failure_kind(error: BaseException) -> str:
    """The supervisor's word for a failure: that of its class, unless a full disk is behind it."""
    if isinstance(error, KwrapError) and error.kind != KwrapError.kind:
        return error.kind
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return "out-of-memory"
    if is_disk_full(error):
        return DiskFull.kind
    return error.kind if isinstance(error, KwrapError) else "error"
