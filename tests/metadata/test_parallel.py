"""Pieces read ahead in a thread of their own: the same pieces, the same errors, closed where they were opened."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator

import pytest

from kohaku_wrap.metadata.parallel import read_ahead


def test_all_pieces_come_in_order_and_the_next_is_read_meanwhile() -> None:
    second_read = threading.Event()

    def pieces() -> Iterator[int]:
        yield 0
        second_read.set()
        yield from range(1, 5)

    taken = read_ahead(pieces())
    assert next(taken) == 0
    assert second_read.wait(10), "the next piece is read before it is asked for"
    assert list(taken) == [1, 2, 3, 4]
    assert list(read_ahead(iter(()))) == []


def test_an_error_comes_after_the_pieces_before_it() -> None:
    def pieces() -> Iterator[int]:
        yield 0
        raise OSError("the disk is gone")

    taken = read_ahead(pieces())
    assert next(taken) == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(taken)


def test_what_is_left_in_the_middle_is_closed_in_its_own_thread() -> None:
    closed: list[str] = []

    def pieces() -> Iterator[int]:
        connection = sqlite3.connect(":memory:")
        try:
            yield from range(100)
        finally:
            connection.close()  # refused by sqlite3 in any other thread
            closed.append(threading.current_thread().name)

    taken = read_ahead(pieces())
    assert next(taken) == 0
    taken.close()  # type: ignore[attr-defined]
    assert len(closed) == 1 and closed[0] != threading.current_thread().name
