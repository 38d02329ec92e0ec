"""Rounding once: ties to even, both ends of every format, and sums against rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kohaku_wrap.merging.arithmetic.rounding import (
    FORMATS,
    Combination,
    narrow_to_odd,
    round_array,
    round_fraction,
    sum_exactly,
    sum_with_bound,
)

KINDS = ("F16", "BF16", "F32")
TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
PATTERNS = {
    "F16": [0, 1, 2, 3, 0x3FE, 0x3FF, 0x400, 0x401, 0x3BFF, 0x3C00, 0x3C01, 0x5555, 0x7BFD, 0x7BFE],
    "BF16": [0, 1, 2, 3, 0x7E, 0x7F, 0x80, 0x81, 0x3F7F, 0x3F80, 0x3F81, 0x5555, 0x7F7D, 0x7F7E],
    "F32": [0, 1, 2, 3, 0x7FFFFE, 0x7FFFFF, 0x800000, 0x800001, 0x3F7FFFFF, 0x3F800000, 0x55555555, 0x7F7FFFFE],
}
"""Bits of numbers whose next one is finite: the smallest, the edge of the subnormals, 1, the largest."""
GAMMA = (Fraction(1, 2), Fraction(4, 5), Fraction(-4, 5), Fraction(1, 2))


def value_of(pattern: int, kind: str) -> Fraction:
    """The number of these bits, as torch reads them."""
    width = torch.int32 if kind == "F32" else torch.int16
    return Fraction(torch.tensor([pattern], dtype=width).view(TORCH_DTYPES[kind]).double().item())


@pytest.mark.parametrize("kind", KINDS)
def test_formats_are_those_of_the_library(kind: str) -> None:
    form, library = FORMATS[kind], torch.finfo(TORCH_DTYPES[kind])
    assert form.name == kind and form.size_bytes * 8 == library.bits
    assert form.largest == Fraction(library.max)
    assert Fraction(2) ** form.unit_exponent == value_of(1, kind)
    assert Fraction(2) ** -form.fraction_bits == Fraction(library.eps)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_and_in_the_middle_the_even(kind: str, sign: int) -> None:
    form = FORMATS[kind]
    for pattern in PATTERNS[kind]:
        low, high = value_of(pattern, kind), value_of(pattern + 1, kind)
        middle, little = (low + high) / 2, (high - low) / 10**9
        even = high if pattern % 2 else low
        wanted = {low: low, low + little: low, middle - little: low, middle: even, middle + little: high, high: high}
        for value, nearest in wanted.items():
            assert round_fraction(sign * value, form) == sign * nearest, (hex(pattern), value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_too_large_is_infinite(kind: str) -> None:
    form = FORMATS[kind]
    half = Fraction(2) ** (form.largest_exponent - form.precision - 1)
    assert round_fraction(form.largest + half - Fraction(1, 10**9), form) == form.largest
    assert round_fraction(-form.largest - half + Fraction(1, 10**9), form) == -form.largest
    for value in (form.largest + half, -form.largest - half, 2 * form.largest, Fraction(10) ** 60):
        assert round_fraction(value, form) is None
    assert round_fraction(Fraction(0), form) == 0


def test_combinations_have_one_denominator() -> None:
    sum_of = Combination.of(GAMMA)
    assert (sum_of.numerators, sum_of.denominator, sum_of.weight) == ((5, 8, -8, 5), 10, 26)
    assert sum_of.exact([1.0, 0.5, 0.25, -2.0]) == Fraction(-3, 10)
    with pytest.raises(ValueError):
        sum_of.exact([1.0])
    assert Combination.of([Fraction(1, 4), Fraction(1, 6)]) == Combination((3, 2), 12)


def doubles(kind: str) -> list[float]:
    """Numbers, ties and neighbours of ties around those above, of both signs."""
    values = []
    for pattern in PATTERNS[kind]:
        low, high = float(value_of(pattern, kind)), float(value_of(pattern + 1, kind))
        middle = (low + high) / 2
        values += [low, high, middle, math.nextafter(middle, 0), math.nextafter(middle, math.inf)]
    return [*values, *(-value for value in values)]


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_are_rounded_as_fractions_are(kind: str) -> None:
    # bfloat16's subnormals are float32's, whose last bits the odd rounding does not cover; sums go another way there.
    values = [value for value in doubles(kind) if kind != "BF16" or value == 0 or abs(value) >= 2.0**-125]
    found = round_array(np.array(values), FORMATS[kind])
    assert found.dtype == np.float32
    for value, number in zip(values, found.tolist(), strict=True):
        assert Fraction(number) == round_fraction(Fraction(value), FORMATS[kind]), value
        assert math.copysign(1, number) == math.copysign(1, value)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_keep_what_is_not_finite(kind: str) -> None:
    found = round_array(np.array([np.inf, -np.inf, np.nan, 1e300, -1e300]), FORMATS[kind])
    assert found[:2].tolist() == [np.inf, -np.inf] and np.isnan(found[2]) and found[3:].tolist() == [np.inf, -np.inf]


def test_narrowed_to_odd() -> None:
    """Cut off toward zero, and the last bit set where something was cut."""
    one = np.float32(1).view(np.uint32)
    values = [1.0, 1 + 2.0**-24, 1 + 2.0**-23, 1 + 2.0**-22, 1 + 2.0**-22 + 2.0**-52, 1 + 2.0**-23 + 2.0**-24]
    wanted = [one, one + 1, one + 1, one + 2, one + 3, one + 1]
    assert narrow_to_odd(np.array(values)).view(np.uint32).tolist() == wanted
    minus = narrow_to_odd(-np.array(values)).view(np.uint32)
    assert minus.tolist() == [pattern + 0x80000000 for pattern in wanted]
    assert narrow_to_odd(np.array([0.0, -0.0, np.inf])).view(np.uint32).tolist() == [0, 0x80000000, 0x7F800000]
    assert narrow_to_odd(np.arange(12.0)[::2]).tolist() == [0, 2, 4, 6, 8, 10]


def check_sum(columns: list[np.ndarray], kinds: list[str], coefficients: tuple[Fraction, ...], to: str) -> None:
    sum_of, form = Combination.of(coefficients), FORMATS[to]
    found = sum_exactly(columns, [FORMATS[kind] for kind in kinds], sum_of, form)
    assert found.dtype == np.float32 and found.shape == columns[0].shape
    values = [column.astype(np.float64) for column in columns]
    total, error, certain = sum_with_bound(values, [FORMATS[kind] for kind in kinds], sum_of, form)
    for place, number in enumerate(found.tolist()):
        exact = sum_of.exact([float(column[place]) for column in columns])
        rounded = round_fraction(exact, form)
        assert number == (math.copysign(math.inf, exact) if rounded is None else rounded)
        assert abs(Fraction(float(total[place])) - exact) <= Fraction(float(error[place]))
        if certain[place] and to != "BF16" and rounded is not None:
            assert float(round_array(total[place : place + 1], form)[0]) == rounded


def draw_columns(kind: str, size: int, count: int, hostile: bool, seed: int = 5) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    if not hostile:
        tensors = [torch.from_numpy(generator.standard_normal(size) * 0.05) for _ in range(count)]
        return [tensor.to(TORCH_DTYPES[kind]).float().numpy() for tensor in tensors]
    columns = []
    for _ in range(count):
        patterns = np.array([*PATTERNS[kind], *(pattern + 1 for pattern in PATTERNS[kind])])
        chosen = [float(value_of(int(pattern), kind)) for pattern in generator.choice(patterns, size)]
        columns.append((np.array(chosen) * generator.choice([1, -1], size)).astype(np.float32))
    columns[1][::3] = columns[0][::3]
    return columns


COEFFICIENTS = [
    GAMMA,
    (Fraction(1), Fraction(1)),
    (Fraction(1, 3), Fraction(2, 3)),
    (Fraction(1), Fraction(-1)),
    (Fraction(1), Fraction(1, 2)),
    (Fraction(123456789, 10**9), Fraction(876543211, 10**9)),
    (Fraction(10**15 + 1, 10**15), Fraction(-1, 10**15)),
    (Fraction(1 << 27), Fraction((1 << 27) - 1)),
    (Fraction(1 << 40), Fraction(1, 1 << 40)),
]


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", KINDS)
def test_sums_are_rounded_once(to: str, kind: str, hostile: bool) -> None:
    for coefficients in COEFFICIENTS:
        columns = draw_columns(kind, 60, len(coefficients), hostile)
        check_sum(columns, [kind] * len(columns), coefficients, to)


HALVES = st.builds(math.ldexp, st.integers(-2047, 2047), st.integers(-24, 4))


@given(st.lists(st.tuples(HALVES, HALVES, HALVES), min_size=1, max_size=8))
@settings(max_examples=20, deadline=None)
def test_sums_of_any_three(rows: list[tuple[float, float, float]]) -> None:
    columns = [np.array(column, dtype=np.float32) for column in zip(*rows, strict=True)]
    for coefficients in ((Fraction(1), Fraction(1), Fraction(-1)), (Fraction(1, 7), Fraction(3), Fraction(-2, 5))):
        for to in KINDS:
            check_sum(columns, ["F16"] * 3, coefficients, to)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("more", [1, 0, -1])
def test_halves_of_the_smallest_bfloat16_are_rounded_once(sign: int, more: int) -> None:
    """What float32 cannot hold decides which way a half goes."""
    odd = np.array([1, 3, 5, 127], dtype=np.float32)
    columns = [np.ldexp(sign * odd, -134), np.full(4, sign * more * 2.0**-149, dtype=np.float32)]
    check_sum(columns, ["F32"] * 2, (Fraction(1), Fraction(1, 1 << 20)), "BF16")
    check_sum(columns, ["BF16", "F32"], (Fraction(1), Fraction(1, 1 << 20)), "BF16")
    columns[1] = np.full(4, sign * more * 2.0**-133, dtype=np.float32)
    check_sum(columns, ["BF16"] * 2, (Fraction(1), Fraction(1, 1 << 20)), "BF16")


def test_ordinary_sums_are_certain() -> None:
    """What float64 holds exactly needs no second look: merges would take hours with integers."""
    values = [column.astype(np.float64) for column in draw_columns("F16", 500, 4, False)]
    values[0][:5] = values[1][:5] = 0
    _, error, certain = sum_with_bound(values, [FORMATS["F16"]] * 4, Combination.of(GAMMA), FORMATS["F16"])
    assert certain.all()
    size = sum(abs(weight) * np.abs(column) for weight, column in zip(map(float, GAMMA), values, strict=True))
    assert (error <= size * 2.0**-48).all() and (error[size > 0] > 0).all()


def test_wide_sums_are_doubtful() -> None:
    form = FORMATS["F32"]
    values = [np.array([1.0, 1.0, 2.0**26, 0.0]), np.array([2.0**-60, 2.0**-20, 2.0**-3, 2.0**-149])]
    _, _, certain = sum_with_bound(values, [form, form], Combination.of([Fraction(1), Fraction(1)]), form)
    assert certain.tolist() == [False, True, False, True]
    large = Combination.of([Fraction(1, 1 << 27), Fraction(1)])
    assert not sum_with_bound(values, [form, form], large, form)[2].any()


def test_sums_of_what_is_not_finite() -> None:
    columns = [
        np.array([np.inf, np.nan, np.inf, 6e4, -6e4], np.float32),
        np.array([1, 1, -np.inf, 6e4, -6e4], np.float32),
    ]
    sum_of = Combination.of([Fraction(1), Fraction(1)])
    found = sum_exactly(columns, [FORMATS["F16"]] * 2, sum_of, FORMATS["F16"])
    assert found[[0, 3, 4]].tolist() == [np.inf, np.inf, -np.inf] and np.isnan(found[[1, 2]]).all()
