"""What may stand where in a formula: numbers, and checkpoints or changes; and what a function is given."""

from __future__ import annotations

from kohaku_wrap.merging.formula import tree as nodes
from kohaku_wrap.merging.formula.calls import SIGNATURES
from kohaku_wrap.merging.formula.tokens import FormulaError


def kind_of(node: nodes.Node) -> str:
    """`number` or `tensor`."""
    match node:
        case nodes.Number() | nodes.Blocks():
            return "number"
        case nodes.Model() | nodes.Network() | nodes.Part() | nodes.Function():
            return "tensor"
        case nodes.Negation(inner) | nodes.Brackets(inner) | nodes.Only(_, inner, _):
            return kind_of(inner)
        case nodes.Sum(first, _):
            return kind_of(first)
        case nodes.Product():
            return "tensor" if any(kind_of(part) == "tensor" for part in nodes.parts_of(node)) else "number"


def check_kinds(node: nodes.Node, source: str) -> None:
    """Raise FormulaError where an operation has no meaning for weights; what is inside others comes first.

    `source`: the formula's text, for messages.
    """
    for part in nodes.parts_of(node):
        check_kinds(part, source)
    match node:
        case nodes.Part(name, inside) if kind_of(inside) == "number":
            raise FormulaError(f"{name}(…) takes a model, as in {name}(x)", source, node.span)
        case nodes.Only(_, inside, outside) if outside is not None and kind_of(inside) != kind_of(outside):
            raise FormulaError("one side of only(…) is a number and the other is not", source, outside.span)
        case nodes.Function():
            check_function(node, source)
        case nodes.Sum(first, rest):
            for sign, operand in rest:
                if kind_of(operand) != kind_of(first):
                    verb = "added to" if sign == "+" else "subtracted from"
                    what = ("a number", "a model") if kind_of(operand) == "number" else ("a model", "a number")
                    raise FormulaError(f"{what[0]} cannot be {verb} {what[1]}", source, operand.span)
        case nodes.Product():
            check_product(node, source)


def check_product(node: nodes.Product, source: str) -> None:
    tensors = kind_of(node.first) == "tensor"
    for sign, operand in node.rest:
        tensor = kind_of(operand) == "tensor"
        if sign == "/" and tensor:
            raise FormulaError("models can be divided by numbers, not by models", source, operand.span)
        if sign == "/" and any(isinstance(part, nodes.Blocks | nodes.Only) for part in nodes.walk_formula(operand)):
            raise FormulaError("a division is by a plain number; multiply by blocks(…) instead", source, operand.span)
        if tensors and tensor:
            raise FormulaError("two models cannot be multiplied", source, operand.span)
        tensors |= tensor


def check_function(node: nodes.Function, source: str) -> None:
    tensors, _ = bind_arguments(node, source)
    for part in (part for tensor in tensors for part in nodes.walk_formula(tensor)):
        if isinstance(part, nodes.Network):
            what = f"a network cannot stand inside {node.name}(…): bake it into a checkpoint first"
            raise FormulaError(f"{what} (`base + net({part.name})`), and use that", source, part.span)


def bind_arguments(node: nodes.Function, source: str) -> tuple[list[nodes.Node], dict[str, nodes.Node]]:
    """The checkpoints or changes that a function is given, and its numbers by name."""
    signature = SIGNATURES[node.name]
    tensors = [operand for operand in node.operands if kind_of(operand) == "tensor"]
    bare = node.operands[len(tensors) :]
    usage = f"{node.name}(…) is written as in `{signature.example}`"
    if any(kind_of(operand) == "number" for operand in node.operands[: len(tensors)]):
        raise FormulaError(f"{usage}: numbers come last", source, node.span)
    if not signature.least <= len(tensors) <= (signature.most or len(tensors)):
        wanted = f"{signature.least} {'changes' if signature.of_changes else 'models'}"
        wanted = "at least one change" if signature.most is None else wanted
        raise FormulaError(f"{usage}, with {wanted}; here are {len(tensors)}", source, node.span)
    if len(bare) > len(signature.numbers):
        takes = ", ".join(signature.numbers) or "no numbers"
        raise FormulaError(f"{usage}; it takes {takes}", source, bare[len(signature.numbers)].span)
    numbers = dict(zip(signature.numbers, bare, strict=False))
    for name, operand in node.named:
        if name not in signature.numbers or name in numbers or kind_of(operand) == "tensor":
            what = "is given twice" if name in numbers else "is no number of it"
            takes = ", ".join(signature.numbers) or "none"
            raise FormulaError(f"{name}= {what}; {node.name}(…) takes {takes}", source, operand.span)
        numbers[name] = operand
    if missing := [name for name, usual in signature.numbers.items() if usual is None and name not in numbers]:
        raise FormulaError(f"{usage}: {' and '.join(missing)} is missing", source, node.span)
    return tensors, numbers
