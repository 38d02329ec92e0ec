"""How a worker that cannot go on tells the supervisor why."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.states import is_disk_full

STANDARD_ERROR = 2
FAILURE_KINDS = {
    "NonFiniteLoss": "non-finite-loss",
    "MostlySkipped": "mostly-skipped",
    "UnreadableImage": "bad-image",
    "DiskFull": "disk-full",
    "UnfitState": "bad-state",
    "DamagedState": "bad-state",
    "OutOfMemoryError": "out-of-memory",
    "MemoryError": "out-of-memory",
}
"""What the supervisor calls each kind of failure, by the class that was raised."""


def report_failures(attempt: Attempt, rank: int, optimizer_steps_done: Callable[[], int]) -> None:
    """Let whatever ends this process be told in the attempt's folder, then end the process at once."""

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KwrapError):
            message, next_step = error.message, error.next_step
            told = f"{error}\n"
        else:
            message, next_step = f"{kind.__name__}: {error}", ""
            told = "".join(traceback.format_exception(kind, error, trace))
        # Straight into the log: sd-scripts sends sys.stderr of all ranks but the first to nowhere.
        sys.stdout.flush()
        with suppress(OSError):
            os.write(STANDARD_ERROR, told.encode("utf-8", "backslashreplace"))
        # A full disk may not take the reason; the supervisor then looks at the disk itself.
        with suppress(OSError):
            is_lasting = bool(getattr(error, "is_lasting", False))
            attempt.fail(rank, failure_kind(error), message, optimizer_steps_done(), next_step, is_lasting)
        # The other ranks may wait for this one inside a collective: a tidy exit would wait for them in turn.
        os._exit(1)

    sys.excepthook = report


def failure_kind(error: BaseException) -> str:
    """The supervisor's word for a failure."""
    names = [FAILURE_KINDS[each.__name__] for each in type(error).mro() if each.__name__ in FAILURE_KINDS]
    if names:
        return names[0]
    if is_disk_full(error):
        return "disk-full"
    # An expected failure of any other kind would meet the next attempt too.
    return "refused" if isinstance(error, KwrapError) else "error"
