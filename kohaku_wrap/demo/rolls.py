"""Choices of the embedded world, the same on every machine for a seed and a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from kohaku_wrap.streams import draws, stream_key

Item = TypeVar("Item")

DRAWS_A_BLOCK = 128


class Rolls:
    """A sequence of stateless draws under one key, taken one after another."""

    def __init__(self, *parts: str | int) -> None:
        self._key = stream_key("demo", *parts)
        self._taken = 0
        self._block: list[int] = []

    def below(self, bound: int) -> int:
        """An integer in 0 … bound - 1."""
        index = self._taken % DRAWS_A_BLOCK
        if index == 0:
            counters = np.arange(self._taken, self._taken + DRAWS_A_BLOCK, dtype=np.uint64)
            self._block = draws(self._key, counters).tolist()
        self._taken += 1
        return self._block[index] % bound

    def between(self, first: int, last: int) -> int:
        """An integer in first … last."""
        return first + self.below(last - first + 1)

    def chance(self, percent: int) -> bool:
        """True in `percent` of the cases."""
        return self.below(100) < percent

    def pick(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def pick_common(self, items: Sequence[Item]) -> Item:
        """One of the items, the first ones far more often, as tags are on a real site."""
        return items[min(self.below(len(items)), self.below(len(items)), self.below(len(items)))]

    def shuffle(self, items: Sequence[Item]) -> list[Item]:
        """The items in another order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(len(left))]
