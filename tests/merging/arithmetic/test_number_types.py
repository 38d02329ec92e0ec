"""float8 and float64 as inputs and outputs, against rational arithmetic and torch."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kohaku_wrap.errors import ProblemsFound
from kohaku_wrap.merging.arithmetic.kernels import as_bits, as_numbers
from kohaku_wrap.merging.arithmetic.rounding import FORMATS, Combination, round_fraction, sum_exactly
from kohaku_wrap.merging.plan import MergeOptions
from kohaku_wrap.merging.planning import plan_merge
from kohaku_wrap.merging.running import run_merge

from ..conftest import UNET, Tensors, WriteModel

TYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
KEY = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_every_pattern_of_float8_is_the_number_that_torch_reads(kind: str) -> None:
    bits = np.arange(256, dtype=np.uint8)
    wanted = torch.from_numpy(bits).view(TYPES[kind]).float().numpy()
    numbers = as_numbers(bits, FORMATS[kind])
    assert np.array_equal(numbers, wanted, equal_nan=True)
    finite = np.isfinite(wanted)
    assert np.array_equal(as_bits(numbers[finite], FORMATS[kind]), bits[finite])
    assert FORMATS[kind].largest == Fraction(float(np.nanmax(wanted[finite])))


@pytest.mark.parametrize("to", ["F8_E4M3", "F8_E5M2", "F64"])
def test_sums_are_rounded_once(to: str) -> None:
    """Ties, numbers beside ties, subnormal numbers and overflow; rationals are the oracle."""
    generator = np.random.default_rng(3)
    first = np.ldexp(generator.standard_normal(4000), generator.integers(-14, 10, 4000))
    second = np.where(generator.random(4000) < 0.5, np.ldexp(first, -np.int64(40)), -first / 3)
    first[:500] = np.ldexp(np.round(first[:500], 1), 0)
    first[500:700] = generator.integers(0, 1000, 200) / 1024
    second[500:700] = generator.choice([0, 1e-30, -1e-30], 200)
    sum_of = Combination.of((Fraction(4, 5), Fraction(-3, 7)))
    found = sum_exactly([first, second], [FORMATS["F64"]] * 2, sum_of, FORMATS[to])
    for place, value in enumerate(found):
        exact = sum_of.exact([float(first[place]), float(second[place])])
        wanted = round_fraction(exact, FORMATS[to])
        if wanted is None:
            assert np.isinf(value)
        else:
            assert Fraction(float(value)) == wanted, place


def merge(folder: Path, formula: str, options: MergeOptions | None = None, **paths: Path) -> Tensors:
    plan = plan_merge(formula, paths, options)
    run_merge(plan, folder / "out.safetensors", {}, threads=2, verify_elements=3000)
    return load_file(folder / "out.safetensors")


@pytest.mark.parametrize("dtype", ["", "F16", "F64", "F8_E5M2", "BF16"])
@pytest.mark.parametrize("second", TYPES)
@pytest.mark.parametrize("first", ["F64", "F8_E4M3", "F8_E5M2"])
def test_every_weight_is_merged_and_rounded_once(
    tmp_path: Path, write_model: WriteModel, first: str, second: str, dtype: str
) -> None:
    a, b = write_model("a", 1, TYPES[first]), write_model("b", 2, TYPES[second])
    merged = merge(tmp_path, "a + 0.3 * (b - a)", MergeOptions(dtype=dtype), a=a, b=b)
    left, right = load_file(a), load_file(b)
    for key in (KEY, f"{UNET}out.2.weight"):
        assert merged[key].dtype == TYPES[dtype or first]
        pairs = zip(left[key].double().flatten().tolist(), right[key].double().flatten().tolist(), strict=True)
        for found, (one, other) in list(zip(merged[key].double().flatten().tolist(), pairs, strict=True))[:200]:
            exact = Fraction(7, 10) * Fraction(one) + Fraction(3, 10) * Fraction(other)
            assert Fraction(found) == round_fraction(exact, FORMATS[dtype or first])


def test_overflow_of_float8_is_refused_and_kept_as_nan(tmp_path: Path, write_model: WriteModel) -> None:
    def enlarge(tensors: Tensors) -> None:
        tensors[KEY][0, 0] = 400

    paths: dict[str, Any] = {
        "a": write_model("a", 1, torch.float8_e4m3fn, enlarge),
        "b": write_model("b", 2, change=enlarge),
    }
    with pytest.raises(ProblemsFound, match="1 results are too large"):
        merge(tmp_path, "a + b", **paths)
    merged = merge(tmp_path, "a + b", MergeOptions(overflow="keep"), **paths)
    assert merged[KEY].float().isnan().sum() == 1


def test_a_network_on_float8(tmp_path: Path, write_model: WriteModel) -> None:
    a = write_model("a", 1, torch.float8_e4m3fn)
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    up, down = torch.randn(64, 2), torch.randn(2, 64)
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "n.safetensors")
    merged = merge(tmp_path, "a + 0.5 * net(n)", a=a, n=tmp_path / "n.safetensors")
    wanted = (load_file(a)[KEY].double() + 0.5 * (up @ down).double()).to(torch.float8_e4m3fn)
    assert (merged[KEY].view(torch.uint8) != wanted.view(torch.uint8)).float().mean() < 0.01


@pytest.mark.parametrize("kind", ["float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "int8"])
def test_types_that_cannot_be_averaged_are_refused_not_copied(
    tmp_path: Path, write_model: WriteModel, kind: str
) -> None:
    dtype = getattr(torch, kind)

    def change(tensors: Tensors) -> None:
        tensors[KEY] = torch.ones(64, 64, dtype=torch.uint8).view(dtype)

    odd, usual = write_model("odd", 1, change=change), write_model("usual", 2)
    for formula in ("odd + 0.5 * (usual - odd)", "usual + 0.5 * (odd - usual)"):
        with pytest.raises(ProblemsFound, match=KEY):
            plan_merge(formula, {"odd": odd, "usual": usual})


@pytest.mark.parametrize("name", ["position_ids"])
def test_positions_are_never_averaged(tmp_path: Path, write_model: WriteModel, name: str) -> None:
    key = f"conditioner.embedders.0.transformer.text_model.embeddings.{name}"

    def change(tensors: Tensors) -> None:
        tensors[key] = torch.arange(77)[None].half()

    a, b = write_model("a", 1, change=change), write_model("b", 2)
    assert torch.equal(merge(tmp_path, "0.5 * a + 0.3 * b", a=a, b=b)[key], torch.arange(77)[None].half())
    assert torch.equal(merge(tmp_path, "0.5 * b + 0.3 * a", a=a, b=b)[key], torch.arange(77)[None])
