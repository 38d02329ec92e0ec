"""Lists of block weights as people paste them: which tensors each number is for."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from kohaku_wrap.formats.sdxl import SDXL_SIZES, list_tensor_names
from kohaku_wrap.merging.blocks import load_presets
from kohaku_wrap.merging.formula.coefficients import Formula
from kohaku_wrap.merging.formula.parser import parse_formula
from kohaku_wrap.merging.formula.tokens import FormulaError
from kohaku_wrap.merging.formula.tree import format_formula
from kohaku_wrap.merging.plan import MergeOptions
from kohaku_wrap.merging.planning import plan_merge

from .conftest import WriteModel

UNET = "model.diffusion_model."
KEYS = [key for names in list_tensor_names(SDXL_SIZES).values() for key in names]
BASE = ("conditioner.", "first_stage_model.", f"{UNET}time_embed.", f"{UNET}label_emb.")
IN = [(f"{UNET}input_blocks.{number}.",) for number in range(9)]
MID = (f"{UNET}middle_block.",)
OUT = [(f"{UNET}output_blocks.{number}.",) for number in range(8)] + [(f"{UNET}output_blocks.8.", f"{UNET}out.")]
LISTS: dict[int, list[Any]] = {
    12: [BASE, IN[4], IN[5], IN[7], IN[8], MID, *OUT[:6]],
    19: [*IN, MID, *OUT],
    20: [BASE, *IN, MID, *OUT],
    17: [BASE, IN[1], IN[2], IN[4], IN[5], IN[7], IN[8], MID, *OUT[3:], (), (), ()],
    25: [*IN, (), (), (), MID, *OUT, (), (), ()],
    26: [BASE, *IN, (), (), (), MID, *OUT, (), (), ()],
}
"""By the length of a list, how SDXL's keys begin that each number is for; none for blocks of SD 1.5 alone."""


def layout_of(length: int) -> str:
    return "sd15" if length in (17, 25, 26) else ""


@pytest.mark.parametrize("length", LISTS)
def test_each_number_is_for_its_tensors(length: int) -> None:
    """Twice each place, so that numbers tell them apart; what has no number is 0 in the UNet, and 1 elsewhere."""
    numbers = [2 * place + 3 for place in range(length)]
    source = f"a + blocks({', '.join(map(str, numbers))}) * net(n)"
    formula = Formula(source, parse_formula(source, layout_of(length)))
    for key in KEYS:
        wanted = next((n for n, starts in zip(numbers, LISTS[length], strict=True) if key.startswith(starts)), None)
        if wanted is None:
            wanted = 1 if key.startswith(BASE) else 0
        assert formula.reduce_for_key(key).networks.get("n", 0) == wanted, key


@pytest.mark.parametrize("length", [17, 25, 26])
def test_lists_of_sd15_are_asked_for(length: int) -> None:
    source = f"a * blocks({', '.join(['1'] * length)})"
    with pytest.raises(FormulaError, match=f"{length} numbers are those of sd15; add --layout sd15"):
        parse_formula(source)
    with pytest.raises(FormulaError, match="20 numbers are those of sdxl"):
        parse_formula(f"a * blocks({', '.join(['1'] * 20)})", "sd15")
    with pytest.raises(FormulaError, match="3 numbers are of no known list; there are lists of 12, 19, 20, 17, 25, 26"):
        parse_formula("a * blocks(1, -1, 0.5)")


def test_numbers_for_blocks_that_sdxl_lacks_are_listed(write_model: WriteModel) -> None:
    source = f"a + blocks({', '.join(['0.5'] * 26)}) * (b - a)"
    paths = {"a": write_model("a", 1), "b": write_model("b", 2)}
    decisions = plan_merge(source, paths, MergeOptions(layout="sd15")).decisions
    for block in ("IN09", "IN10", "IN11", "OUT09", "OUT10", "OUT11"):
        assert any(line.startswith(f"blocks: {block} has no tensor") for line in decisions)


def test_presets_are_lists_with_names() -> None:
    presets = load_presets()
    assert {"ALL", "NONE", "INALL", "MIDD", "OUTALL"} <= presets.keys()
    assert all(len(values) == 20 for values in presets.values())
    for name, values in presets.items():
        pasted = parse_formula(f"a + blocks({', '.join(map(str, values))}) * net(n)")
        assert parse_formula(f'a + blocks("{name}") * net(n)', "sd15") == pasted
        assert parse_formula(format_formula(pasted)) == pasted
    middle = Formula("", parse_formula('a + blocks("MIDD") * net(n)'))
    assert middle.reduce_for_key(f"{UNET}middle_block.1.norm.weight").networks == {"n": Fraction(1)}
    assert not middle.reduce_for_key(f"{UNET}output_blocks.8.0.in_layers.0.weight").networks
    with pytest.raises(FormulaError, match='there is no preset "MIDDLE"; there are ALL, NONE'):
        parse_formula('a + blocks("MIDDLE") * net(n)')
