"""A formula reduced, for each key, to exact rational coefficients of its models and networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cache
from typing import TypeVar

from kohaku_wrap.merging.blocks import blocks_of_key, is_in_part
from kohaku_wrap.merging.formula import tree as nodes
from kohaku_wrap.merging.formula.calls import SIGNATURES, Call, WeightedSum, fault_of_number
from kohaku_wrap.merging.formula.kinds import bind_arguments, check_kinds, kind_of
from kohaku_wrap.merging.formula.tokens import FormulaError

SIZE_LIMIT_BITS = 256

Term = TypeVar("Term")


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

    calls: Mapping[Call, Fraction] = field(default_factory=dict)
    """The coefficient of each function; none is 0."""

    @property
    def sum(self) -> WeightedSum:
        """The checkpoints and functions."""
        return WeightedSum(tuple(self.models.items()), (), tuple(self.calls.items()))


def add_scaled(left: Mapping[Term, Fraction], right: Mapping[Term, Fraction], factor: Fraction) -> dict[Term, Fraction]:
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

    def __init__(self, source: str, tree: nodes.Node) -> None:
        """`source` is the text that `tree` was parsed from, for messages.

        Raises FormulaError where models are multiplied, a number is added to a model, or a division is by 0.
        """
        self.source = source
        self.tree = tree
        check_kinds(tree, source)
        for product in (part for part in nodes.walk_formula(tree) if isinstance(part, nodes.Product)):
            for sign, operand in product.rest:
                if sign == "/" and self.value_of(operand, ANY_CASE).number == 0:
                    raise self.error("division by zero", operand.span)
        if kind_of(tree) == "number":
            raise self.error("the formula is a number; it names no model", tree.span)
        self.patterns = tuple(
            dict.fromkeys(part.pattern for part in nodes.walk_formula(tree) if isinstance(part, nodes.Only))
        )
        self.parts = {part.part for part in nodes.walk_formula(tree) if isinstance(part, nodes.Part)}
        self.reduce_case: Callable[[Case], Reduction] = cache(lambda case: self.value_of(tree, case))

    def error(self, message: str, span: nodes.Span) -> FormulaError:
        return FormulaError(message, self.source, span)

    def reduce_for_key(self, key: str, lacking: frozenset[str] = NONE_LACKING) -> Reduction:
        """The coefficients at `key`, when the checkpoints named in `lacking` do not have it.

        A difference (a bracket, or a side of only(…), whose coefficients sum to 0) with a member in `lacking`
        counts as 0; other members of `lacking` keep their coefficient, and the caller decides.
        """
        matching = frozenset(pattern for pattern in self.patterns if fnmatchcase(key, pattern))
        parts = frozenset(part for part in self.parts if is_in_part(key, part))
        return self.reduce_case(Case(blocks_of_key(key), matching, lacking, parts))

    def call(self, node: nodes.Function, case: Case) -> Reduction:
        """A function's value: itself, with coefficients for what stands inside; nothing where all of that counts as 0.

        Each argument is a group for the rule of missing keys, as if it stood in brackets.
        """
        signature = SIGNATURES[node.name]
        tensors, given = bind_arguments(node, self.source)
        values = [drop_if_lacking(tensor, self.value_of(tensor, case), case) for tensor in tensors]
        for tensor, value in zip(tensors, values, strict=True):
            total, first = value.sum.total, values[0].sum.total
            if signature.of_changes and total:
                what = f"takes changes, whose coefficients sum to 0, as in `{signature.example}`; these sum to {total}"
                raise self.error(f"{node.name}(…) {what}", tensor.span)
            if value.outside or total not in (0, 1) or total != first:
                what = f"takes models, or changes, alike: coefficients that sum to 1 (or 0); these sum to {total}"
                raise self.error(f"{node.name}(…) {what}", tensor.span)
        numbers = {name: usual or Fraction(0) for name, usual in signature.numbers.items()}
        for name, operand in given.items():
            numbers[name] = self.value_of(operand, case).number or Fraction(0)
            if fault := fault_of_number(name, numbers[name]):
                raise self.error(fault, operand.span)
        dropped = tuple(text for value in values for text in value.dropped)
        if not any(value.models or value.calls for value in values):
            return Reduction(None, dropped=dropped)
        called = Call(node.name, tuple(value.sum for value in values), tuple(numbers.values()))
        return Reduction(None, dropped=dropped, calls={called: Fraction(1)})

    def value_of(self, node: nodes.Node, case: Case) -> Reduction:
        """The node's value for a key in `blocks` that matches the patterns in `matching`."""
        value = self.plain_value_of(node, case)
        self.check_size(value, node.span)
        return value

    def plain_value_of(self, node: nodes.Node, case: Case) -> Reduction:
        match node:
            case nodes.Number(number):
                return Reduction(number)
            case nodes.Blocks():
                return Reduction(weight_of_blocks(node, case.blocks))
            case nodes.Model(name):
                return Reduction(None, {name: Fraction(1)})
            case nodes.Network(name):
                return Reduction(None, {}, {name: Fraction(1)})
            case nodes.Negation(operand):
                return scale_value(self.value_of(operand, case), Fraction(-1))
            case nodes.Brackets(inside):
                value = self.value_of(inside, case)
                return drop_if_lacking(node, value, case)
            case nodes.Only(pattern, inside, outside):
                chosen = inside if pattern in case.matching else outside
                if chosen is not None:
                    return drop_if_lacking(chosen, self.value_of(chosen, case), case)
                return Reduction(Fraction(0) if kind_of(inside) == "number" else None)
            case nodes.Part(part, inside):
                value = self.value_of(inside, case)
                if part in case.parts:
                    return drop_if_lacking(inside, value, case)
                inside_function = {str(call): weight * call.total for call, weight in value.calls.items()}
                left_out = add_scaled({**value.models, **inside_function}, value.outside, Fraction(1))
                return Reduction(None, outside=left_out)
            case nodes.Function():
                return self.call(node, case)
            case nodes.Product():
                return self.multiply(node, case)
            case nodes.Sum():
                return self.add(node, case)

    def add(self, node: nodes.Sum, case: Case) -> Reduction:
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
                add_scaled(total.calls, value.calls, factor),
            )
        return total

    def multiply(self, node: nodes.Product, case: Case) -> Reduction:
        total = self.value_of(node.first, case)
        for sign, operand in node.rest:
            value = self.value_of(operand, case)
            if value.number is not None:
                total = scale_value(total, 1 / value.number if sign == "/" else value.number)
            elif total.number is not None:
                total = scale_value(value, total.number)
        return total

    def check_size(self, value: Reduction, span: nodes.Span) -> None:
        """Raise FormulaError for fractions too long to be meant."""
        numbers = [value.number or Fraction(0)]
        numbers += [*value.models.values(), *value.networks.values(), *value.calls.values()]
        longest = max(max(number.numerator.bit_length(), number.denominator.bit_length()) for number in numbers)
        if longest > SIZE_LIMIT_BITS:
            raise self.error(f"its numbers multiply to a fraction of more than {SIZE_LIMIT_BITS} bits", span)


def drop_if_lacking(node: nodes.Node, value: Reduction, case: Case) -> Reduction:
    """A difference counts as 0 when one of its members lacks the key."""
    missing = [name for name in value.sum.names() if name in case.lacking]
    total = value.sum.total + sum(value.outside.values(), Fraction(0))
    if not (missing or value.outside) or value.number is not None or total:
        return value
    return Reduction(None, {}, value.networks, {}, (*value.dropped, nodes.format_formula(node)))


def scale_value(value: Reduction, factor: Fraction) -> Reduction:
    if value.number is not None:
        return Reduction(value.number * factor)
    models, networks, outside = (add_scaled({}, each, factor) for each in (value.models, value.networks, value.outside))
    return Reduction(None, models, networks, outside, value.dropped, add_scaled({}, value.calls, factor))


def weight_of_blocks(node: nodes.Blocks, blocks: tuple[str, ...]) -> Fraction:
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
