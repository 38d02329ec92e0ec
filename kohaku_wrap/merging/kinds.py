"""What may stand where in a formula: numbers, and checkpoints or changes; and what a function is given."""

from __future__ import annotations

from kohaku_wrap.merging.calls import SIGNATURES
from kohaku_wrap.merging.formula import (
    Blocks,
    Brackets,
    Function,
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
    parts_of,
    walk_formula,
)
from kohaku_wrap.merging.tokens import FormulaError


def kind_of(node: Node) -> str:
    """`number` or `tensor`."""
    match node:
        case Number() | Blocks():
            return "number"
        case Model() | Network() | Part() | Function():
            return "tensor"
        case Negation(inner) | Brackets(inner) | Only(_, inner, _):
            return kind_of(inner)
        case Sum(first, _):
            return kind_of(first)
        case Product(first, rest):
            kinds = [kind_of(first), *(kind_of(operand) for _, operand in rest)]
            return "tensor" if "tensor" in kinds else "number"


class KindCheck:
    """Finds operations that have no meaning for weights."""

    def __init__(self, source: str) -> None:
        """`source`: the formula's text, for messages."""
        self.source = source

    def error(self, message: str, span: Span) -> FormulaError:
        return FormulaError(message, self.source, span)

    def check(self, node: Node) -> None:
        """Raise FormulaError where an operation has no meaning for weights; what is inside others comes first."""
        for part in parts_of(node):
            self.check(part)
        match node:
            case Part(name, inside) if kind_of(inside) == "number":
                raise self.error(f"{name}(…) takes a model, as in {name}(x)", node.span)
            case Only(_, inside, outside) if outside is not None and kind_of(inside) != kind_of(outside):
                raise self.error("one side of only(…) is a number and the other is not", outside.span)
            case Function():
                self.check_function(node)
            case Sum(first, rest):
                for sign, operand in rest:
                    if kind_of(operand) != kind_of(first):
                        verb = "added to" if sign == "+" else "subtracted from"
                        what = ("a number", "a model") if kind_of(operand) == "number" else ("a model", "a number")
                        raise self.error(f"{what[0]} cannot be {verb} {what[1]}", operand.span)
            case Product():
                self.check_product(node)

    def check_product(self, node: Product) -> None:
        tensors = kind_of(node.first) == "tensor"
        for sign, operand in node.rest:
            tensor = kind_of(operand) == "tensor"
            if sign == "/" and tensor:
                raise self.error("models can be divided by numbers, not by models", operand.span)
            if sign == "/" and any(isinstance(part, Blocks | Only) for part in walk_formula(operand)):
                raise self.error("a division is by a plain number; multiply by blocks(…) instead", operand.span)
            if tensors and tensor:
                raise self.error("two models cannot be multiplied", operand.span)
            tensors |= tensor

    def check_function(self, node: Function) -> None:
        tensors, _ = self.bind_arguments(node)
        for part in (part for tensor in tensors for part in walk_formula(tensor)):
            if isinstance(part, Network):
                what = f"a network cannot stand inside {node.name}(…): bake it into a checkpoint first"
                raise self.error(f"{what} (`base + net({part.name})`), and use that", part.span)

    def bind_arguments(self, node: Function) -> tuple[list[Node], dict[str, Node]]:
        """The checkpoints or changes that a function is given, and its numbers by name."""
        signature = SIGNATURES[node.name]
        tensors = [operand for operand in node.operands if kind_of(operand) == "tensor"]
        bare = node.operands[len(tensors) :]
        usage = f"{node.name}(…) is written as in `{signature.example}`"
        if any(kind_of(operand) == "number" for operand in node.operands[: len(tensors)]):
            raise self.error(f"{usage}: numbers come last", node.span)
        if not signature.least <= len(tensors) <= (signature.most or len(tensors)):
            wanted = f"{signature.least} {'changes' if signature.of_changes else 'models'}"
            wanted = "at least one change" if signature.most is None else wanted
            raise self.error(f"{usage}, with {wanted}; here are {len(tensors)}", node.span)
        if len(bare) > len(signature.numbers):
            takes = ", ".join(signature.numbers) or "no numbers"
            raise self.error(f"{usage}; it takes {takes}", bare[len(signature.numbers)].span)
        numbers = dict(zip(signature.numbers, bare, strict=False))
        for name, operand in node.named:
            if name not in signature.numbers or name in numbers or kind_of(operand) == "tensor":
                what = "is given twice" if name in numbers else "is no number of it"
                takes = ", ".join(signature.numbers) or "none"
                raise self.error(f"{name}= {what}; {node.name}(…) takes {takes}", operand.span)
            numbers[name] = operand
        if missing := [name for name, usual in signature.numbers.items() if usual is None and name not in numbers]:
            raise self.error(f"{usage}: {' and '.join(missing)} is missing", node.span)
        return tensors, numbers
