"""Formulas: what parses, what is refused and how, and that parsing undoes formatting."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohaku_wrap.merging.formula.parser import RESERVED, parse_formula
from kohaku_wrap.merging.formula.tokens import FormulaError
from kohaku_wrap.merging.formula.tree import (
    Blocks,
    BlockWeight,
    Brackets,
    Model,
    Negation,
    Network,
    Node,
    Number,
    Only,
    Product,
    Sum,
    format_formula,
    names_of_models,
    names_of_networks,
)

GAMMA = "beta7 + 0.8 * (anxl3 - anxl2) + 0.5 * (base7 - beta7)"

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True).filter(lambda name: name not in RESERVED)
decimals = st.builds(lambda count, digits: Fraction(count, 10**digits), st.integers(0, 10**9), st.integers(0, 9))
signed = st.builds(lambda value, minus: -value if minus else value, decimals, st.booleans())
single_blocks = st.sampled_from(["IN00", "IN11", "MID", "OUT03", "BASE", "TE", "TE1", "TE2", "VAE"])
weights = st.one_of(
    st.builds(lambda block, value: BlockWeight(block, block, value), single_blocks, signed),
    st.builds(lambda value: BlockWeight("OUT00", "OUT05", value), signed),
)
blocks = st.builds(Blocks, st.lists(weights, min_size=1, max_size=4).map(tuple), st.none() | signed)
patterns = st.text(st.characters(exclude_characters='"\r\n', exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
leaves = st.one_of(st.builds(Number, decimals), st.builds(Model, names), st.builds(Network, names), blocks)


def chains(kind: type, operands: st.SearchStrategy[Node], signs: str) -> st.SearchStrategy[Node]:
    rest = st.lists(st.tuples(st.sampled_from(signs), operands), min_size=1, max_size=3).map(tuple)
    return st.builds(kind, operands, rest)


def grow(formulas: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    atoms = leaves | st.builds(Brackets, formulas) | st.builds(Only, patterns, formulas, st.none() | formulas)
    factors = atoms | st.builds(Negation, atoms)
    products = factors | chains(Product, factors, "*/")
    return products | chains(Sum, products, "+-")


trees = st.recursive(leaves, grow, max_leaves=12)


@given(trees)
@pytest.mark.fuzz
def test_parsing_undoes_formatting(tree: Node) -> None:
    assert parse_formula(format_formula(tree)) == tree


@given(st.text(max_size=60) | st.text(alphabet='ab0.5+-*/()net,blocks="only=IN ', max_size=60))
@pytest.mark.fuzz
def test_any_text_is_a_formula_or_refused_with_a_mark(text: str) -> None:
    try:
        tree = parse_formula(text)
    except FormulaError as error:
        assert "^" in str(error).splitlines()[-1]
    else:
        assert parse_formula(format_formula(tree)) == tree


def test_gamma_keeps_its_groups_and_exact_numbers() -> None:
    tree = parse_formula(GAMMA)
    assert format_formula(tree) == GAMMA
    assert names_of_models(tree) == ["beta7", "anxl3", "anxl2", "base7"]
    assert isinstance(tree, Sum) and tree.rest[0][1] == Product(
        Number(Fraction(4, 5)), (("*", Brackets(Sum(Model("anxl3"), (("-", Model("anxl2")),)))),)
    )


def test_networks_are_told_from_models() -> None:
    tree = parse_formula("base + 1.0 * net(epsilon)")
    assert (names_of_models(tree), names_of_networks(tree)) == (["base"], ["epsilon"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "base + 0.5 * (a - )",
            "formula: expected a model name after '-'\n    base + 0.5 * (a - )\n                      ^",
        ),
        ("", "formula: it is empty; expected a model name\n    \n    ^"),
        ("a b", "formula: expected '+', '-', '*', '/' or the end before 'b'\n    a b\n      ^"),
        ("(a", "formula: expected ')' to close the bracket at character 1\n    (a\n      ^"),
        ("a)", "formula: unexpected ')': no bracket is open\n    a)\n     ^"),
        ("a + 1e5 * b", "formula: '1e5' is neither a number nor a name\n    a + 1e5 * b\n        ^^^"),
        (
            "exp(a)",
            "formula: there is no function 'exp'; there are net, blocks, only, unet, te, te1, te2, vae, "
            "train_difference, cosine, slerp, dare, ties\n    exp(a)\n    ^^^",
        ),
        ("a $ b", "formula: unexpected character '$'\n    a $ b\n      ^"),
        ("net(0.5)", "formula: expected the network's name in net(…)\n    net(0.5)\n        ^^^"),
        (
            "blocks(IN12=1) * a",
            "formula: expected a block: IN00 to IN11, MID, OUT00 to OUT11, BASE, TE, TE1, TE2 or VAE\n"
            "    blocks(IN12=1) * a\n           ^^^^",
        ),
        (
            "blocks(OUT03..IN00=1) * a",
            "formula: OUT03..IN00 is not a range of blocks\n    blocks(OUT03..IN00=1) * a\n           ^^^^^^^^^^^",
        ),
        (
            "blocks(TE..TE1=1) * a",
            "formula: TE..TE1 is not a range of blocks\n    blocks(TE..TE1=1) * a\n           ^^^^^^^",
        ),
        ('only("x, a)', "formula: a pattern's closing quote is missing\n    only(\"x, a)\n         ^^^^^^"),
    ],
)
def test_refusals_point_at_the_place(source: str, message: str) -> None:
    with pytest.raises(FormulaError) as caught:
        parse_formula(source)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("a" * 10_001, "more than 10,000"),
        ("(" * 65 + "a" + ")" * 65, "nested more than 64"),
        ("-" * 65 + "a", "nested more than 64"),
        (f"{'9' * 25} * a", "at most 24 digits"),
        ("__import__(os)", "no function"),
    ],
)
def test_limits(source: str, what: str) -> None:
    with pytest.raises(FormulaError, match=what):
        parse_formula(source)


def test_a_long_line_is_cut_around_the_place() -> None:
    with pytest.raises(FormulaError) as caught:
        parse_formula("+ ".join(["aaaa "] * 400) + "* * b" + " + c" * 100)
    line, mark = str(caught.value).splitlines()[1:]
    assert len(line) < 140
    assert line[: mark.index("^")].endswith("aaaa * ") and line[mark.index("^")] == "*"
