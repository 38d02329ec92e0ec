"""Exact sums of floating-point numbers, rounded once: slow and plain with integers, or for whole arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point type of IEEE 754's shape."""

    name: str
    """As a safetensors header spells it."""

    size_bytes: int
    """Of one element."""

    precision: int
    """Bits of the significand, the hidden one included."""

    unit_exponent: int
    """The smallest number above 0 is 2 to this power."""

    largest_exponent: int
    """All finite numbers lie below 2 to this power."""

    @property
    def fraction_bits(self) -> int:
        return self.precision - 1

    @property
    def largest(self) -> Fraction:
        """The largest finite number; the float8 that has no infinity ends one number earlier, with NaN after it."""
        if self.name == "F8_E4M3":
            return Fraction(448)
        return Fraction(2**self.precision - 1) * Fraction(2) ** (self.largest_exponent - self.precision)


FORMATS = {
    "F16": FloatFormat("F16", 2, 11, -24, 16),
    "BF16": FloatFormat("BF16", 2, 8, -133, 128),
    "F32": FloatFormat("F32", 4, 24, -149, 128),
    "F64": FloatFormat("F64", 8, 53, -1074, 1024),
    "F8_E4M3": FloatFormat("F8_E4M3", 1, 4, -9, 9),
    "F8_E5M2": FloatFormat("F8_E5M2", 1, 3, -16, 16),
}


def round_fraction(value: Fraction, to: FloatFormat) -> Fraction | None:
    """`value` rounded once to the nearest number of the format, ties to even; None where that is infinite."""
    if not value:
        return value
    numerator, denominator = abs(value.numerator), value.denominator
    exponent = numerator.bit_length() - denominator.bit_length()
    if Fraction(numerator, denominator) < Fraction(2) ** exponent:
        exponent -= 1
    unit = max(exponent - to.fraction_bits, to.unit_exponent)
    if unit >= 0:
        denominator <<= unit
    else:
        numerator <<= -unit
    count, rest = divmod(numerator, denominator)
    if 2 * rest > denominator or (2 * rest == denominator and count % 2):
        count += 1
    rounded = Fraction(count) * Fraction(2) ** unit
    if rounded > to.largest:
        return None
    return rounded if value > 0 else -rounded


@dataclass(frozen=True)
class Combination:
    """A sum of inputs with rational coefficients, over one denominator."""

    numerators: tuple[int, ...]
    """One whole number for each input."""

    denominator: int
    """Above 0."""

    @classmethod
    def of(cls, coefficients: Sequence[Fraction]) -> Combination:
        """The coefficients over their least common denominator."""
        denominator = math.lcm(*(coefficient.denominator for coefficient in coefficients))
        numerators = tuple(int(coefficient * denominator) for coefficient in coefficients)
        return cls(numerators, denominator)

    @property
    def weight(self) -> int:
        """The sum of the numerators' sizes."""
        return sum(abs(numerator) for numerator in self.numerators)

    def exact(self, values: Sequence[float]) -> Fraction:
        """The sum in rationals."""
        parts = (numerator * Fraction(value) for numerator, value in zip(self.numerators, values, strict=True))
        return sum(parts, Fraction(0)) / self.denominator


def narrow_to_odd(values: Array) -> Array:
    """float64 to float32, with the last bit set where the value was not exact.

    A further rounding to 22 bits or fewer then gives the same as one rounding of the float64. Numbers
    that float32 holds only as subnormal are not covered.
    """
    bits = np.ascontiguousarray(values).view(np.int64)
    low = np.int64((1 << 29) - 1)
    sticky = ((bits & low) + low) | bits
    odd: Array = (sticky & ~low).view(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        return odd.astype(np.float32)


def round_array(values: Array, to: FloatFormat) -> Array:
    """float64 values rounded once to the format (not F64), given as float32 (which holds every result).

    Source for the halves of bfloat16: round to nearest even on the upper 16 bits of a float32.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if to.name == "F32":
            return values.astype(np.float32)
        if to.name == "F16":
            return values.astype(np.float16).astype(np.float32)
        if to.size_bytes == 1:
            _, exponent = np.frexp(values)
            unit = np.maximum(exponent - to.precision, to.unit_exponent)
            short: Array = np.ldexp(np.rint(np.ldexp(values, -unit)), unit)
            short[np.abs(short) > float(to.largest)] *= np.inf
            return short.astype(np.float32)
        odd = narrow_to_odd(values)
        bits = odd.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
        return np.where(np.isfinite(odd), rounded, odd).astype(np.float32)


SAFETY = 4
TINY_OF_FLOAT32 = 2.0**-125


def sum_exactly(inputs: Sequence[Array], units: Sequence[FloatFormat], sum_of: Combination, to: FloatFormat) -> Array:
    """Each element of the combination, as exact rational arithmetic rounded once gives it; float32, for F64 float64.

    `inputs`: float32 or float64 arrays of one length, each holding numbers of the format at the same place in `units`.
    Non-finite inputs give what float64 arithmetic gives.

    Three ways, each for the elements that the one before cannot vouch for: float64 where every product, sum
    and quotient is exact or rounds only once; float64 with a bound on its error where both ends of the bound
    round alike; integers.
    """
    with np.errstate(all="ignore"):
        values = [array.astype(np.float64) for array in inputs]
        if to.name == "F64":
            return sum_in_doubles(values, sum_of)
        approximate, error, certain = sum_with_bound(values, units, sum_of, to)
        rounded = round_array(approximate, to)
        tiny = np.zeros(certain.shape, dtype=bool)
        if to.name == "BF16":
            tiny = np.abs(approximate) < TINY_OF_FLOAT32
            certain &= ~tiny | (approximate == 0)
        if certain.all():
            return rounded
        finite = np.isfinite(approximate)
        lower, upper = round_array(approximate - error, to), round_array(approximate + error, to)
        lower[tiny] = np.nan
        doubtful = np.flatnonzero(finite & ~certain & ~(lower == upper))
    settle_in_rationals(rounded, doubtful, values, sum_of, to)
    return rounded


def settle_in_rationals(
    rounded: Array, doubtful: Array, values: Sequence[Array], sum_of: Combination, to: FloatFormat
) -> None:
    """Write what rational arithmetic gives at the places that are in doubt."""
    for place in doubtful:
        total = sum_of.exact([float(array[place]) for array in values])
        exact = round_fraction(total, to)
        rounded[place] = (np.inf if total > 0 else -np.inf) if exact is None else float(exact)


def sum_in_doubles(values: Sequence[Array], sum_of: Combination) -> Array:
    """As sum_exactly, for float64 results: in the processor's longer numbers where both ends of the error round alike.

    Where those are no longer than float64, all is done in rationals.
    """
    total, size = np.zeros(values[0].shape, np.longdouble), np.zeros(values[0].shape, np.longdouble)
    for numerator, array in zip(sum_of.numerators, values, strict=True):
        term = np.longdouble(numerator) * array.astype(np.longdouble)
        total, size = total + term, size + np.abs(term)
    known = max(sum_of.weight, sum_of.denominator) < 1 << 53
    total, size = total / np.longdouble(sum_of.denominator), size / np.longdouble(sum_of.denominator)
    error = size * ((len(values) + SAFETY) * np.finfo(np.longdouble).eps)
    rounded, below, above = (each.astype(np.float64) for each in (total, total - error, total + error))
    doubtful = np.isfinite(total) & ~((below == above) & known)
    settle_in_rationals(rounded, np.flatnonzero(doubtful), values, sum_of, FORMATS["F64"])
    return rounded


def sum_with_bound(
    values: Sequence[Array], units: Sequence[FloatFormat], sum_of: Combination, to: FloatFormat
) -> tuple[Array, Array, Array]:
    """The float64 sum, a bound on its error, and where a single rounding of it is known to be right.

    It is right where every input is a multiple of one unit so coarse that all partial sums are whole numbers
    of it below 2**52, and the denominator is too small for the quotient to fall on a tie that it is not.
    """
    size = np.zeros_like(values[0])
    if sum_of.denominator < 1 << (51 - to.precision) and sum_of.weight < 1 << 28:
        total = np.zeros_like(values[0])
        unit = np.full_like(values[0], np.inf)
        for numerator, array, kind in zip(sum_of.numerators, values, units, strict=True):
            total += float(numerator) * array
            magnitude = np.abs(array)
            size += float(abs(numerator)) * magnitude
            coarse = np.maximum(magnitude * 2.0**-kind.precision, 2.0**kind.unit_exponent)
            unit = np.minimum(unit, np.where(magnitude == 0, np.inf, coarse))
        certain = ~(size > unit * 2.0**52)
        total /= sum_of.denominator
        size /= sum_of.denominator
    else:
        total = np.zeros_like(values[0])
        certain = np.zeros(total.shape, dtype=bool)
        for numerator, array in zip(sum_of.numerators, values, strict=True):
            factor = float(Fraction(numerator, sum_of.denominator))
            total += factor * array
            size += abs(factor) * np.abs(array)
    error = size * ((len(values) + SAFETY) * 2.0**-52)
    return total, error, certain
