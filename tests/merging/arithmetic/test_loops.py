"""Each of the merge's loops by itself, as the Python it is written in: compiled, they run in the tests of kernels."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest

from kohaku_wrap.merging.arithmetic import loops as compiled_loops
from kohaku_wrap.merging.arithmetic.rounding import FORMATS, round_fraction

NOTHING = np.empty((0, 0), np.uint16)
NO_PRODUCT = np.empty(0, np.float32), np.empty((0, 0), np.float32)


@pytest.fixture(scope="module")
def loops() -> Iterator[ModuleType]:
    """The module, uncompiled; the two instructions that numba writes are numpy's here."""
    before = numba.config.DISABLE_JIT
    numba.config.DISABLE_JIT = True
    try:
        spec = importlib.util.spec_from_file_location("uncompiled_loops", str(compiled_loops.__file__))
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        numba.config.DISABLE_JIT = before
    vars(module).update(
        widen_half=lambda bits: np.uint16(bits).view(np.float16).astype(np.float32),
        narrow_to_half=lambda value: np.float32(value).astype(np.float16).view(np.uint16),
    )
    with np.errstate(all="ignore"):
        yield module


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def halves(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float16).view(np.uint16)


def bfloats(*values: float) -> np.ndarray:
    """Bits of bfloat16 for numbers that it holds."""
    bits = floats(*values).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def value_of_bfloat(pattern: int) -> float:
    return float(np.uint32(pattern << 16).view(np.float32))


def test_widening_holds_every_16_bit_number(loops: ModuleType) -> None:
    patterns = np.arange(0, 1 << 16, 37, dtype=np.uint16)
    wide = np.empty(patterns.size, np.float32)
    loops.widen(patterns, loops.HALF, wide)
    assert np.array_equal(wide, patterns.view(np.float16).astype(np.float32), equal_nan=True)
    loops.widen(patterns, loops.BFLOAT, wide)
    assert np.array_equal(wide.view(np.uint32), patterns.astype(np.uint32) << 16)


@pytest.mark.parametrize(("first", "size"), [(0, 84), (0, 1), (5, 20), (7, 7), (13, 71), (83, 1), (20, 30)])
def test_a_stretch_of_a_kronecker_product(loops: ModuleType, first: int, size: int) -> None:
    generator = np.random.default_rng(1)
    outer, inner = generator.random(3).astype(np.float32), generator.random((4, 7)).astype(np.float32)
    output = np.full(size + 2, 9, np.float32)
    loops.fill_kronecker(outer, inner, first, output[1:-1])
    whole = np.concatenate([np.kron(outer, row) for row in inner]).astype(np.float32)
    assert output[1:-1].tolist() == whole[first : first + size].tolist() and output[[0, -1]].tolist() == [9, 9]


def test_a_kronecker_product_ends_where_its_place_ends(loops: ModuleType) -> None:
    outer, inner, output = np.ones((2, 20), np.float32)[0], np.ones((2, 30), np.float32), np.zeros(1000, np.float32)
    loops.fill_kronecker(outer, inner, 0, output)
    assert output.tolist() == [1.0] * 1000


def test_rows_come_from_halves_singles_and_the_product(loops: ModuleType) -> None:
    half = np.stack([halves(1, 2, 3, 4), bfloats(5, 6, 7, 8)])
    kinds = np.array([loops.HALF, loops.BFLOAT])
    single = np.stack([floats(9, 10, 11, 12), floats(13, 14, 15, 16)]).view(np.uint32)
    outer, inner = floats(2, 3), floats(1, 10).reshape(1, 2)
    rows = [
        loops.load_row(half, kinds, single, outer, inner, row, 1, np.empty(2, np.float32)).tolist() for row in range(5)
    ]
    assert rows == [[2, 3], [6, 7], [10, 11], [14, 15], [20, 3]]


def test_terms_are_added(loops: ModuleType) -> None:
    total = np.array([1.0, 2.0, 0.5])
    loops.add_term(floats(3, -4, 2.0**-30), 0.1, total)
    assert total.tolist() == [1.0 + 0.1 * 3.0, 2.0 - 0.1 * 4.0, 0.5 + 0.1 * 2.0**-30]


def test_the_largest_and_the_smallest_above_zero(loops: ModuleType) -> None:
    largest, smallest = np.zeros(4, np.uint32), np.full(4, 0xFFFFFFFF, np.uint32)
    for values in ((1, -3, 0, -0.0), (-2, 0, 0, 2.0**-149), (0.5, 1, -0.0, 7)):
        loops.note_sizes(floats(*values).view(np.uint32), largest, smallest)
    assert largest.view(np.float32).tolist() == [2, 3, 0, 7]
    assert (smallest + np.uint32(1)).view(np.float32).tolist() == [0.5, 1, 0, np.float32(2.0**-149)]


@pytest.mark.parametrize(("limit", "count"), [(0.5, 4), (1.0, 3), (3.0, 2), (3.999, 2), (4.0, 1), (7.9, 1), (8.0, 0)])
def test_spreads_wider_than_the_limit_are_counted(loops: ModuleType, limit: float, count: int) -> None:
    largest, smallest = floats(2, 4, 8, 5), floats(2, 1, 1, 0)
    lows = smallest.view(np.uint32) - np.uint32(1)
    lows[3] = floats(1.75).view(np.uint32)[0] - 1
    assert loops.count_wide_spreads(largest.view(np.uint32), lows, limit) == count


def test_nothing_but_zeros_is_no_spread(loops: ModuleType) -> None:
    zeros = np.zeros(2, np.uint32)
    assert loops.count_wide_spreads(zeros, np.full(2, 0xFFFFFFFF, np.uint32), 2.0) == 0


def test_powers_of_two(loops: ModuleType) -> None:
    for value in (1.0, 2.0, 0.25, 2.0**40, 2.0**-9):
        assert loops.is_power_of_two(value) is True
    for value in (3.0, 10.0, 6.0, 1.5, 2.0**40 + 1):
        assert loops.is_power_of_two(value) is False


@pytest.mark.parametrize("denominator", [1.0, 2.0, 8.0, 3.0, 10.0, 49.0])
def test_division_is_division(loops: ModuleType, denominator: float) -> None:
    values = np.array([1.0, -7.0, 1e-300, 123456789.123, 0.0, 6e300])
    total = values.copy()
    loops.divide(total, denominator)
    assert total.tolist() == (values / denominator).tolist()


def cut_to_odd(value: Fraction, bits: int) -> Fraction:
    """A normal number cut toward zero to so many bits, the last one set where something was cut."""
    if not value:
        return value
    exponent = 0
    while abs(value) / Fraction(2) ** exponent >= 2:
        exponent += 1
    while abs(value) / Fraction(2) ** exponent < 1:
        exponent -= 1
    unit = Fraction(2) ** (exponent - bits + 1)
    count, rest = divmod(abs(value), unit)
    whole = (int(count) | 1) if rest else int(count)
    return (1 if value > 0 else -1) * whole * unit


NEAR_TIES = [
    1.0, 1.5, 1 + 2.0**-24, 1 + 2.0**-23, 1 + 3 * 2.0**-24, 1 + 2.0**-22 + 2.0**-52, 3.0 + 2.0**-51, 0.1, 1 / 3, 1e-30,
    2.0 - 2.0**-52, 2.0 - 2.0**-24, 123456.789, 65504.0, 1e30, 0.0,
]  # fmt: skip


def test_cut_to_odd(loops: ModuleType) -> None:
    values = np.array([*NEAR_TIES, *(-value for value in NEAR_TIES)])
    output = np.empty(values.size, np.float32)
    loops.cut_to_odd(values, output)
    for value, found in zip(values.tolist(), output.tolist(), strict=True):
        assert Fraction(found) == cut_to_odd(Fraction(value), 24), value
    assert math.copysign(1, output[-1]) == -1


def test_sums_of_two_are_rounded_to_odd(loops: ModuleType) -> None:
    pool = [
        1.0,
        2.0**-24,
        -(2.0**-24),
        2.0**-25,
        2.0**-40,
        -(2.0**-40),
        1 + 2.0**-23,
        -1.0,
        3.0,
        0.1,
        -0.7,
        1e8,
        16777215.0,
    ]
    left, right = (floats(*column) for column in zip(*[(one, other) for one in pool for other in pool], strict=True))
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        output = np.empty(left.size, np.float32)
        loops.add_to_odd(left, right, np.float32(signs[0]), np.float32(signs[1]), output)
        for one, other, found in zip(left.tolist(), right.tolist(), output.tolist(), strict=True):
            assert Fraction(found) == cut_to_odd(signs[0] * Fraction(one) + signs[1] * Fraction(other), 24)


def odd(values: np.ndarray) -> np.ndarray:
    """As float32 rounded to odd."""
    return np.array([float(cut_to_odd(Fraction(value), 24)) for value in values.tolist()], np.float32)


def test_odd_numbers_to_halves(loops: ModuleType) -> None:
    values = np.array([1.0, 1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-40, 1 + 3 * 2.0**-11, -0.1, 65504.0, 65519.9, 0.0])
    output = np.zeros(values.size, np.uint16)
    assert loops.round_odd_to_halves(odd(values), output) is False
    wanted = [float(round_fraction(Fraction(value), FORMATS["F16"]) or 0) for value in values.tolist()]
    assert output.view(np.float16).astype(float).tolist() == wanted
    for bad in (65520.0, -65520.0, np.inf, -np.inf, np.nan):
        assert loops.round_odd_to_halves(floats(1, bad, 2), output[:3]) is True
    assert output[:3].view(np.float16)[[0, 2]].tolist() == [1, 2]


BFLOAT_PATTERNS = [0x80, 0x81, 0xFF, 0x100, 0x3F7E, 0x3F7F, 0x3F80, 0x3F81, 0x4123, 0x7F7D, 0x7F7E]
TINY_PATTERNS = [0, 1, 2, 3, 0x7E, 0x7F]


def around_ties(patterns: list[int]) -> list[float]:
    """Neighbours in bfloat16, their middle, and numbers beside it that float32 holds; of both signs."""
    values = []
    for pattern in patterns:
        low, high = value_of_bfloat(pattern), value_of_bfloat(pattern + 1)
        middle = np.float32((low + high) / 2)
        beside = [float(np.nextafter(middle, np.float32(limit))) for limit in (low, high)]
        values += [low, float(middle), high, *beside]
    return [*values, *(-value for value in values)]


def check_bfloats(values: list[float], output: np.ndarray) -> None:
    for value, pattern in zip(values, output.tolist(), strict=True):
        assert Fraction(value_of_bfloat(pattern)) == round_fraction(Fraction(value), FORMATS["BF16"]), value
        assert pattern >> 15 == (math.copysign(1, value) < 0)


def test_odd_numbers_to_bfloats(loops: ModuleType) -> None:
    values = around_ties([*BFLOAT_PATTERNS, *TINY_PATTERNS])
    output = np.zeros(len(values), np.uint16)
    assert loops.round_odd_to_bfloats(floats(*values), output) is False
    check_bfloats(values, output)


@pytest.mark.parametrize("name", ["round_odd_to_bfloats", "round_to_bfloats"])
def test_bfloats_that_are_not_finite(loops: ModuleType, name: str) -> None:
    largest = value_of_bfloat(0x7F7F)
    middle = float(np.uint32(0x7F7F8000).view(np.float32))
    dtype = np.float32 if "odd" in name else np.float64
    output = np.zeros(3, np.uint16)
    for bad, wanted in ((middle, 0x7F80), (-middle, 0xFF80), (np.inf, 0x7F80), (-np.inf, 0xFF80)):
        assert getattr(loops, name)(np.array([1, bad, -2], dtype), output) is True
        assert output.tolist() == [0x3F80, wanted, 0xC000]
    assert getattr(loops, name)(np.array([np.nan, 1, 1], dtype), output) is True
    assert getattr(loops, name)(np.array([largest, -largest, 0], dtype), output) is False
    assert output.tolist() == [0x7F7F, 0xFF7F, 0]
    quiet = np.array([0x7FFFFFFF], np.uint32).view(np.float32)
    assert getattr(loops, name)(quiet.astype(dtype), output[:1]) is True and output[0] >= 0x7F80


def test_doubles_to_bfloats(loops: ModuleType) -> None:
    values = around_ties([*BFLOAT_PATTERNS, *TINY_PATTERNS])
    values += [math.nextafter(value, limit) for value in values for limit in (-math.inf, math.inf) if value]
    output = np.zeros(len(values), np.uint16)
    assert loops.round_to_bfloats(np.array(values), output) is False
    check_bfloats(values, output)


def test_doubles_to_singles(loops: ModuleType) -> None:
    values = [*NEAR_TIES, *(-value for value in NEAR_TIES), 3.4028234663852886e38]
    output = np.zeros(len(values), np.uint32)
    assert loops.round_to_singles(np.array(values), output) is False
    assert output.view(np.float32).tolist() == [
        float(round_fraction(Fraction(one), FORMATS["F32"]) or 0) for one in values
    ]
    for bad in (3.5e38, -3.5e38, np.inf, -np.inf, np.nan):
        assert loops.round_to_singles(np.array([1.0, bad, 1.0]), output[:3]) is True


TYPES = [("HALF", "F16", np.uint16), ("BFLOAT", "BF16", np.uint16), ("SINGLE", "F32", np.uint32)]


def as_float(bits: np.ndarray, kind: str) -> list[float]:
    if kind == "BF16":
        return [value_of_bfloat(pattern) for pattern in bits.tolist()]
    return bits.view(np.float16 if kind == "F16" else np.float32).astype(float).tolist()


@pytest.mark.parametrize(("name", "kind", "dtype"), TYPES)
def test_quotients_of_sums(loops: ModuleType, name: str, kind: str, dtype: type) -> None:
    sums = [1.0, -3.0, 10.0, 0.3, 5 * (1 + 2.0**-11), 5 * (1 + 2.0**-8), 0.0]
    for denominator in (1.0, 5.0, 4.0):
        total = np.array(sums)
        output: np.ndarray = np.zeros(len(sums), dtype)
        bad = loops.round_quotients(total, denominator, getattr(loops, name), np.empty(len(sums), np.float32), output)
        wanted = [float(round_fraction(Fraction(one / denominator), FORMATS[kind]) or 0) for one in sums]
        assert bad is False and as_float(output, kind) == wanted
    assert loops.round_quotients(
        np.array([1.0, np.inf]), 1.0, getattr(loops, name), np.empty(2, np.float32), np.zeros(2, dtype)
    )


@pytest.mark.parametrize(("name", "kind", "dtype"), TYPES)
def test_whether_both_ends_round_alike(loops: ModuleType, name: str, kind: str, dtype: type) -> None:
    unit = float(Fraction(2) ** -FORMATS[kind].fraction_bits)
    room: tuple[Any, ...] = getattr(loops, name), np.empty(2, np.float32), np.zeros(2, dtype)
    assert loops.round_alike(1 + unit / 4, unit / 8, *room) is True
    assert loops.round_alike(1 + unit / 2 - unit / 16, unit / 8, *room) is False
    assert loops.round_alike(1 + unit / 2 + unit / 16, unit / 8, *room) is False
    assert loops.round_alike(1.0, 0.0, *room) is True


def combine(
    loops: ModuleType,
    rows: list[list[float]],
    kind: str,
    numerators: list[float],
    denominator: float,
    limit: float,
    to: str,
) -> tuple[list[float], list[int], bool]:
    """Outputs, doubtful places and whether one is not finite; inputs of one 16-bit kind, or float32."""
    codes = {"F16": loops.HALF, "BF16": loops.BFLOAT, "F32": loops.SINGLE}
    size = len(rows[0])
    encode = {"F16": halves, "BF16": bfloats, "F32": lambda *values: floats(*values).view(np.uint32)}[kind]
    bits = np.stack([encode(*row) for row in rows])
    empty = np.empty((0, size), np.uint32)
    half, single = (np.empty((0, size), np.uint16), bits) if kind == "F32" else (bits, empty)
    output = np.zeros(size, np.uint32 if to == "F32" else np.uint16)
    doubtful = np.full(size, -1, np.int64)
    doubts, bad = loops.combine(
        half, np.full(len(half), codes[kind]), single, *NO_PRODUCT,
        np.array(numerators, float), denominator, limit, codes[to], output, doubtful,
    )  # fmt: skip
    assert (doubtful[doubts:] == -1).all()
    return as_float(output, to), doubtful[:doubts].tolist(), bad


def exact(rows: list[list[float]], numerators: list[float], denominator: float, to: str) -> list[float]:
    return [
        float(
            round_fraction(
                sum(
                    (Fraction(weight) * Fraction(value) for weight, value in zip(numerators, column, strict=True)),
                    Fraction(0),
                )
                / Fraction(denominator),
                FORMATS[to],
            )
            or 0
        )
        for column in zip(*rows, strict=True)
    ]


SUMS = [
    ([5.0, 8.0, -8.0, 5.0], 10.0), ([1.0, 1.0], 1.0), ([1.0, -1.0], 1.0), ([-1.0, 1.0], 1.0), ([1.0, 1.0], 2.0),
    ([1.0, 2.0], 1.0), ([2.0, 1.0], 3.0), ([1.0, 1.0, 1.0], 1.0), ([3.0], 4.0),
]  # fmt: skip


@pytest.mark.parametrize("to", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("tile", [1, 3, 2048])
def test_combinations_are_exact_on_every_tile(
    loops: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, to: str, tile: int
) -> None:
    monkeypatch.setattr(loops, "TILE_ELEMENTS", tile)
    rows = [[0.5, -1.5, 3.0, 0.0, 2.0**-8, 1.0, 7.0], [1.0, 2.0**-9, -3.0, 0.0, 0.75, 2.0**-12, 0.25],
            [0.5, 1.0, 2.0, -0.125, 1.0, 3.0, 1.0], [1.0, 1.0, 0.5, 4.0, -1.0, 2.0**-7, 9.0]]  # fmt: skip
    for numerators, denominator in SUMS:
        chosen = rows[: len(numerators)]
        found, doubtful, bad = combine(loops, chosen, kind, numerators, denominator, 0.0, to)
        assert found == exact(chosen, numerators, denominator, to), (numerators, denominator)
        assert (doubtful, bad) == ([], False)


@pytest.mark.parametrize("to", ["F16", "BF16", "F32"])
def test_faults_on_any_tile_are_seen(loops: ModuleType, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    monkeypatch.setattr(loops, "TILE_ELEMENTS", 2)
    kind = "F16" if to == "F16" else "BF16"
    for place in range(5):
        for numerators in ([1.0, 1.0], [1.0, 2.0]):
            rows = [[1.0] * 5, [1.0] * 5]
            assert combine(loops, rows, kind, numerators, 1.0, 0.0, to)[2] is False
            rows[1][place] = math.inf
            assert combine(loops, rows, kind, numerators, 1.0, 0.0, to)[2] is True


def test_sums_that_may_be_inexact_are_doubtful(loops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum a little beside a tie, by less than float64 can tell, and sums that no error could move."""
    monkeypatch.setattr(loops, "TILE_ELEMENTS", 3)
    tie = 1 + 2.0**-11
    rows = [[1.0, tie, tie, 1.0, tie, tie, 1.0], [2.0**-60, 2.0**-60, 0.0, 0.0, 1.0, -(2.0**-60), 2.0**-11]]
    found, doubtful, bad = combine(loops, rows, "F32", [1.0, 1.0], 1.0, 2.0**20, "F16")
    assert (doubtful, bad) == ([], False)  # a pair is exact
    assert found == exact(rows, [1.0, 1.0], 1.0, "F16")
    rows.append([0.0] * 7)
    _, doubtful, bad = combine(loops, rows, "F32", [1.0, 1.0, 1.0], 1.0, 2.0**20, "F16")
    assert (doubtful, bad) == ([1, 5], False)
    assert combine(loops, rows, "F32", [1.0, 1.0, 1.0], 1.0, 2.0**62, "F16")[1] == []
    assert combine(loops, rows, "F32", [1.0, 1.0, 1.0], 1.0, 0.0, "F16")[1] == []
    assert combine(loops, rows, "F32", [1.0, 2.0, 1.0], 1.0, 2.0**20, "F16")[1] == [1, 5]


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("denominator", [1.0, 2.0])
def test_the_error_that_is_allowed_for(loops: ModuleType, denominator: float, scale: float) -> None:
    """(inputs + 4) units of float64 times the largest input and each numerator: 21 for three ones."""
    for units, wanted in ((0, []), (1, [0]), (20, [0]), (22, []), (60, [])):
        rows = [[scale], [scale * 2.0**-11], [scale * units * 2.0**-52]]
        assert combine(loops, rows, "F32", [1.0, 1.0, 1.0], denominator, 2.0**20, "F16")[1] == wanted, units


def test_the_error_of_four_inputs(loops: ModuleType) -> None:
    for units, wanted in ((31, [0]), (34, [])):
        rows = [[1.0], [2.0**-11], [units * 2.0**-52], [0.0]]
        assert combine(loops, rows, "F32", [1.0] * 4, 1.0, 2.0**20, "F16")[1] == wanted, units


def test_loops_are_compiled_and_kept() -> None:
    if numba.config.DISABLE_JIT:
        pytest.skip("numba does not compile here")
    combine: Any = compiled_loops.combine
    assert combine.targetoptions["nogil"] and combine.targetoptions["error_model"] == "numpy"
    assert "NullCache" not in type(combine._cache).__name__
