"""The signals that stop a run: a first one tidily, a second one at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StopSignals:
    """Counts SIGINT and SIGTERM: the first asks for a tidy stop, the second ends at once."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def caught(self) -> Iterator[StopSignals]:
        """Catch both signals for the time of the block; the former handlers come back after it."""

        def count(_signal: int, _frame: object) -> None:
            self.count += 1

        former = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def wait(self, seconds: float) -> bool:
        """Sleep unless a signal comes; whether one has come."""
        deadline = time.monotonic() + seconds
        while not self.count and (rest := deadline - time.monotonic()) > 0:
            time.sleep(min(rest, 0.2))
        return self.count > 0
