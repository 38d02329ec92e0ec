"""A formula with letters for numbers, and the numbers to try for each: one formula for each point of the grid."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from kohaku_wrap.errors import UsageError
from kohaku_wrap.merging.formula.tokens import FormulaError, split_tokens
from kohaku_wrap.merging.formula.tree import format_number

MOST_POINTS = 1000
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
NUMBER = re.compile(r"-?(?:[0-9]{1,12}\.?[0-9]{0,12}|\.[0-9]{1,12})")
EXAMPLE = "For example A=0.5:1.25:0.25 (from, to, step) or A=0,0.5,1."


@dataclass(frozen=True)
class Axis:
    """A letter of the formula and the numbers to put in its place."""

    name: str
    """As in the formula."""

    values: tuple[str, ...]
    """Decimals, in the order to try."""


@dataclass(frozen=True)
class Point:
    """One merge of a grid."""

    values: dict[str, str]
    """A decimal for each axis."""

    formula: str
    """With these numbers."""

    @property
    def name(self) -> str:
        """What its files are called, such as A0.5-B1."""
        return "-".join(f"{axis}{value}" for axis, value in self.values.items())


def read_axis(text: str) -> Axis:
    """The axis of `A=0.5:1.25:0.25`, ends included, or of `A=0,0.5,1`. Raises UsageError."""
    name, sign, written = text.partition("=")
    if not sign or not NAME.fullmatch(name):
        raise UsageError(f"{text}: expected a letter of the formula and its numbers", EXAMPLE)
    parts = written.split(":") if ":" in written else written.split(",")
    if not all(NUMBER.fullmatch(part) for part in parts) or (":" in written and len(parts) != 3):
        raise UsageError(f"{text}: {written or 'nothing'} is no list of decimal numbers", EXAMPLE)
    numbers = [Fraction(part.removesuffix(".")) for part in parts]
    if ":" in written:
        first, last, step = numbers
        if not step or (last - first) / step < 0:
            raise UsageError(f"{text}: steps of {parts[2]} do not go from {parts[0]} to {parts[1]}", EXAMPLE)
        count = int((last - first) / step) + 1
        if count > MOST_POINTS:
            raise UsageError(f"{text}: {count:,} numbers are more than {MOST_POINTS:,}", "Take larger steps.")
        numbers = [first + step * place for place in range(count)]
    return Axis(name, tuple(dict.fromkeys(map(format_number, numbers))))


def list_points(formula: str, axes: Sequence[Axis]) -> list[Point]:
    """Every point, the last axis fastest.

    Raises UsageError for a letter that is given twice or is not in the formula, and for more than MOST_POINTS.
    """
    found = {name for _, _, name in find_letters(formula, [axis.name for axis in axes])}
    for place, axis in enumerate(axes):
        if axis.name not in found:
            raise UsageError(f"{axis.name}= is given, and {axis.name} stands for no number in the formula", formula)
        if any(axis.name == other.name for other in axes[:place]):
            raise UsageError(f"{axis.name}= is given twice", EXAMPLE)
    count = math.prod(len(axis.values) for axis in axes)
    if count > MOST_POINTS:
        raise UsageError(f"the grid has {count:,} merges; {MOST_POINTS:,} are allowed", "Take larger steps.")
    names = [axis.name for axis in axes]
    points = [dict(zip(names, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]
    return [Point(values, put_numbers(formula, values)) for values in points]


def put_numbers(formula: str, values: dict[str, str]) -> str:
    """The formula's text with decimals in place of letters, as far as these stand where a number can."""
    parts, position = [], 0
    for start, stop, name in find_letters(formula, values):
        parts += [formula[position:start], values[name]]
        position = stop
    return "".join([*parts, formula[position:]])


def find_letters(formula: str, names: Collection[str]) -> Iterator[tuple[int, int, str]]:
    """Where letters of the grid stand as numbers, and not as the name of a number, as in `seed=7`."""
    for token, following in itertools.pairwise(split_tokens(formula)):
        if token.kind != "name" or token.text not in names or following.text == "=":
            continue
        if following.text == "(":
            raise FormulaError(f"{token.text} is a letter of the grid, and no function", formula, token.span)
        yield token.span.start, token.span.stop, token.text
