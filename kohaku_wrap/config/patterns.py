"""Regular expressions of a preset, tried on SDXL's own names under a limit: some would never come to an end."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

from kohaku_wrap.formats.sdxl import SDXL_SIZES, UNET_PREFIX, list_tensor_names

LIMIT_SECONDS = 1.0
"""Processor time for one pattern on all names; one that fits takes some milliseconds."""


class TooSlow(Exception):
    """A pattern took longer than the limit."""


@contextmanager
def limit_seconds(seconds: float) -> Iterator[None]:
    """Raise TooSlow after so much processor time; outside of the main thread, which alone gets signals, never.

    Python's matcher looks for signals while it backtracks.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@cache
def module_names() -> tuple[str, ...]:
    """The dotted names of a full SDXL's modules as patterns meet them, each with one that just fails to match."""
    tensors = [name for part in list_tensor_names(SDXL_SIZES).values() for name in part]
    modules = dict.fromkeys(name.removeprefix(UNET_PREFIX).rpartition(".")[0] for name in tensors)
    longest = sorted(modules, key=len)[-8:]
    return (*modules, *(f"{name}\n!" for name in longest))


def find_faults(patterns: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each regular expression that cannot be used, and what is wrong with it; none is tried after one too slow."""
    for pattern in patterns:
        try:
            with limit_seconds(LIMIT_SECONDS):
                compiled = re.compile(pattern)
                for name in module_names():
                    compiled.match(name)
        except TooSlow:
            what = f"takes more than {LIMIT_SECONDS:g} s on SDXL's names: write it without a repeat inside a repeat"
            yield pattern, what
            return
        except (re.error, RecursionError, OverflowError) as error:
            yield pattern, f"is no regular expression: {error}"
