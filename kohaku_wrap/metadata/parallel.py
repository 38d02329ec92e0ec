"""Work on many pieces in threads, with results in the pieces' order and few pieces in memory at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from kohaku_wrap.processes import count_cores

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def usable_threads() -> int:
    """How many processor cores this process may use, at most four: more only wait for the disk."""
    return min(count_cores(), 4)


def read_ahead(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The same pieces, the next of which is read in a thread of its own while the caller works with one."""
    with ThreadPoolExecutor(1) as pool:
        try:
            ahead = pool.submit(lambda: list(islice(pieces, 1)))
            while piece := ahead.result():
                ahead = pool.submit(lambda: list(islice(pieces, 1)))
                yield piece[0]
        finally:
            # Where it was opened: a connection of sqlite may be closed in its own thread alone.
            if isinstance(pieces, Generator):
                pool.submit(pieces.close)


def map_in_order(work: Callable[[Piece], Result], pieces: Iterable[Piece], threads: int) -> Iterator[Result]:
    """`work` of each piece, in order; at most `threads` + 1 results wait to be taken.

    When the caller stops or a piece fails, no further piece is begun and the running ones are waited for. Work never
    runs in the caller's own thread, so an interrupt, which only that one sees, never cuts a piece in two.
    """
    threads = max(1, threads)
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[Result]] = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(work, piece))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
