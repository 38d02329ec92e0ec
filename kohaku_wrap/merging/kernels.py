"""Exact sums over chunks of tensors: a fast pass for all elements, a careful one for the few it cannot vouch for.

The fast pass computes with whole-number coefficients over one denominator, in float32 for 16-bit inputs and in
float64 for others. It is exact, with one rounding, wherever the inputs of an element are of like size; the bits
of the inputs show where they are not, and there sum_exactly decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kohaku_wrap.merging.rounding import FORMATS, Combination, FloatFormat, narrow_to_odd, sum_exactly

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
BITS_DTYPES = {2: np.uint16, 4: np.uint32}
BINADE_SLACK = 0.1
EXACT_SCALES = frozenset(2.0**power for power in range(-8, 9))
TINY_OF_BFLOAT16 = 2.0**-125
SMALLEST_NORMAL_OF_HALF = 2.0**-14

Bits = NDArray[Any]


@dataclass
class Scratch:
    """The buffers of one thread, made once and used for every chunk."""

    elements: int
    """The longest chunk."""

    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Flat buffers by purpose."""

    def take(self, purpose: str, dtype: Any, elements: int) -> NDArray[Any]:
        """A flat buffer of `elements`; the same memory for the same purpose every time."""
        width = np.dtype(dtype).itemsize
        held = self.arrays.get(purpose)
        if held is None or held.nbytes < elements * width:
            held = self.arrays[purpose] = np.empty(max(elements, self.elements) * width, dtype=np.uint8)
        return held[: elements * width].view(dtype)

    def tensor(self, purpose: str, dtype: Any, elements: int) -> torch.Tensor:
        """The same as take, as a torch tensor over the same memory."""
        return torch.from_numpy(self.take(purpose, dtype, elements))


def as_tensor(bits: Bits, kind: FloatFormat) -> torch.Tensor:
    """The numbers that raw bits stand for, over the same memory."""
    signed = bits.view(np.int16 if kind.size_bytes == 2 else np.int32)
    return torch.from_numpy(signed).view(TORCH_DTYPES[kind.name])


def magnitude_mask(kind: FloatFormat) -> int:
    return 0x7FFF if kind.size_bytes == 2 else 0x7FFFFFFF


def infinity_bits(kind: FloatFormat) -> int:
    """The bits of +infinity; magnitudes from here on are not finite."""
    return {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}[kind.name]


class Kernel:
    """Computes one combination for inputs and an output of given formats."""

    def __init__(self, kinds: Sequence[str], sum_of: Combination, to: str) -> None:
        """`kinds` and `to` are dtypes as headers spell them: F16, BF16 or F32."""
        self.kinds = [FORMATS[kind] for kind in kinds]
        self.sum_of = sum_of
        self.to = FORMATS[to]
        narrow = len(set(kinds)) == 1 and self.kinds[0].size_bytes == 2 and self.to.size_bytes == 2
        if not (narrow and self.prepare(self.kinds[0], 23, 22)):
            self.narrow = False
            self.usable = self.prepare(FORMATS["F32"], 52, 51)
        else:
            self.narrow = self.usable = True

    def prepare(self, kind: FloatFormat, sum_bits: int, quotient_bits: int) -> bool:
        """Set how far apart, in bits of their patterns, the inputs of an element may lie; False if none may.

        Sums are exact while (sum of numerators) x (ratio of inputs) stays below 2**(sum_bits - precision); a
        quotient cannot fall on a tie that it is not while the denominator is below 2**(quotient_bits - precision).
        """
        binades = sum_bits - kind.precision - math.log2(self.sum_of.weight or 1) - BINADE_SLACK
        self.spread_limit = int(binades * (1 << kind.fraction_bits))
        return binades >= 1 and self.sum_of.denominator < 1 << (quotient_bits - self.to.precision)

    @property
    def is_addition(self) -> bool:
        """A 16-bit checkpoint plus a float32 delta times a power of two."""
        return (
            len(self.kinds) == 2
            and self.kinds[0].size_bytes == 2
            and self.kinds[0] == self.to
            and self.kinds[1].name == "F32"
            and self.sum_of.numerators[0] == self.sum_of.denominator
            and abs(self.sum_of.numerators[1] / self.sum_of.denominator) in EXACT_SCALES
        )

    def run(self, inputs: Sequence[Bits], output: Bits, scratch: Scratch) -> tuple[NDArray[Any], NDArray[Any]]:
        """Fill `output` and return the places where an input is not finite, and where a finite sum overflows.

        `inputs` and `output`: flat arrays of bits (uint16 or uint32) of one length.
        """
        if self.sum_of.numerators == (1,) and self.sum_of.denominator == 1:
            if self.kinds[0] == self.to:
                np.copyto(output, inputs[0])
            else:
                as_tensor(output, self.to).copy_(as_tensor(inputs[0], self.kinds[0]))
            doubtful = np.empty(0, dtype=np.intp)
        elif self.is_addition:
            doubtful = self.add_delta(inputs, output, scratch)
        elif self.usable:
            doubtful = (
                self.add_narrow(inputs, output, scratch) if self.narrow else self.add_wide(inputs, output, scratch)
            )
        else:
            doubtful = np.arange(output.size)
        if doubtful.size:
            self.settle(inputs, output, doubtful)
        return self.find_faults(inputs, output, scratch)

    def add_narrow(self, inputs: Sequence[Bits], output: Bits, scratch: Scratch) -> NDArray[Any]:
        """16-bit inputs through float32."""
        size = output.size
        total, term = scratch.tensor("total", np.float32, size), scratch.tensor("term", np.float32, size)
        total.copy_(as_tensor(inputs[0], self.kinds[0]))
        if self.sum_of.numerators[0] != 1:
            total.mul_(self.sum_of.numerators[0])
        for bits, numerator in zip(inputs[1:], self.sum_of.numerators[1:], strict=True):
            term.copy_(as_tensor(bits, self.kinds[0]))
            total.add_(term, alpha=numerator)
        if self.sum_of.denominator != 1:
            total.div_(self.sum_of.denominator)
        as_tensor(output, self.to).copy_(total)
        return self.find_wide_spreads(inputs, self.kinds[0], scratch)

    def add_wide(self, inputs: Sequence[Bits], output: Bits, scratch: Scratch) -> NDArray[Any]:
        """Any inputs through float64."""
        size = output.size
        widened = [
            self.widen(bits, kind, scratch, f"wide {place}")
            for place, (bits, kind) in enumerate(zip(inputs, self.kinds, strict=True))
        ]
        total, term = scratch.tensor("total", np.float64, size), scratch.tensor("term", np.float64, size)
        total.copy_(widened[0])
        total.mul_(self.sum_of.numerators[0])
        for values, numerator in zip(widened[1:], self.sum_of.numerators[1:], strict=True):
            term.copy_(values)
            total.add_(term, alpha=numerator)
        if self.sum_of.denominator != 1:
            total.div_(self.sum_of.denominator)
        if self.to.size_bytes == 4:
            as_tensor(output, self.to).copy_(total)
        else:
            as_tensor(output, self.to).copy_(torch.from_numpy(narrow_to_odd(total.numpy())))
        patterns = [values.numpy().view(np.uint32) for values in widened]
        doubtful = self.find_wide_spreads(patterns, FORMATS["F32"], scratch)
        if self.to.name == "BF16":
            tiny = np.flatnonzero((np.abs(total.numpy()) < TINY_OF_BFLOAT16) & (total.numpy() != 0))
            doubtful = np.union1d(doubtful, tiny)
        return doubtful

    def add_delta(self, inputs: Sequence[Bits], output: Bits, scratch: Scratch) -> NDArray[Any]:
        """A 16-bit checkpoint and a float32 delta: one float32 sum, doubtful only on a tie or near zero."""
        size = output.size
        total = scratch.tensor("total", np.float32, size)
        total.copy_(as_tensor(inputs[0], self.kinds[0]))
        total.add_(as_tensor(inputs[1], self.kinds[1]), alpha=self.sum_of.numerators[1] / self.sum_of.denominator)
        as_tensor(output, self.to).copy_(total)
        pattern = total.numpy().view(np.uint32)
        dropped = 24 - self.to.precision
        low, flags = scratch.take("low", np.uint32, size), scratch.take("flags", np.bool_, size)
        np.bitwise_and(pattern, np.uint32((1 << dropped) - 1), out=low)
        np.equal(low, np.uint32(1 << (dropped - 1)), out=flags)
        ties = np.flatnonzero(flags)
        smallest = SMALLEST_NORMAL_OF_HALF if self.to.name == "F16" else TINY_OF_BFLOAT16
        np.bitwise_and(pattern, np.uint32(0x7FFFFFFF), out=low)
        np.less(low, np.float32(smallest).view(np.uint32), out=flags)
        small = np.flatnonzero(flags)
        return np.union1d(ties, small) if small.size else ties

    def widen(self, bits: Bits, kind: FloatFormat, scratch: Scratch, purpose: str) -> torch.Tensor:
        """The numbers as float32, which holds every input exactly."""
        values = as_tensor(bits, kind)
        if kind.name == "F32":
            return values
        wide = scratch.tensor(purpose, np.float32, bits.size)
        wide.copy_(values)
        return wide

    def find_wide_spreads(self, patterns: Sequence[Bits], kind: FloatFormat, scratch: Scratch) -> NDArray[Any]:
        """Places where the largest and the smallest input lie further apart than the sum can hold exactly."""
        if len(patterns) == 1:
            return np.empty(0, dtype=np.intp)
        width: Any = BITS_DTYPES[kind.size_bytes]
        size = patterns[0].size
        mask = width(magnitude_mask(kind))
        largest, smallest = scratch.take("largest", width, size), scratch.take("smallest", width, size)
        each, flags = scratch.take("each", width, size), scratch.take("flags", np.bool_, size)
        np.bitwise_and(patterns[0], mask, out=largest)
        np.bitwise_and(patterns[1], mask, out=each)
        np.minimum(largest, each, out=smallest)
        np.maximum(largest, each, out=largest)
        for pattern in patterns[2:]:
            np.bitwise_and(pattern, mask, out=each)
            np.minimum(smallest, each, out=smallest)
            np.maximum(largest, each, out=largest)
        np.subtract(largest, smallest, out=largest)
        np.greater(largest, width(min(self.spread_limit, magnitude_mask(kind))), out=flags)
        return np.flatnonzero(flags)

    def settle(self, inputs: Sequence[Bits], output: Bits, places: NDArray[Any]) -> None:
        """Compute the elements at `places` carefully."""
        if self.fits_float64:
            output[places] = self.add_halves(inputs, places).view(output.dtype)
            return
        gathered = [
            as_tensor(bits[places], kind).to(torch.float32).numpy()
            for bits, kind in zip(inputs, self.kinds, strict=True)
        ]
        exact = sum_exactly(gathered, self.kinds, self.sum_of, self.to)
        narrowed = torch.from_numpy(exact).to(TORCH_DTYPES[self.to.name])
        signed = torch.int16 if self.to.size_bytes == 2 else torch.int32
        output[places] = narrowed.view(signed).numpy().view(output.dtype)

    @property
    def fits_float64(self) -> bool:
        """Whether every sum is exact in float64 and its quotient no false tie.

        Halves are whole multiples of 2**-24 below 2**16, 40 bits: with numerators of 12 bits in all, 52.
        """
        return self.narrow and self.kinds[0].name == "F16" == self.to.name

    def add_halves(self, inputs: Sequence[Bits], places: NDArray[Any]) -> NDArray[Any]:
        """float16 sums through float64, which numpy rounds to float16 in one step."""
        with np.errstate(all="ignore"):
            total = np.zeros(places.size)
            for bits, numerator in zip(inputs, self.sum_of.numerators, strict=True):
                total += bits[places].view(np.float16).astype(np.float64) * numerator
            return (total / self.sum_of.denominator).astype(np.float16)

    def find_faults(self, inputs: Sequence[Bits], output: Bits, scratch: Scratch) -> tuple[NDArray[Any], NDArray[Any]]:
        """Places of non-finite inputs and of overflow, read off the output; doubtful overflow is settled first."""
        places = self.find_not_finite(output, self.to, scratch)
        if not places.size:
            return places, places
        self.settle(inputs, output, places)
        still = places[(output[places] & output.dtype.type(magnitude_mask(self.to))) >= infinity_bits(self.to)]
        from_input = np.zeros(still.size, dtype=bool)
        for bits, kind in zip(inputs, self.kinds, strict=True):
            from_input |= (bits[still] & bits.dtype.type(magnitude_mask(kind))) >= infinity_bits(kind)
        return still[from_input], still[~from_input]

    def find_not_finite(self, bits: Bits, kind: FloatFormat, scratch: Scratch) -> NDArray[Any]:
        magnitudes = scratch.take("each", bits.dtype, bits.size)
        np.bitwise_and(bits, bits.dtype.type(magnitude_mask(kind)), out=magnitudes)
        if not bits.size or magnitudes.max() < infinity_bits(kind):
            return np.empty(0, dtype=np.intp)
        return np.flatnonzero(magnitudes >= infinity_bits(kind))
