"""Grids: what letters and numbers mean, and which formulas come of them."""

from __future__ import annotations

import pytest

from kohaku_wrap.errors import UsageError
from kohaku_wrap.merging.formula.grids import list_points, read_axis
from kohaku_wrap.merging.formula.parser import parse_formula


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("A=0.5:1.25:0.25", ("0.5", "0.75", "1", "1.25")),
        ("A=1:0:-0.5", ("1", "0.5", "0")),
        ("A=-0.2:0.2:0.2", ("-0.2", "0", "0.2")),
        ("A=0:1:0.3", ("0", "0.3", "0.6", "0.9")),
        ("A=0:1:0.1", ("0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1")),
        ("A=1,0.5,1.0,.25", ("1", "0.5", "0.25")),
        ("A=2:2:1", ("2",)),
    ],
)
def test_numbers_of_a_letter_are_exact(text: str, values: tuple[str, ...]) -> None:
    assert read_axis(text).values == values


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("A", "expected a letter"),
        ("A=", "nothing is no list"),
        ("A=0:1", "0:1 is no list"),
        ("A=0:1:0", "steps of 0 do not go from 0 to 1"),
        ("A=1:0:0.5", "steps of 0.5 do not go"),
        ("A=0:1:0.0001", "10,001 numbers are more than 1,000"),
        ("A=1e3", "1e3 is no list"),
        ("0=1", "expected a letter"),
    ],
)
def test_wrong_numbers_are_refused(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        read_axis(text)


def test_every_combination_is_a_formula() -> None:
    formula = "a + A*(b - a) + blocks(IN04=B, else=0) * (slerp(a, b, t=A) - a) * -A"
    points = list_points(formula, [read_axis("A=0.5,-1"), read_axis("B=0,2")])
    assert [point.name for point in points] == ["A0.5-B0", "A0.5-B2", "A-1-B0", "A-1-B2"]
    assert points[3].formula == "a + -1*(b - a) + blocks(IN04=2, else=0) * (slerp(a, b, t=-1) - a) * --1"
    for point in points:
        parse_formula(point.formula)


def test_a_letter_is_a_word_of_its_own() -> None:
    (point,) = list_points('t + only("*t*", t) + tt + slerp(a, b, t=t)', [read_axis("t=3")])
    assert point.formula == '3 + only("*t*", 3) + tt + slerp(a, b, t=3)'


@pytest.mark.parametrize(
    ("formula", "letters", "what"),
    [
        ("a + B*b", ["A=1"], "A stands for no number in the formula"),
        ("b + dare(a - b, 0.9, seed=7)", ["seed=1,2"], "seed stands for no number in the formula"),
        ("a + blocks(MID=0.5) * (b - a)", ["MID=1,2"], "MID stands for no number in the formula"),
        ("a + A*b", ["A=1", "A=2"], "A= is given twice"),
        ("a + A*b + B*c + C*a", ["A=0:9:1", "B=0:9:1", "C=0:10:1"], "1,100 merges; 1,000 are allowed"),
        ("net(x) + slerp(a, b, 0.5)", ["slerp=1"], "slerp is a letter of the grid, and no function"),
    ],
)
def test_grids_that_cannot_be(formula: str, letters: list[str], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        list_points(formula, [read_axis(each) for each in letters])
