"""The loops over elements, compiled by numba: sums in float64, rounded once to the output's type.

They work on tiles that stay in the processor's cache, let other threads run meanwhile, and are kept on disk, so
that only the first merge of an installation waits for the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

TILE_ELEMENTS = 2048
SAFETY = 4
HALF, BFLOAT, SINGLE = 0, 1, 2
BELOW_SINGLE = (1 << 29) - 1
MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)
INFINITY_BITS = np.uint32(0x7F800000)
ONE = np.uint32(1)
SIGN_SHIFT = np.uint32(31)
HALF_SHIFT = np.uint32(16)
HALF_MAGNITUDE = np.uint16(0x7FFF)
HALF_SIGN = np.uint32(0x8000)
BELOW_HALF_UNIT = np.uint32(0x7FFF)
EXPONENT_BITS = 0x7FF0000000000000
FRACTION_BITS = 0x000FFFFFFFFFFFFF
BFLOAT_UNIT = 2.0**-7
SMALLEST_BFLOAT = 2.0**-133
ROUNDING = 1.5 * 2.0**52

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """The function as machine code; kept on disk where there is a place to keep it."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return cast(Function, njit(cache=True, **options)(function))
    except RuntimeError:  # no folder to keep it in can be written to
        return cast(Function, njit(**options)(function))


def generate_widening(context: Any, bits: Any) -> Any:
    """The instruction that turns the bits of a float16 into a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


def generate_narrowing(context: Any, value: Any) -> Any:
    """The instruction that rounds a float32 to a float16 and gives its bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


widen_half = intrinsic(generate_widening)
narrow_to_half = intrinsic(generate_narrowing)


@compiled
def widen(bits: NDArray[Any], kind: int, wide: NDArray[Any]) -> None:
    """16-bit patterns as float32, which holds every one of them."""
    if kind == HALF:
        for place in range(bits.size):
            wide[place] = widen_half(bits[place])
    else:
        for place in range(bits.size):
            wide[place] = np.uint32(np.uint32(bits[place]) << np.uint32(16)).view(np.float32)


@compiled
def fill_kronecker(outer: NDArray[Any], inner: NDArray[Any], first: int, output: NDArray[Any]) -> None:
    """Rows of a Kronecker product from flat element `first` on: each row of `inner` times each number of `outer`."""
    width = inner.shape[1]
    repeat, start = divmod(first, width)
    place = 0
    while place < output.size:
        row, column = divmod(repeat, outer.size)
        count = min(width - start, output.size - place)
        factor, numbers, target = outer[column], inner[row, start : start + count], output[place : place + count]
        for step in range(count):
            target[step] = factor * numbers[step]
        place += count
        repeat += 1
        start = 0


@compiled
def load_row(
    halves: NDArray[Any],
    half_kinds: NDArray[Any],
    singles: NDArray[Any],
    outer: NDArray[Any],
    inner: NDArray[Any],
    row: int,
    first: int,
    buffer: NDArray[Any],
) -> NDArray[Any]:
    """One input from element `first` on as float32, in `buffer` or where it lies: `halves`, `singles`, the product."""
    last = first + buffer.size
    if row < len(halves):
        widen(halves[row, first:last], half_kinds[row], buffer)
        return buffer
    if row < len(halves) + len(singles):
        values: NDArray[Any] = singles[row - len(halves), first:last].view(np.float32)
        return values
    fill_kronecker(outer, inner, first, buffer)
    return buffer


@compiled
def add_term(values: NDArray[Any], numerator: float, total: NDArray[Any]) -> None:
    """total += numerator x values."""
    for place in range(values.size):
        total[place] += numerator * np.float64(values[place])


@compiled
def note_sizes(patterns: NDArray[Any], largest: NDArray[Any], smallest: NDArray[Any]) -> None:
    """Keep the largest magnitude, and the smallest above 0 less 1: as bits of float32, whose order is that of sizes."""
    for place in range(patterns.size):
        magnitude = patterns[place] & MAGNITUDE_BITS
        largest[place] = max(largest[place], magnitude)
        smallest[place] = min(smallest[place], np.uint32(magnitude - ONE))


@compiled
def count_wide_spreads(largest: NDArray[Any], smallest: NDArray[Any], limit: float) -> int:
    """How many elements have inputs whose sizes lie further apart than `limit`."""
    count = 0
    for place in range(largest.size):
        low = np.float64(np.uint32(smallest[place] + ONE).view(np.float32))
        count += int(np.float64(np.uint32(largest[place]).view(np.float32)) > low * limit)
    return count


@compiled
def is_power_of_two(value: float) -> bool:
    """Whether to divide by it is to multiply by its inverse, exactly."""
    return bool(np.float64(1.0 / value).view(np.int64) & FRACTION_BITS == 0)


@compiled
def divide(total: NDArray[Any], denominator: float) -> None:
    """total /= denominator; by a product, several times faster, where that is the same number."""
    if denominator == 1.0:
        return
    if is_power_of_two(denominator):
        inverse = 1.0 / denominator
        for place in range(total.size):
            total[place] *= inverse
    else:
        for place in range(total.size):
            total[place] /= denominator


@compiled
def cut_to_odd(values: NDArray[Any], output: NDArray[Any]) -> None:
    """float64 cut to float32, the last bit set where something was cut off: rounded to odd.

    Rounding such a number to half its bits is rounding what it stands for (Boldo and Melquiond, "Emulation of a FMA
    and correctly rounded sums", 2008).
    """
    for place in range(output.size):
        bits = np.float64(values[place]).view(np.int64)
        odd = np.int64((((bits & BELOW_SINGLE) + BELOW_SINGLE) | bits) & ~BELOW_SINGLE)
        output[place] = np.float32(odd.view(np.float64))


@compiled
def add_to_odd(left: NDArray[Any], right: NDArray[Any], left_sign: Any, right_sign: Any, output: NDArray[Any]) -> None:
    """Sums or differences of float32, rounded to odd; the error of an addition is found as by Knuth."""
    for place in range(output.size):
        first, second = left[place] * left_sign, right[place] * right_sign
        value = np.float32(first + second)
        back = np.float32(value - first)
        error = np.float32(np.float32(first - np.float32(value - back)) + np.float32(second - back))
        bits, error_bits = value.view(np.uint32), error.view(np.uint32)
        lost = np.uint32(min(np.uint32(error_bits & MAGNITUDE_BITS), ONE))
        toward_zero = np.uint32(np.uint32(error_bits ^ bits) >> SIGN_SHIFT)
        output[place] = np.uint32(np.uint32(bits - np.uint32(lost & toward_zero)) | lost).view(np.float32)


@compiled
def round_odd_to_halves(values: NDArray[Any], output: NDArray[Any]) -> bool:
    """float32 that were rounded to odd as float16, and whether one is not finite."""
    largest = np.uint16(0)
    for place in range(output.size):
        pattern = narrow_to_half(values[place])
        largest = max(largest, np.uint16(pattern & HALF_MAGNITUDE))
        output[place] = pattern
    return bool(largest >= 0x7C00)


@compiled
def round_odd_to_bfloats(values: NDArray[Any], output: NDArray[Any]) -> bool:
    """float32 that were rounded to odd as bfloat16, ties to even, and whether one is not finite."""
    largest = np.uint32(0)
    for place in range(output.size):
        bits = np.float32(values[place]).view(np.uint32)
        magnitude = np.uint32(min(np.uint32(bits & MAGNITUDE_BITS), INFINITY_BITS))
        even = np.uint32(np.uint32(magnitude >> HALF_SHIFT) & ONE)
        pattern = np.uint32(np.uint32(magnitude + BELOW_HALF_UNIT + even) >> HALF_SHIFT)
        largest = max(largest, pattern)
        output[place] = pattern | np.uint32(np.uint32(bits >> HALF_SHIFT) & HALF_SIGN)
    return bool(largest >= 0x7F80)


@compiled
def round_to_bfloats(values: NDArray[Any], output: NDArray[Any]) -> bool:
    """float64 as bfloat16, and whether one is not finite.

    Adding and taking away 1.5 x 2**52 units of the last place rounds to whole units, ties to even.
    """
    largest = np.int64(0)
    for place in range(output.size):
        value = np.float64(values[place])
        bits = value.view(np.int64)
        magnitude = abs(value)
        binade = np.int64(bits & EXPONENT_BITS).view(np.float64)
        shift = max(binade * BFLOAT_UNIT, SMALLEST_BFLOAT) * ROUNDING
        rounded = (magnitude + shift) - shift if magnitude < np.inf else magnitude
        pattern = np.int64(np.float32(rounded).view(np.uint32) >> HALF_SHIFT)
        largest = max(largest, pattern)
        output[place] = pattern | ((bits >> 48) & 0x8000)
    return bool(largest >= 0x7F80)


@compiled
def round_to_singles(values: NDArray[Any], output: NDArray[Any]) -> bool:
    """float64 as the bits of float32, and whether one is not finite."""
    largest = np.uint32(0)
    for place in range(output.size):
        pattern = np.float32(values[place]).view(np.uint32)
        largest = max(largest, np.uint32(pattern & MAGNITUDE_BITS))
        output[place] = pattern
    return bool(largest >= INFINITY_BITS)


@compiled
def round_quotients(
    total: NDArray[Any], denominator: float, to: int, buffer: NDArray[Any], output: NDArray[Any]
) -> bool:
    """Turn sums into quotients, and those into bits of the type `to`; whether one is not finite.

    `buffer`: room for as many float32.
    """
    divide(total, denominator)
    if to == HALF:
        cut_to_odd(total, buffer)
        return bool(round_odd_to_halves(buffer, output))
    if to == BFLOAT:
        return bool(round_to_bfloats(total, output))
    return bool(round_to_singles(total, output))


@compiled
def round_alike(value: float, error: float, to: int, buffer: NDArray[Any], output: NDArray[Any]) -> bool:
    """Whether everything within `error` of a value rounds to the same number; `buffer`, `output`: room for two."""
    ends = np.array([value - error, value + error])
    round_quotients(ends, 1.0, to, buffer, output)
    return bool(output[0] == output[1])


@compiled
def combine(
    halves: NDArray[Any],
    half_kinds: NDArray[Any],
    singles: NDArray[Any],
    outer: NDArray[Any],
    inner: NDArray[Any],
    numerators: NDArray[Any],
    denominator: float,
    spread_limit: float,
    to: int,
    output: NDArray[Any],
    doubtful: NDArray[Any],
) -> tuple[int, bool]:
    """Fill `output` with sums of inputs, each times its numerator, over the denominator.

    `halves`: (inputs, elements) uint16, each row HALF or BFLOAT by `half_kinds`; `singles`: (inputs, elements)
    uint32, bits of float32; one more input is the product of `outer`, (columns,) float32, and `inner`, (rows, width)
    float32, if there are `numerators` for one input more. `output`: uint16 or uint32, bits of the type `to`.

    Sums and differences of two inputs are exact in 16 bits. Other sums of elements whose largest input is more than
    `spread_limit` times the smallest (0: no limit) may be inexact; where that could change the output, their places go
    into `doubtful`, (elements,) int64.
    Returns how many those are, and whether any output is not finite.
    """
    elements = output.size
    total = np.empty(TILE_ELEMENTS)
    # Loops whose arrays overlap would go number by number.
    buffer, other = np.empty(TILE_ELEMENTS, np.float32), np.empty(TILE_ELEMENTS, np.float32)
    sums = np.empty(TILE_ELEMENTS, np.float32)
    largest, smallest = np.empty(TILE_ELEMENTS, np.uint32), np.empty(TILE_ELEMENTS, np.uint32)
    error_unit = (numerators.size + SAFETY) * 2.0**-52 * np.abs(numerators).sum()
    is_pair = numerators.size == 2 and np.abs(numerators).max() == denominator == 1 and to != SINGLE
    pair = np.empty(2, output.dtype)
    doubts, has_faults = 0, False
    for first in range(0, elements, TILE_ELEMENTS):
        count = min(TILE_ELEMENTS, elements - first)
        last = first + count
        tile, high, low = total[:count], largest[:count], smallest[:count]
        if is_pair:
            left = load_row(halves, half_kinds, singles, outer, inner, 0, first, buffer[:count])
            right = load_row(halves, half_kinds, singles, outer, inner, 1, first, other[:count])
            add_to_odd(left, right, np.float32(numerators[0]), np.float32(numerators[1]), sums[:count])
            if to == HALF:
                has_faults |= round_odd_to_halves(sums[:count], output[first:last])
            else:
                has_faults |= round_odd_to_bfloats(sums[:count], output[first:last])
            continue
        tile[:] = 0.0
        high[:] = np.uint32(0)
        low[:] = np.uint32(0xFFFFFFFF)
        for row in range(numerators.size):
            values = load_row(halves, half_kinds, singles, outer, inner, row, first, buffer[:count])
            add_term(values, numerators[row], tile)
            if spread_limit:
                note_sizes(values.view(np.uint32), high, low)
        has_faults |= round_quotients(tile, denominator, to, buffer[:count], output[first:last])
        if spread_limit and count_wide_spreads(high, low, spread_limit):
            for place in range(count):
                if count_wide_spreads(high[place : place + 1], low[place : place + 1], spread_limit):
                    error = np.float64(np.uint32(high[place]).view(np.float32)) * error_unit
                    if not round_alike(tile[place], error / denominator, to, buffer[:2], pair):
                        doubtful[doubts] = first + place
                        doubts += 1
    return doubts, has_faults
