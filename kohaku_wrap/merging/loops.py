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
ONE = np.uint32(1)
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
def divide(total: NDArray[Any], denominator: float) -> None:
    """total /= denominator; by a product, several times faster, where that is the same number."""
    inverse = 1.0 / denominator
    if denominator == 1.0:
        return
    if np.float64(inverse).view(np.int64) & FRACTION_BITS == 0:
        for place in range(total.size):
            total[place] *= inverse
    else:
        for place in range(total.size):
            total[place] /= denominator


@compiled
def round_to_halves(values: NDArray[Any], output: NDArray[Any]) -> int:
    """Numbers as float16, and how many are not finite.

    The float64 is cut to what float32 holds, with the last bit set where something was cut off: the rounding
    to 11 bits that follows is then the only one.
    """
    faults = 0
    for place in range(output.size):
        bits = np.float64(values[place]).view(np.int64)
        odd = np.int64((((bits & BELOW_SINGLE) + BELOW_SINGLE) | bits) & ~BELOW_SINGLE).view(np.float64)
        pattern = narrow_to_half(np.float32(odd))
        faults += int((pattern & 0x7FFF) >= 0x7C00)
        output[place] = pattern
    return faults


@compiled
def round_to_bfloats(values: NDArray[Any], output: NDArray[Any]) -> int:
    """Numbers as bfloat16, and how many are not finite.

    Adding and taking away 1.5 x 2**52 units of the last place rounds to whole units, ties to even.
    """
    faults = 0
    for place in range(output.size):
        value = np.float64(values[place])
        bits = value.view(np.int64)
        magnitude = abs(value)
        binade = np.int64(bits & EXPONENT_BITS).view(np.float64)
        shift = max(binade * BFLOAT_UNIT, SMALLEST_BFLOAT) * ROUNDING
        rounded = (magnitude + shift) - shift if magnitude < np.inf else magnitude
        pattern = np.int64(np.float32(rounded).view(np.uint32) >> np.uint32(16))
        faults += int(pattern >= 0x7F80)
        output[place] = pattern | ((bits >> 48) & 0x8000)
    return faults


@compiled
def round_to_singles(values: NDArray[Any], output: NDArray[Any]) -> int:
    """Numbers as the bits of float32, and how many are not finite."""
    faults = 0
    for place in range(output.size):
        pattern = np.float32(values[place]).view(np.uint32)
        faults += int((pattern & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F800000))
        output[place] = pattern
    return faults


@compiled
def round_quotients(total: NDArray[Any], denominator: float, to: int, output: NDArray[Any]) -> int:
    """Turn sums into quotients, and those into bits of the type `to`; how many are not finite."""
    divide(total, denominator)
    if to == HALF:
        return round_to_halves(total, output)
    if to == BFLOAT:
        return round_to_bfloats(total, output)
    return round_to_singles(total, output)


@compiled
def round_alike(value: float, error: float, to: int, output: NDArray[Any]) -> bool:
    """Whether everything within `error` of a value rounds to the same number; `output`: room for two."""
    ends = np.array([value - error, value + error])
    round_quotients(ends, 1.0, to, output)
    return bool(output[0] == output[1])


@compiled
def combine(
    halves: NDArray[Any],
    half_kinds: NDArray[Any],
    half_numerators: NDArray[Any],
    singles: NDArray[Any],
    single_numerators: NDArray[Any],
    denominator: float,
    spread_limit: float,
    to: int,
    output: NDArray[Any],
    doubtful: NDArray[Any],
) -> tuple[int, int]:
    """Fill `output` with sums of rows, each times its numerator, over the denominator.

    `halves`: (inputs, elements) uint16, each row HALF or BFLOAT by `half_kinds`; `singles`: (inputs, elements)
    uint32, bits of float32. `output`: uint16 or uint32, bits of the type `to`. Sums of elements whose largest input
    is more than `spread_limit` times the smallest (0: no limit) may be inexact; where that could change the output,
    their places go into `doubtful`, (elements,) int64.
    Returns how many those are, and how many outputs are not finite.
    """
    elements = output.size
    total, wide = np.empty(TILE_ELEMENTS), np.empty(TILE_ELEMENTS, np.float32)
    largest, smallest = np.empty(TILE_ELEMENTS, np.uint32), np.empty(TILE_ELEMENTS, np.uint32)
    weight = np.abs(half_numerators).sum() + np.abs(single_numerators).sum()
    error_unit = (len(halves) + len(singles) + SAFETY) * 2.0**-52 * weight
    pair = np.empty(2, output.dtype)
    doubts = faults = 0
    for first in range(0, elements, TILE_ELEMENTS):
        count = min(TILE_ELEMENTS, elements - first)
        last = first + count
        tile, high, low = total[:count], largest[:count], smallest[:count]
        tile[:] = 0.0
        high[:] = np.uint32(0)
        low[:] = np.uint32(0xFFFFFFFF)
        for row in range(len(halves)):
            widen(halves[row, first:last], half_kinds[row], wide[:count])
            add_term(wide[:count], half_numerators[row], tile)
            if spread_limit:
                note_sizes(wide[:count].view(np.uint32), high, low)
        for row in range(len(singles)):
            add_term(singles[row, first:last].view(np.float32), single_numerators[row], tile)
            if spread_limit:
                note_sizes(singles[row, first:last], high, low)
        faults += round_quotients(tile, denominator, to, output[first:last])
        if spread_limit and count_wide_spreads(high, low, spread_limit):
            for place in range(count):
                if count_wide_spreads(high[place : place + 1], low[place : place + 1], spread_limit):
                    error = np.float64(np.uint32(high[place]).view(np.float32)) * error_unit
                    if not round_alike(tile[place], error / denominator, to, pair):
                        doubtful[doubts] = first + place
                        doubts += 1
    return doubts, faults
