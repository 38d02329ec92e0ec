"""Formulas reduced to exact coefficients, with groups, blocks and patterns."""

from __future__ import annotations

from fractions import Fraction

import pytest

from kohaku_wrap.merging.formula.coefficients import Formula, Reduction
from kohaku_wrap.merging.formula.parser import parse_formula
from kohaku_wrap.merging.formula.tokens import FormulaError

GAMMA = "beta7 + 0.8 * (anxl3 - anxl2) + 0.5 * (base7 - beta7)"
IN04 = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
OUT02 = "model.diffusion_model.output_blocks.2.0.in_layers.2.weight"
LAST = "model.diffusion_model.out.2.weight"
TIME = "model.diffusion_model.time_embed.0.weight"
TE1 = "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"
TE2 = "conditioner.embedders.1.model.ln_final.weight"
VAE = "first_stage_model.encoder.conv_in.weight"


def reduce_at(source: str, key: str = IN04, lacking: tuple[str, ...] = ()) -> Reduction:
    return Formula(source, parse_formula(source)).reduce_for_key(key, frozenset(lacking))


def test_gamma_is_tenths() -> None:
    models = reduce_at(GAMMA).models
    assert {name: value * 10 for name, value in models.items()} == {"beta7": 5, "anxl3": 8, "anxl2": -8, "base7": 5}
    assert sum(reduce_at(GAMMA).models.values()) == 1


def test_numbers_are_exact_decimals() -> None:
    assert reduce_at("0.1 * a + 0.2 * a + 0.7 * b").models == {"a": Fraction(3, 10), "b": Fraction(7, 10)}
    assert reduce_at("(a - b) / 3 + b").models == {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    assert reduce_at("-(a - 2 * b) * -1 / 0.5 + 0 * c").models == {"a": 2, "b": -4}


def test_a_difference_with_a_missing_member_counts_as_zero() -> None:
    reduced = reduce_at(GAMMA, lacking=("anxl2",))
    assert reduced.models == {"beta7": Fraction(1, 2), "base7": Fraction(1, 2)}
    assert reduced.dropped == ("(anxl3 - anxl2)",)


def test_a_missing_member_with_weight_keeps_it_for_the_caller_to_decide() -> None:
    assert reduce_at("a + b - c", lacking=("c",)).models == {"a": 1, "b": 1, "c": -1}
    assert reduce_at("0.5 * (a + b)", lacking=("b",)).models == {"a": Fraction(1, 2), "b": Fraction(1, 2)}


def test_only_the_inner_difference_is_dropped() -> None:
    reduced = reduce_at("a + 0.5 * (0.5 * (b - a) + (c - d))", lacking=("d",))
    assert reduced.models == {"a": Fraction(3, 4), "b": Fraction(1, 4)}


@pytest.mark.parametrize(
    ("key", "weight"),
    [(IN04, "0.5"), (OUT02, "0.8"), (LAST, "1"), (TIME, "0.1"), (TE1, "0.3"), (TE2, "0.2"), (VAE, "0.1")],
)
def test_blocks_take_the_nearest_name(key: str, weight: str) -> None:
    source = "a + blocks(IN04=0.5, OUT00..OUT03=0.8, TE1=0.3, TE=0.2, BASE=0.1, OUT08=1) * (b - a)"
    assert reduce_at(source, key).models.get("b", 0) == Fraction(weight)


def test_blocks_not_named_are_one_or_what_else_says() -> None:
    assert reduce_at("blocks(MID=0) * a").models == {"a": 1}
    assert reduce_at("blocks(MID=0, else=0.25) * a").models == {"a": Fraction(1, 4)}


def test_only_chooses_by_pattern() -> None:
    source = 'a + only("*proj_in*", 0.3 * (b - a), else=0.1 * (c - a))'
    assert reduce_at(source).models == {"a": Fraction(7, 10), "b": Fraction(3, 10)}
    assert reduce_at(source, OUT02).models == {"a": Fraction(9, 10), "c": Fraction(1, 10)}
    assert reduce_at('a + only("nothing", b - a)').models == {"a": 1}


def test_networks_keep_their_coefficient() -> None:
    reduced = reduce_at("base + 0.8 * net(x) - net(y)")
    assert reduced.models == {"base": 1} and reduced.networks == {"x": Fraction(4, 5), "y": -1}


@pytest.mark.parametrize(
    ("source", "what", "marked"),
    [
        ("a * b", "two models cannot be multiplied", "b"),
        ("a / b", "divided by numbers, not by models", "b"),
        ("a + 1", "a number cannot be added to a model", "1"),
        ("1 - a", "a model cannot be subtracted from a number", "a"),
        ("a / (1 - 1)", "division by zero", "(1 - 1)"),
        ("a / blocks(MID=1)", "multiply by blocks", "blocks(MID=1)"),
        ("1 + 2", "names no model", "1 + 2"),
        ('only("x", a, else=1)', "one side of only", "1"),
    ],
)
def test_what_has_no_meaning_is_refused_at_its_place(source: str, what: str, marked: str) -> None:
    with pytest.raises(FormulaError, match=what) as caught:
        Formula(source, parse_formula(source))
    line, mark = str(caught.value).splitlines()[1:]
    assert line[mark.index("^") : mark.rindex("^") + 1] == marked


def test_fractions_too_long_to_be_meant_are_refused() -> None:
    source = "a" + " / 123456789012345678901" * 5
    with pytest.raises(FormulaError, match="more than 256 bits"):
        reduce_at(source)
