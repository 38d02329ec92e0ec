"""A formula reduced, for each key, to exact rational coefficients of its models and networks."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache

from kohaku_wrap.merging.blocks import blocks_of_key, is_in_part
from kohaku_wrap.merging.formula import (
    Blocks,
    Brackets,
    Model,
    Negation,
    Network,
    Node,
    Number,
    Only,
    Part,
    Product,
    Span,
    Sum,
    format_formula,
    walk_formula,
)
from kohaku_wrap.merging.tokens import FormulaError

SIZE_LIMIT_BITS = 256


@dataclass(frozen=True)
class Reduction:
    """What a formula, or a part of one, means for one key: a number, or a sum of models and networks."""

    number: Fraction | None
    """The number; None where it is a sum of tensors, as a whole formula always is."""

    models: Mapping[str, Fraction] = field(default_factory=dict)
    """The coefficient of each checkpoint; none is 0."""

    networks: Mapping[str, Fraction] = field(default_factory=dict)
    """The coefficient of each network; none is 0."""

    outside: Mapping[str, Fraction] = field(default_factory=dict)
    """The coefficients that models would have, did the key belong to the part that unet(…) or the like names."""

    dropped: tuple[str, ...] = ()
    """The difference groups, as text, that count as 0 because a member lacks the key."""


def add_scaled(left: Mapping[str, Fraction], right: Mapping[str, Fraction], factor: Fraction) -> dict[str, Fraction]:
    total = dict(left)
    for name, coefficient in right.items():
        total[name] = total.get(name, Fraction(0)) + factor * coefficient
    return {name: coefficient for name, coefficient in total.items() if coefficient}


NONE_LACKING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Case:
    """All about a key that a formula's coefficients can depend on."""

    blocks: tuple[str, ...]
    """As blocks_of_key gives them."""

    matching: frozenset[str]
    """The patterns of only(…) that the key matches."""

    lacking: frozenset[str]
    """The checkpoints that do not have the key."""

    parts: frozenset[str] = frozenset()
    """What unet(…) and the like name that the key belongs to."""


ANY_CASE = Case(("BASE",), frozenset(), NONE_LACKING)


class Formula:
    """A parsed formula that answers for each key."""

    def __init__(self, source: str, tree: Node) -> None:
        """`source` is the text that `tree` was parsed from, for messages.

        Raises FormulaError where models are multiplied, a number is added to a model, or a division is by 0.
        """
        self.source = source
        self.tree = tree
        self.check_kinds(tree)
        if self.kind_of(tree) == "number":
            raise self.error("the formula is a number; it names no model", tree.span)
        self.patterns = tuple(dict.fromkeys(part.pattern for part in walk_formula(tree) if isinstance(part, Only)))
        self.parts = {part.part for part in walk_formula(tree) if isinstance(part, Part)}
        self.reduce_case: Callable[[Case], Reduction] = cache(lambda case: self.value_of(tree, case))

    def error(self, message: str, span: Span) -> FormulaError:
        return FormulaError(message, self.source, span)

    def matches(self, key: str, pattern: str) -> bool:
        """Whether a pattern of only(…) takes a key; upper and lower case differ."""
        return fnmatch.fnmatchcase(key, pattern)

    def reduce_for_key(self, key: str, lacking: frozenset[str] = NONE_LACKING) -> Reduction:
        """The coefficients at `key`, when the checkpoints named in `lacking` do not have it.

        A difference (a bracket, or a side of only(…), whose coefficients sum to 0) with a member in `lacking`
        counts as 0; other members of `lacking` keep their coefficient, and the caller decides.
        """
        matching = frozenset(pattern for pattern in self.patterns if self.matches(key, pattern))
        parts = frozenset(part for part in self.parts if is_in_part(key, part))
        return self.reduce_case(Case(blocks_of_key(key), matching, lacking, parts))

    def kind_of(self, node: Node) -> str:
        """`number` or `tensor`."""
        match node:
            case Number() | Blocks():
                return "number"
            case Model() | Network() | Part():
                return "tensor"
            case Negation(inner) | Brackets(inner) | Only(_, inner, _):
                return self.kind_of(inner)
            case Sum(first, _):
                return self.kind_of(first)
            case Product(first, rest):
                kinds = [self.kind_of(first), *(self.kind_of(operand) for _, operand in rest)]
                return "tensor" if "tensor" in kinds else "number"

    def check_kinds(self, node: Node) -> None:
        """Raise FormulaError where an operation has no meaning for weights."""
        match node:
            case Negation(inner) | Brackets(inner):
                self.check_kinds(inner)
            case Part(part, inside):
                self.check_kinds(inside)
                if self.kind_of(inside) == "number":
                    raise self.error(f"{part}(…) takes a model, as in {part}(x)", node.span)
            case Only(_, inside, outside):
                self.check_kinds(inside)
                if outside is not None:
                    self.check_kinds(outside)
                    if self.kind_of(inside) != self.kind_of(outside):
                        raise self.error("one side of only(…) is a number and the other is not", outside.span)
            case Sum(first, rest):
                self.check_kinds(first)
                for sign, operand in rest:
                    self.check_kinds(operand)
                    if self.kind_of(operand) != self.kind_of(first):
                        verb = "added to" if sign == "+" else "subtracted from"
                        what = ("a number", "a model") if self.kind_of(operand) == "number" else ("a model", "a number")
                        raise self.error(f"{what[0]} cannot be {verb} {what[1]}", operand.span)
            case Product():
                self.check_product(node)
            case _:
                return

    def check_product(self, node: Product) -> None:
        self.check_kinds(node.first)
        tensors = self.kind_of(node.first) == "tensor"
        for sign, operand in node.rest:
            self.check_kinds(operand)
            tensor = self.kind_of(operand) == "tensor"
            if sign == "/" and tensor:
                raise self.error("models can be divided by numbers, not by models", operand.span)
            if sign == "/" and any(isinstance(part, Blocks | Only) for part in walk_formula(operand)):
                raise self.error("a division is by a plain number; multiply by blocks(…) instead", operand.span)
            if tensors and tensor:
                raise self.error("two models cannot be multiplied", operand.span)
            tensors |= tensor
            if sign == "/" and self.value_of(operand, ANY_CASE).number == 0:
                raise self.error("division by zero", operand.span)

    def value_of(self, node: Node, case: Case) -> Reduction:
        """The node's value for a key in `blocks` that matches the patterns in `matching`."""
        value = self.plain_value_of(node, case)
        self.check_size(value, node.span)
        return value

    def plain_value_of(self, node: Node, case: Case) -> Reduction:
        match node:
            case Number(number):
                return Reduction(number)
            case Blocks():
                return Reduction(weight_of_blocks(node, case.blocks))
            case Model(name):
                return Reduction(None, {name: Fraction(1)})
            case Network(name):
                return Reduction(None, {}, {name: Fraction(1)})
            case Negation(operand):
                return scale_value(self.value_of(operand, case), Fraction(-1))
            case Brackets(inside):
                value = self.value_of(inside, case)
                return drop_if_lacking(node, value, case)
            case Only(pattern, inside, outside):
                chosen = inside if pattern in case.matching else outside
                if chosen is not None:
                    return drop_if_lacking(chosen, self.value_of(chosen, case), case)
                return Reduction(Fraction(0) if self.kind_of(inside) == "number" else None)
            case Part(part, inside):
                value = self.value_of(inside, case)
                if part in case.parts:
                    return drop_if_lacking(inside, value, case)
                return Reduction(None, outside=add_scaled(value.models, value.outside, Fraction(1)))
            case Product():
                return self.multiply(node, case)
            case Sum():
                return self.add(node, case)

    def add(self, node: Sum, case: Case) -> Reduction:
        total = self.value_of(node.first, case)
        for sign, operand in node.rest:
            value = self.value_of(operand, case)
            factor = Fraction(1 if sign == "+" else -1)
            number = None
            if total.number is not None and value.number is not None:
                number = total.number + factor * value.number
            total = Reduction(
                number,
                add_scaled(total.models, value.models, factor),
                add_scaled(total.networks, value.networks, factor),
                add_scaled(total.outside, value.outside, factor),
                (*total.dropped, *value.dropped),
            )
        return total

    def multiply(self, node: Product, case: Case) -> Reduction:
        total = self.value_of(node.first, case)
        for sign, operand in node.rest:
            value = self.value_of(operand, case)
            if value.number is not None:
                total = scale_value(total, 1 / value.number if sign == "/" else value.number)
            elif total.number is not None:
                total = scale_value(value, total.number)
        return total

    def check_size(self, value: Reduction, span: Span) -> None:
        """Raise FormulaError for fractions too long to be meant."""
        numbers = [value.number or Fraction(0), *value.models.values(), *value.networks.values()]
        longest = max(max(number.numerator.bit_length(), number.denominator.bit_length()) for number in numbers)
        if longest > SIZE_LIMIT_BITS:
            raise self.error(f"its numbers multiply to a fraction of more than {SIZE_LIMIT_BITS} bits", span)


def drop_if_lacking(node: Node, value: Reduction, case: Case) -> Reduction:
    """A difference counts as 0 when one of its members lacks the key."""
    missing = [name for name in value.models if name in case.lacking]
    weights = [*value.models.values(), *value.outside.values()]
    if not (missing or value.outside) or value.number is not None or sum(weights, Fraction(0)) != 0:
        return value
    return Reduction(None, {}, value.networks, {}, (*value.dropped, format_formula(node)))


def scale_value(value: Reduction, factor: Fraction) -> Reduction:
    if value.number is not None:
        return Reduction(value.number * factor)
    models, networks, outside = (add_scaled({}, each, factor) for each in (value.models, value.networks, value.outside))
    return Reduction(None, models, networks, outside, value.dropped)


def weight_of_blocks(node: Blocks, blocks: tuple[str, ...]) -> Fraction:
    """The number that blocks(…) has for a key: the nearest named block's, else `else=`, else 1.

    The last mention of a block wins.
    """
    for block in blocks:
        for weight in reversed(node.weights):
            if weight.first <= block <= weight.last and len(weight.first) == len(block):
                same_kind = block.rstrip("0123456789") == weight.first.rstrip("0123456789")
                if block == weight.first or (same_kind and weight.first != weight.last):
                    return weight.value
    return Fraction(1) if node.other is None else node.other
