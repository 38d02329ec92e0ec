"""Stateless streams: pinned draws, and permutations that hold every integer once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kohaku_wrap.streams import draws, permutation, seed_of, seeds_of, stream_key


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator, in plain integers."""
    mask = (1 << 64) - 1
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


@given(st.integers(0, (1 << 64) - 1), st.integers(1, 50))
def test_draws_are_splitmix64_read_by_counter(key: int, count: int) -> None:
    assert draws(key, np.arange(count, dtype=np.uint64)).tolist() == splitmix64(key, count)


def test_draws_of_seed_zero_match_the_reference_implementation() -> None:
    # The first outputs for seed 0 of the reference C code, https://prng.di.unimi.it/splitmix64.c
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert draws(0, np.arange(3, dtype=np.uint64)).tolist() == expected


def test_keys_are_pinned() -> None:
    assert stream_key("order", 1337, 0) == 0x70B4D7199290E798
    assert seed_of("order", 1337, 0) == stream_key("order", 1337, 0) >> 1
    assert (stream_key(), stream_key(-3, "é")) == (0xB4B2797457A0A6E4, 0xDFA633B237246593)
    assert seed_of("a", 1) == 2990713671386263668
    assert permutation(5, 8).tolist() == [3, 4, 2, 5, 0, 7, 1, 6]


@given(st.lists(st.integers(0, 1 << 70), max_size=4), *(st.lists(st.text() | st.integers(), max_size=3),) * 2)
def test_many_seeds_are_the_seeds_of_each(numbers: list[int], before: list[str | int], after: list[str | int]) -> None:
    expected = [seed_of(*before, number, *after) for number in numbers]
    assert seeds_of(numbers, *before, None, *after).tolist() == expected


def test_keys_beyond_64_bits_and_below_zero_are_cut() -> None:
    counters = np.arange(4)
    assert draws((3 << 64) + 7, counters).tolist() == draws(7, counters).tolist()
    assert draws(-1, counters).tolist() == draws((1 << 64) - 1, counters).tolist()


def test_keys_keep_words_and_numbers_and_their_borders_apart() -> None:
    keys = {stream_key("a", "b"), stream_key("ab"), stream_key("a", 1), stream_key("a", "1"), stream_key("a1")}
    assert len(keys) == 5


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 500))
def test_permutations_hold_every_integer_once(key: int, size: int) -> None:
    assert sorted(permutation(key, size).tolist()) == list(range(size))
