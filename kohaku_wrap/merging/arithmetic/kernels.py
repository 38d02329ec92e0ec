"""Exact sums over chunks of tensors: compiled loops for all elements, a careful way for the few they cannot vouch for.

The loops add whole-number multiples of the inputs in float64 and divide once. That is exact, with one rounding to
the output's type, wherever the inputs of an element are of like size, and always for float16 inputs and for sums
and differences of two; the loops name the elements that could have come out wrong, and there sum_exactly decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kohaku_wrap.merging.arithmetic.loops import BFLOAT, HALF, SINGLE, combine
from kohaku_wrap.merging.arithmetic.rounding import FORMATS, Combination, FloatFormat, sum_exactly

CODES = {"F16": HALF, "BF16": BFLOAT, "F32": SINGLE}
BITS_DTYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
DOUBLE_PRECISION = 53
ALWAYS_EXACT_WEIGHT = 1 << 12

Bits = NDArray[Any]


@dataclass
class Scratch:
    """The buffers of one thread, made once and used for every chunk."""

    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Flat buffers of bytes by purpose."""

    def take(self, purpose: str, dtype: Any, elements: int) -> NDArray[Any]:
        """A flat buffer of `elements`; the same memory for the same purpose every time."""
        width = np.dtype(dtype).itemsize
        held = self.arrays.get(purpose)
        if held is None or held.nbytes < elements * width:
            held = self.arrays[purpose] = np.empty(elements * width, dtype=np.uint8)
        return held[: elements * width].view(dtype)


def loops_are_compiled() -> bool:
    """Whether this installation has the loops as machine code already; compiling them takes some ten seconds."""
    loop: Any = combine
    folder = Path(loop.stats.cache_path or "")
    return any(folder.glob(f"*.combine-{loop.py_func.__code__.co_firstlineno}.*.nbi"))


def list_floats8() -> NDArray[np.float32]:
    """What the 256 patterns of float8 E4M3 (without infinities) stand for."""
    codes = np.arange(128)
    exponent, fraction = codes >> 3, codes & 7
    numbers = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10))
    numbers[127] = np.nan
    return np.concatenate([numbers, -numbers]).astype(np.float32)


FLOATS8 = list_floats8()


def widen_bytes(bits: NDArray[np.uint8], kind: FloatFormat) -> NDArray[np.uint16]:
    """Patterns of float8 as those of float16, which holds every one of them."""
    if kind.name == "F8_E5M2":
        return bits.astype(np.uint16) << np.uint16(8)
    return FLOATS8.astype(np.float16).view(np.uint16)[bits]


def as_numbers(bits: Bits, kind: FloatFormat) -> NDArray[Any]:
    """The numbers that raw bits stand for: float64 for F64; float32 holds all others."""
    if kind.name == "F64":
        return bits.view(np.float64)
    if kind.size_bytes == 1:
        return widen_bytes(bits, kind).view(np.float16).astype(np.float32)
    if kind.name == "F16":
        return bits.view(np.float16).astype(np.float32)
    if kind.name == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float32)


def as_bits(numbers: NDArray[Any], kind: FloatFormat) -> Bits:
    """The bits of numbers that the format holds exactly; an infinity that it lacks becomes NaN."""
    if kind.name == "F64":
        return numbers.view(np.uint64)
    if kind.name == "F8_E5M2":
        return (numbers.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8)
    if kind.name == "F8_E4M3":
        sizes: Bits = np.searchsorted(FLOATS8[:127], np.abs(numbers)).astype(np.uint8)
        signs: Bits = np.signbit(numbers).astype(np.uint8) << np.uint8(7)
        return np.bitwise_or(sizes, signs)
    if kind.name == "F16":
        return numbers.astype(np.float16).view(np.uint16)
    if kind.name == "BF16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return numbers.view(np.uint32)


def infinity_bits(kind: FloatFormat) -> int:
    """The bits of +infinity; magnitudes from here on are not finite."""
    return {
        "F8_E4M3": 0x7F, "F8_E5M2": 0x7C, "F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0 << 48,
    }[kind.name]  # fmt: skip


@dataclass(frozen=True)
class Product:
    """Rows of a Kronecker product, made as they are added: each row of `inner` times each number of `outer`."""

    outer: NDArray[np.float32]
    """(columns,)"""

    inner: NDArray[np.float32]
    """(rows, width)"""

    def at(self, places: NDArray[Any]) -> NDArray[np.float32]:
        """The numbers at flat places."""
        repeats, columns = np.divmod(places, self.inner.shape[1])
        rows, outer = np.divmod(repeats, self.outer.size)
        return np.asarray(self.outer[outer] * self.inner[rows, columns])


NO_PRODUCT = Product(np.empty(0, np.float32), np.empty((0, 0), np.float32))


@dataclass(frozen=True)
class Inputs:
    """The buffers that a chunk's inputs are read into, those of one width side by side, and what is made of factors."""

    halves: NDArray[np.uint16]
    """The 16-bit inputs: (inputs, elements)."""

    singles: NDArray[np.uint32]
    """The 32-bit inputs: (inputs, elements)."""

    rows: list[Bits]
    """The row of each input, in the order of the kernel's types."""

    product: Product | None
    """The input after those, if there is one; its type is F32."""

    def numbers_at(self, places: NDArray[Any], kinds: Sequence[FloatFormat]) -> list[NDArray[np.float32]]:
        """The numbers of every input at `places`."""
        numbers = [as_numbers(bits[places], kind) for bits, kind in zip(self.rows, kinds, strict=False)]
        return numbers if self.product is None else [*numbers, self.product.at(places)]


class Kernel:
    """Computes one combination for inputs and an output of given types."""

    def __init__(self, kinds: Sequence[str], sum_of: Combination, to: str, has_product: bool = False) -> None:
        """`kinds` and `to` are dtypes as headers spell them, `kinds` without float8; that of a product comes last."""
        self.kinds = [FORMATS[kind] for kind in kinds]
        self.sum_of = sum_of
        self.to = FORMATS[to]
        self.widths = [kind.size_bytes for kind in self.kinds[: len(kinds) - has_product]]
        order = sorted(range(len(kinds)), key=lambda place: [*self.widths, math.inf][place])
        halves = [place for place in order if place < len(self.widths) and self.widths[place] == 2]
        self.half_kinds = np.array([CODES[self.kinds[place].name] for place in halves], dtype=np.int64)
        self.numerators = np.array([float(sum_of.numerators[place]) for place in order])
        self.is_copy = (
            sum_of.numerators == (1,) and sum_of.denominator == 1 and self.kinds[0] == self.to and not has_product
        )

    @property
    def is_usable(self) -> bool:
        """Whether products are exact in float64, and no quotient can fall on a tie of the output that it is not.

        The compiled loops know 16 and 32 bits.
        """
        if self.to.name not in CODES or 8 in self.widths:
            return False
        precision = max(kind.precision for kind in self.kinds)
        largest = max(abs(numerator) for numerator in self.sum_of.numerators)
        products = largest.bit_length() + precision <= DOUBLE_PRECISION
        return products and self.sum_of.denominator < 1 << (DOUBLE_PRECISION - 2 - self.to.precision)

    @property
    def spread_limit(self) -> float:
        """How many times the smallest input of an element the largest may be for an exact sum; 0: no limit.

        All inputs are whole multiples of 2**-precision of the smallest, and float64 adds whole numbers below 2**53
        exactly. Halves are multiples of 2**-24 below 2**16, 40 bits, which leaves 12 for the numerators.
        """
        if self.sum_of.weight <= ALWAYS_EXACT_WEIGHT and all(kind.name == "F16" for kind in self.kinds):
            return 0.0
        precision = max(kind.precision for kind in self.kinds)
        return float(2.0 ** (DOUBLE_PRECISION - 1 - precision) / (self.sum_of.weight or 1))

    def take_inputs(self, elements: int, scratch: Scratch, product: Product | None = None) -> Inputs:
        """Buffers for the inputs of a chunk."""
        arrays = {}
        for width in (2, 4, 8):
            shape = (self.widths.count(width), elements)
            arrays[width] = scratch.take(f"inputs of {width}", BITS_DTYPES[width], shape[0] * elements).reshape(shape)
        rows_left = {width: iter(array) for width, array in arrays.items()}
        rows = [next(rows_left[width]) for width in self.widths]
        return Inputs(arrays[2], arrays[4], rows, product)

    def run(self, inputs: Inputs, output: Bits, scratch: Scratch) -> tuple[NDArray[Any], NDArray[Any]]:
        """Fill `output` and return the places where an input is not finite, and where a finite sum overflows.

        `output`: flat array of bits (uint16 or uint32).
        """
        if self.is_copy:
            np.copyto(output, inputs.rows[0])
            places = self.find_not_finite(output)
            return places, places[:0]
        if not self.is_usable:
            self.settle(inputs, output, np.arange(output.size))
            return self.find_faults(inputs, output)
        doubtful = scratch.take("doubtful", np.int64, output.size)
        product = inputs.product or NO_PRODUCT
        doubts, has_faults = combine(
            inputs.halves,
            self.half_kinds,
            inputs.singles,
            product.outer,
            product.inner,
            self.numerators,
            float(self.sum_of.denominator),
            self.spread_limit,
            CODES[self.to.name],
            output,
            doubtful,
        )
        if doubts:
            self.settle(inputs, output, doubtful[:doubts])
            has_faults |= bool(self.find_not_finite(output[doubtful[:doubts]]).size)
        return self.find_faults(inputs, output) if has_faults else (doubtful[:0], doubtful[:0])

    def settle(self, inputs: Inputs, output: Bits, places: NDArray[Any]) -> None:
        """Compute the elements at `places` carefully."""
        if not places.size:
            return
        numbers = inputs.numbers_at(places, self.kinds)
        output[places] = as_bits(sum_exactly(numbers, self.kinds, self.sum_of, self.to), self.to)

    def find_not_finite(self, output: Bits) -> NDArray[Any]:
        """Places of infinities and NaN among bits of the output's type."""
        magnitudes = output & output.dtype.type((1 << (8 * self.to.size_bytes - 1)) - 1)
        return np.flatnonzero(magnitudes >= infinity_bits(self.to))

    def find_faults(self, inputs: Inputs, output: Bits) -> tuple[NDArray[Any], NDArray[Any]]:
        """Places of non-finite inputs and of overflow, read off the output; doubtful overflow is settled first."""
        places = self.find_not_finite(output)
        self.settle(inputs, output, places)
        still = places[self.find_not_finite(output[places])]
        from_input = np.zeros(still.size, dtype=bool)
        for numbers in inputs.numbers_at(still, self.kinds):
            from_input |= ~np.isfinite(numbers)
        return still[from_input], still[~from_input]
