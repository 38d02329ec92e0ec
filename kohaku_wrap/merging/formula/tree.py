"""The tree of a merge formula, and its text again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction


@dataclass(frozen=True)
class Span:
    """Where in the formula's text something stands."""

    start: int
    """First character, from 0."""

    stop: int
    """The character after the last."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A part of a formula; parts that differ in nothing but their place are equal."""

    span: Span = field(default=Span(0, 0), compare=False)
    """Its place in the text, for messages."""


@dataclass(frozen=True)
class Number(Placed):
    """An exact decimal: `0.8` is 4/5."""

    value: Fraction
    """At least 0; a sign is a Negation."""


@dataclass(frozen=True)
class Model(Placed):
    """A checkpoint, by the name that a path is bound to."""

    name: str
    """As written."""


@dataclass(frozen=True)
class Network(Placed):
    """`net(name)`: what a network adds to the weights of a checkpoint."""

    name: str
    """As written."""


@dataclass(frozen=True)
class BlockWeight(Placed):
    """One `IN04=0.5` or `OUT00..OUT03=0.8`."""

    first: str
    """The block, or the first of a range."""

    last: str
    """The last of a range; equal to `first` for one block."""

    value: Fraction
    """May be negative."""


@dataclass(frozen=True)
class Blocks(Placed):
    """`blocks(…)`: a number that depends on the block that a tensor belongs to."""

    weights: tuple[BlockWeight, ...]
    """As written; at least one."""

    other: Fraction | None
    """What `else=` says for the blocks not named; None where it is not said, which means 1."""


@dataclass(frozen=True)
class Only(Placed):
    """`only("pattern", inside, else=outside)`: one value for the keys that match, another for the rest."""

    pattern: str
    """Compared with whole keys; `*`, `?` and `[abc]` as in file names."""

    inside: Node
    """For the keys that match."""

    outside: Node | None
    """For the others; None means nothing (0)."""


@dataclass(frozen=True)
class Part(Placed):
    """`unet(x)`: x for the keys of one part of a model; elsewhere as if its models lacked the key."""

    part: str
    """A name of PARTS in blocks."""

    inside: Node
    """A sum of models and networks."""


@dataclass(frozen=True)
class Function(Placed):
    """`slerp(a, b, 0.5)`: a function of calls.SIGNATURES."""

    name: str
    """Its name."""

    operands: tuple[Node, ...]
    """What stands there without a name: checkpoints or changes, then numbers."""

    named: tuple[tuple[str, Node], ...]
    """What stands after a name, as in `seed=7`."""


@dataclass(frozen=True)
class Negation(Placed):
    """`-x`."""

    operand: Node
    """A Negation or an atom."""


@dataclass(frozen=True)
class Brackets(Placed):
    """`(x)`: kept in the tree, because a bracketed difference is a group for the rule of missing keys."""

    inside: Node
    """Any formula."""


@dataclass(frozen=True)
class Product(Placed):
    """`a * b / c`, from left to right."""

    first: Node
    """A Negation or an atom."""

    rest: tuple[tuple[str, Node], ...]
    """`*` or `/`, and the operand; at least one."""


@dataclass(frozen=True)
class Sum(Placed):
    """`a + b - c`, from left to right."""

    first: Node
    """A Product, a Negation or an atom."""

    rest: tuple[tuple[str, Node], ...]
    """`+` or `-`, and the operand; at least one."""


Node = Number | Model | Network | Blocks | Only | Part | Function | Negation | Brackets | Product | Sum


def format_number(value: Fraction) -> str:
    """A decimal with exactly this value.

    Raises ValueError for a fraction that no finite decimal equals.
    """
    denominator, digits = value.denominator, 0
    while 10**digits % denominator:
        digits += 1
        if digits > 4 * denominator.bit_length():
            raise ValueError(f"{value} is not a finite decimal")
    scaled = abs(value.numerator) * (10**digits // denominator)
    text = str(scaled).rjust(digits + 1, "0")
    sign = "-" if value < 0 else ""
    return f"{sign}{text[:-digits]}.{text[-digits:]}" if digits else f"{sign}{text}"


def format_blocks(node: Blocks) -> str:
    parts = [
        f"{weight.first}{'..' + weight.last if weight.last != weight.first else ''}={format_number(weight.value)}"
        for weight in node.weights
    ]
    if node.other is not None:
        parts.append(f"else={format_number(node.other)}")
    return f"blocks({', '.join(parts)})"


def format_formula(node: Node) -> str:
    """The formula's text in one form; parsing it gives an equal tree."""
    match node:
        case Number(value):
            return format_number(value)
        case Model(name):
            return name
        case Network(name):
            return f"net({name})"
        case Blocks():
            return format_blocks(node)
        case Only(pattern, inside, outside):
            tail = "" if outside is None else f", else={format_formula(outside)}"
            return f'only("{pattern}", {format_formula(inside)}{tail})'
        case Part(part, inside):
            return f"{part}({format_formula(inside)})"
        case Function(name, operands, named):
            words = [format_formula(operand) for operand in operands]
            return f"{name}({', '.join(words + [f'{word}={format_formula(operand)}' for word, operand in named])})"
        case Negation(operand):
            return f"-{format_formula(operand)}"
        case Brackets(inside):
            return f"({format_formula(inside)})"
        case Product(first, rest) | Sum(first, rest):
            tail = "".join(f" {sign} {format_formula(operand)}" for sign, operand in rest)
            return format_formula(first) + tail


def parts_of(node: Node) -> list[Node]:
    """What stands directly below a node, in the order of the text."""
    match node:
        case Only(_, inside, outside) if outside is not None:
            return [inside, outside]
        case Negation(inside) | Brackets(inside) | Part(_, inside) | Only(_, inside, _):
            return [inside]
        case Function(_, operands, named):
            return [*operands, *(operand for _, operand in named)]
        case Product(first, rest) | Sum(first, rest):
            return [first, *(operand for _, operand in rest)]
    return []


def walk_formula(node: Node) -> Iterator[Node]:
    """The node and all below it, in the order of the text."""
    yield node
    for part in parts_of(node):
        yield from walk_formula(part)


def names_of_models(node: Node) -> list[str]:
    """The checkpoints of a formula, each once, in the order of their first mention."""
    return list(dict.fromkeys(part.name for part in walk_formula(node) if isinstance(part, Model)))


def names_of_networks(node: Node) -> list[str]:
    """The networks of a formula, each once, in the order of their first mention."""
    return list(dict.fromkeys(part.name for part in walk_formula(node) if isinstance(part, Network)))
