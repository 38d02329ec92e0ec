"""Stateless random numbers: every draw is a function of its key alone, on any machine and version.

The generator is SplitMix64 (Steele, Lea and Flood, 2014) read as a counter-based one: the key is the
64-bit BLAKE2b hash of the parts, the draw for counter `i` is the finaliser of `key + (i + 1) * GAMMA`.
Nothing here depends on numpy's, torch's or Python's own generators, whose streams may change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kohaku_wrap.arrays import Int64Array, UInt64Array

GAMMA = 0x9E3779B97F4A7C15
MASK_64 = 0xFFFF_FFFF_FFFF_FFFF


def stream_key(*parts: str | int) -> int:
    """A 64-bit key from words and integers, such as `stream_key("order", seed, epoch)`."""
    return int.from_bytes(hashlib.blake2b(join_parts(parts).encode(), digest_size=8).digest(), "little")


def join_parts(parts: Iterable[str | int]) -> str:
    """The text that is hashed for these parts."""
    return "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)


def seed_of(*parts: str | int) -> int:
    """A seed in 0 … 2^63 - 1, which torch, numpy's legacy and Python's generators all accept in part."""
    return stream_key(*parts) >> 1


def seeds_of(numbers: Iterable[int], *parts: str | int | None) -> UInt64Array:
    """(n,) `seed_of` the parts for each number, which stands in the place of None; a microsecond each."""
    empty = parts.index(None)
    before, after = ([part for part in side if part is not None] for side in (parts[:empty], parts[empty:]))
    head, tail = join_parts([*before, 0])[:-1].encode(), join_parts([0, *after])[len("int:0") :].encode()
    digests = [hashlib.blake2b(b"%b%d%b" % (head, number, tail), digest_size=8).digest() for number in numbers]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64) >> np.uint64(1)


def draws(key: int, counters: npt.NDArray[np.integer] | UInt64Array) -> UInt64Array:
    """Uniform 64-bit draws, one a counter; shape and order follow `counters`."""
    with np.errstate(over="ignore"):
        z = (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(GAMMA) + np.uint64(key & MASK_64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permutation(key: int, size: int) -> Int64Array:
    """The integers below `size` in the order of their draws; ties, if any, by the integer."""
    return np.argsort(draws(key, np.arange(size, dtype=np.uint64)), kind="stable").astype(np.int64)
