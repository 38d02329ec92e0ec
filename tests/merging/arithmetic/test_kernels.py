"""Sums of chunks against rational arithmetic, on ordinary and on hostile numbers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kohaku_wrap.merging.arithmetic.kernels import BITS_DTYPES, Kernel, Product, Scratch, as_numbers, infinity_bits
from kohaku_wrap.merging.arithmetic.rounding import FORMATS, Combination, round_fraction

GAMMA = (Fraction(1, 2), Fraction(4, 5), Fraction(-4, 5), Fraction(1, 2))
COEFFICIENTS = [
    GAMMA,
    (Fraction(1, 2), Fraction(1, 2)),
    (Fraction(1, 3), Fraction(2, 3)),
    (Fraction(123456789, 10**9), Fraction(876543211, 10**9)),
    (Fraction(10**15 + 1, 10**15), Fraction(-1, 10**15)),
    (Fraction(1), Fraction(-1, 4)),
    (Fraction(1), Fraction(1)),
    (Fraction(-1), Fraction(1)),
    (Fraction(1), Fraction(4, 5)),
]
KINDS = ("F16", "BF16", "F32")
TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def draw_bits(generator: np.random.Generator, kind: str, size: int, hostile: bool) -> np.ndarray:
    """Bits of finite numbers: like weights, or of every size that the format has."""
    form = FORMATS[kind]
    width = BITS_DTYPES[form.size_bytes]
    if not hostile:
        values = torch.from_numpy(generator.standard_normal(size).astype(np.float32) * 0.05).to(TORCH_DTYPES[kind])
        return values.view(torch.int16 if form.size_bytes == 2 else torch.int32).numpy().view(width).copy()
    bits = generator.integers(0, 1 << (8 * form.size_bytes), size, dtype=np.uint64).astype(width)
    bits[(bits & infinity_bits(form)) == infinity_bits(form)] = 0
    bits[::7] = 0
    return bits


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    return as_numbers(bits, FORMATS[kind])


def run_kernel(
    inputs: list[np.ndarray], kinds: list[str], coefficients: tuple[Fraction, ...], to: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bits of the sums, and the places of non-finite inputs and of overflow."""
    kernel, scratch = Kernel(kinds, Combination.of(coefficients), to), Scratch()
    buffers = kernel.take_inputs(inputs[0].size, scratch)
    for row, bits in zip(buffers.rows, inputs, strict=True):
        row[:] = bits
    output = np.empty(inputs[0].size, dtype=BITS_DTYPES[FORMATS[to].size_bytes])
    return output, *kernel.run(buffers, output, scratch)


def check_exact(inputs: list[np.ndarray], kinds: list[str], coefficients: tuple[Fraction, ...], to: str) -> None:
    sum_of = Combination.of(coefficients)
    output, bad_inputs, overflows = run_kernel(inputs, kinds, coefficients, to)
    found = numbers(output, to)
    values = [numbers(bits, kind) for bits, kind in zip(inputs, kinds, strict=True)]
    assert bad_inputs.size == 0
    for place in range(output.size):
        exact = round_fraction(sum_of.exact([float(column[place]) for column in values]), FORMATS[to])
        if exact is None:
            assert np.isinf(found[place]) and place in overflows
        else:
            assert Fraction(float(found[place])) == exact, (place, [column[place] for column in values])


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_element_is_rounded_once(kind: str, to: str, hostile: bool) -> None:
    generator = np.random.default_rng(7)
    for coefficients in COEFFICIENTS:
        inputs = [draw_bits(generator, kind, 300, hostile) for _ in coefficients]
        if hostile:
            inputs[1][::2] = inputs[0][::2]
        check_exact(inputs, [kind] * len(inputs), coefficients, to)


@pytest.mark.parametrize("to", KINDS)
def test_types_may_be_mixed(to: str) -> None:
    generator = np.random.default_rng(8)
    kinds = ["F16", "BF16", "F32", "F16"]
    check_exact([draw_bits(generator, kind, 300, True) for kind in kinds], kinds, GAMMA, to)


@pytest.mark.parametrize("coefficient", [Fraction(1), Fraction(-1, 2), Fraction(4, 5)])
@pytest.mark.parametrize("to", ["F16", "BF16"])
def test_a_float32_delta_on_a_16_bit_weight(to: str, coefficient: Fraction) -> None:
    generator = np.random.default_rng(9)
    for hostile in (False, True):
        inputs = [draw_bits(generator, to, 2000, hostile), draw_bits(generator, "F32", 2000, hostile)]
        check_exact(inputs, [to, "F32"], (Fraction(1), coefficient), to)


@pytest.mark.parametrize("coefficients", [(1, 1), (1, -1), (1, Fraction(4, 5)), (1, 1, 1), (Fraction(1, 3),)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_added_as_if_it_lay_there(kind: str, coefficients: tuple[Fraction, ...]) -> None:
    generator = np.random.default_rng(10)
    factors = [draw_bits(generator, "F32", size, True).view(np.float32) % 1e6 for size in (5, 30 * 37)]
    product = Product(factors[0], factors[1].reshape(30, 37))
    whole = (product.outer[None, :, None] * product.inner[:, None, :]).reshape(-1)
    assert np.array_equal(product.at(np.arange(whole.size)), whole)
    kinds = [kind] * (len(coefficients) - 1)
    inputs = [draw_bits(generator, kind, whole.size, hostile) for hostile, _ in zip((False, True), kinds, strict=False)]
    sum_of = Combination.of(tuple(map(Fraction, coefficients)))
    wanted, _, _ = run_kernel(
        [*inputs, whole.view(np.uint32)], [*kinds, "F32"], tuple(map(Fraction, coefficients)), kind
    )

    kernel, scratch = Kernel([*kinds, "F32"], sum_of, kind, has_product=True), Scratch()
    buffers = kernel.take_inputs(whole.size, scratch, product)
    for row, bits in zip(buffers.rows, inputs, strict=True):
        row[:] = bits
    output = np.empty(whole.size, dtype=BITS_DTYPES[FORMATS[kind].size_bytes])
    kernel.run(buffers, output, scratch)
    assert np.array_equal(output, wanted)
    check_exact([*inputs, whole.view(np.uint32)], [*kinds, "F32"], tuple(map(Fraction, coefficients)), kind)


@pytest.mark.parametrize("to", ["F16", "BF16"])
def test_faults_of_a_sum_of_two_are_told_apart(to: str) -> None:
    base = torch.tensor([3e38 if to == "BF16" else 6e4, np.nan, 1.0, 1.0, -np.inf]).to(TORCH_DTYPES[to])
    delta = np.array([3e38, 1.0, np.inf, 1.0, np.inf], dtype=np.float32)
    delta[3] = np.uint32(0x7FFFFFFF).view(np.float32)
    inputs: list[np.ndarray] = [base.view(torch.int16).numpy().view(np.uint16), delta.view(np.uint32)]
    _, bad, overflows = run_kernel(inputs, [to, "F32"], (Fraction(1), Fraction(1)), to)
    assert (bad.tolist(), overflows.tolist()) == ([1, 2, 3, 4], [0])


def test_a_sum_just_beside_a_tie_is_not_taken_for_one() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0]).half().view(torch.int16).numpy().view(np.uint16)
    half_unit = 2.0**-11
    delta = np.array([half_unit, half_unit * (1 + 2**-20), half_unit * (1 - 2**-20), 3 * half_unit], dtype=np.float32)
    check_exact([base, delta.view(np.uint32)], ["F16", "F32"], (Fraction(1), Fraction(1)), "F16")


def test_plain_float32_sums_would_fail_here() -> None:
    values = np.array([0.5, 2.0**-24, 0.5, 2.0**-24], dtype=np.float16).view(np.uint16)
    inputs = [values[[0, 0]], values[[1, 1]], values[[1, 3]], values[[2, 2]]]
    check_exact(inputs, ["F16"] * 4, GAMMA, "F16")


def test_faults_are_told_apart() -> None:
    inputs = [np.array([60000, np.inf, 1, np.nan], dtype=np.float16).view(np.uint16)] * 2
    _, bad, overflows = run_kernel(inputs, ["F16"] * 2, (Fraction(1), Fraction(1)), "F16")
    assert (bad.tolist(), overflows.tolist()) == ([1, 3], [0])


def test_bfloat16_does_not_overflow_on_the_way() -> None:
    inputs = [torch.full((4,), 3e38).bfloat16().view(torch.int16).numpy().view(np.uint16)] * 2
    check_exact(inputs, ["BF16"] * 2, (Fraction(1, 2), Fraction(1, 2)), "BF16")


@given(st.fractions(-(10**6), 10**6, max_denominator=10**12), st.sampled_from(KINDS))
@settings(max_examples=200, deadline=None)
def test_rounding_agrees_with_the_library_on_float64(value: Fraction, kind: str) -> None:
    number = float(value)
    rounded = round_fraction(Fraction(number), FORMATS[kind])
    if kind == "F16":
        expected = float(np.float64(number).astype(np.float16)) if abs(number) < 65504 else None
    elif kind == "F32":
        expected = float(np.float32(number))
    else:
        return
    assert expected is None or (rounded is None and np.isinf(expected)) or float(rounded or 0) == expected
