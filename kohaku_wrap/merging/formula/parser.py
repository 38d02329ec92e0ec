"""A merge formula read from its text: one function for each rule of the grammar.

Nothing of a formula is ever evaluated as Python.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from kohaku_wrap.merging.blocks import PARTS, is_block, load_presets, name_numbers
from kohaku_wrap.merging.formula import tree as nodes
from kohaku_wrap.merging.formula.calls import SIGNATURES
from kohaku_wrap.merging.formula.tokens import Reader, Token

DIGITS_LIMIT = 24
RESERVED = ("net", "blocks", "only", "else")


def parse_formula(source: str, layout: str = "") -> nodes.Node:
    """formula := sum end

    `layout`: sdxl (or empty) or sd15, which lists of numbers in blocks(…) are of.
    Raises FormulaError with the place of the first fault.
    """
    reader = Reader(source, layout)
    if reader.token.kind == "end":
        raise reader.error("it is empty; expected a model name")
    node = read_sum(reader)
    if reader.token.kind != "end":
        token = reader.token
        if token.text == ")":
            raise reader.error("unexpected ')': no bracket is open")
        raise reader.error(f"expected '+', '-', '*', '/' or the end before {token.text!r}")
    return node


def read_sum(reader: Reader) -> nodes.Node:
    """sum := product (("+" | "-") product)*"""
    return read_chain(reader, nodes.Sum, ("+", "-"), read_product)


def read_product(reader: Reader) -> nodes.Node:
    """product := factor (("*" | "/") factor)*"""
    return read_chain(reader, nodes.Product, ("*", "/"), read_factor)


def read_chain(
    reader: Reader,
    kind: type[nodes.Sum | nodes.Product],
    signs: tuple[str, str],
    read_operand: Callable[[Reader], nodes.Node],
) -> nodes.Node:
    """chain := operand (sign operand)*, which is the operand itself where no sign follows."""
    start = reader.token.span
    first = read_operand(reader)
    rest = []
    while any(map(reader.at, signs)):
        sign = reader.take()
        rest.append((sign.text, read_operand(reader)))
    return kind(first, tuple(rest), span=reader.span_from(start)) if rest else first


def read_factor(reader: Reader) -> nodes.Node:
    """factor := "-" factor | atom"""
    if reader.at("-"):
        start = reader.take().span
        operand = reader.nested(read_factor)
        return nodes.Negation(operand, span=reader.span_from(start))
    return read_atom(reader)


def read_atom(reader: Reader) -> nodes.Node:
    """atom := NUMBER | NAME | "(" sum ")" | "net" "(" NAME ")" | blocks | only | part | function"""
    token = reader.token
    if token.kind == "number":
        return nodes.Number(read_number(reader), span=token.span)
    if reader.at("("):
        reader.take()
        inside = reader.nested(read_sum)
        reader.expect(")", f"to close the bracket at character {token.span.start + 1}")
        return nodes.Brackets(inside, span=reader.span_from(token.span))
    if token.kind != "name":
        after = f" after '{reader.tokens[reader.place - 1].text}'" if reader.place else ""
        raise reader.error(f"expected a model name{after}")
    reader.take()
    if token.text == "blocks":
        return read_blocks(reader, token.span)
    if token.text == "only":
        return read_only(reader, token.span)
    if token.text == "net":
        reader.expect("(", "after net")
        name = reader.token
        if name.kind != "name" or name.text in RESERVED:
            raise reader.error("expected the network's name in net(…)")
        reader.take()
        reader.expect(")", "after the network's name")
        return nodes.Network(name.text, span=reader.span_from(token.span))
    if token.text in RESERVED:
        raise reader.error(f"'{token.text}' cannot stand here; it belongs inside only(…) or blocks(…)", token.span)
    if reader.at("(") and token.text in PARTS:
        return read_part(reader, token)
    if reader.at("(") and token.text in SIGNATURES:
        return read_function(reader, token)
    if reader.at("("):
        functions = ", ".join(["net", "blocks", "only", *PARTS, *SIGNATURES])
        raise reader.error(f"there is no function '{token.text}'; there are {functions}", token.span)
    return nodes.Model(token.text, span=token.span)


def read_number(reader: Reader) -> Fraction:
    """NUMBER := digits ["." digits] | "." digits, exact, of at most DIGITS_LIMIT digits"""
    token = reader.take()
    if len(token.text.replace(".", "")) > DIGITS_LIMIT:
        raise reader.error(f"a number has at most {DIGITS_LIMIT} digits", token.span)
    following = reader.token
    if following.kind in ("name", "number") and following.span.start == token.span.stop:
        text = token.text + following.text
        raise reader.error(
            f"{text!r} is neither a number nor a name", nodes.Span(token.span.start, following.span.stop)
        )
    return Fraction(token.text + "0" if token.text.endswith(".") else token.text)


def read_signed_number(reader: Reader, where: str) -> Fraction:
    """signed := ["-"] NUMBER"""
    negative = reader.at("-")
    if negative:
        reader.take()
    if reader.token.kind != "number":
        raise reader.error(f"expected a number {where}")
    value = read_number(reader)
    return -value if negative else value


def read_blocks(reader: Reader, start: nodes.Span) -> nodes.Node:
    """blocks := "blocks" "(" (weight ("," weight)* ["," "else" "=" signed] | signed ("," signed)* | STRING) ")" """
    reader.expect("(", "after blocks")
    if reader.token.kind in ("number", "string") or reader.at("-"):
        return read_numbers(reader, start)
    weights: list[nodes.BlockWeight] = []
    other = None
    while True:
        if reader.at("else"):
            reader.take()
            reader.expect("=", "after else")
            other = read_signed_number(reader, "after else=")
            break
        weights.append(read_block_weight(reader))
        if not reader.at(","):
            break
        reader.take()
    reader.expect(")", "or ',' in blocks(…)")
    if not weights:
        raise reader.error("blocks(…) names no block", reader.span_from(start))
    return nodes.Blocks(tuple(weights), other, span=reader.span_from(start))


def read_numbers(reader: Reader, start: nodes.Span) -> nodes.Node:
    """The rest of blocks(…) as people paste it: a number for each block in order, or a preset's name."""
    if reader.token.kind == "string":
        token = reader.take()
        presets = load_presets()
        if token.text[1:-1] not in presets:
            raise reader.error(f"there is no preset {token.text}; there are {', '.join(presets)}", token.span)
        values, layout = presets[token.text[1:-1]], "sdxl"
    else:
        values, layout = [read_signed_number(reader, "in blocks(…)")], reader.layout
        while reader.at(","):
            reader.take()
            values.append(read_signed_number(reader, "in blocks(…)"))
    reader.expect(")", "or ',' in blocks(…)")
    try:
        named = name_numbers(values, layout)
    except ValueError as error:
        raise reader.error(str(error), reader.span_from(start)) from None
    weights = tuple(nodes.BlockWeight(name, name, value) for name, value in named)
    return nodes.Blocks(weights, None, span=reader.span_from(start))


def read_block_weight(reader: Reader) -> nodes.BlockWeight:
    """weight := BLOCK [".." BLOCK] "=" signed"""
    start = reader.token.span
    first = last = read_block(reader)
    if reader.token.kind == "range":
        reader.take()
        last = read_block(reader)
        if first.rstrip("0123456789") != last.rstrip("0123456789") or len(first) != len(last) or first >= last:
            raise reader.error(f"{first}..{last} is not a range of blocks", reader.span_from(start))
    reader.expect("=", f"after the block {last}")
    value = read_signed_number(reader, f"for the block {last}")
    return nodes.BlockWeight(first, last, value, span=reader.span_from(start))


def read_block(reader: Reader) -> str:
    """BLOCK := IN00 … IN11 | MID | OUT00 … OUT11 | BASE | TE | TE1 | TE2 | VAE"""
    token = reader.token
    if token.kind != "name" or not is_block(token.text):
        raise reader.error("expected a block: IN00 to IN11, MID, OUT00 to OUT11, BASE, TE, TE1, TE2 or VAE")
    return reader.take().text


def read_part(reader: Reader, name: Token) -> nodes.Node:
    """part := ("unet" | "te" | "te1" | "te2" | "vae") "(" sum ")" """
    opened = reader.take()
    inside = reader.nested(read_sum)
    reader.expect(")", f"to close the bracket at character {opened.span.start + 1}")
    return nodes.Part(name.text, inside, span=reader.span_from(name.span))


def read_function(reader: Reader, name: Token) -> nodes.Node:
    """function := FUNCTION "(" [argument ("," argument)*] ")"; argument := [NAME "="] sum"""
    opened = reader.take()
    operands: list[nodes.Node] = []
    named: list[tuple[str, nodes.Node]] = []
    while not reader.at(")"):
        word = reader.token
        if reader.follows("="):
            reader.take()
            reader.take()
            named.append((word.text, reader.nested(read_sum)))
        elif named:
            raise reader.error(f"expected NAME=… after {named[-1][0]}=…")
        else:
            operands.append(reader.nested(read_sum))
        if not reader.at(","):
            break
        reader.take()
    reader.expect(")", f"or ',' in the bracket opened at character {opened.span.start + 1}")
    return nodes.Function(name.text, tuple(operands), tuple(named), span=reader.span_from(name.span))


def read_only(reader: Reader, start: nodes.Span) -> nodes.Node:
    """only := "only" "(" STRING "," sum ["," "else" "=" sum] ")" """
    reader.expect("(", "after only")
    pattern = reader.token
    if pattern.kind != "string":
        raise reader.error('expected a pattern in double quotes, as in only("*attn1*", …)')
    if len(pattern.text) <= len('""'):
        raise reader.error("the pattern is empty")
    reader.take()
    reader.expect(",", "after the pattern")
    inside = reader.nested(read_sum)
    outside = None
    if reader.at(","):
        reader.take()
        reader.expect("else", "after ',' in only(…)")
        reader.expect("=", "after else")
        outside = reader.nested(read_sum)
    reader.expect(")", "at the end of only(…)")
    return nodes.Only(pattern.text[1:-1], inside, outside, span=reader.span_from(start))
