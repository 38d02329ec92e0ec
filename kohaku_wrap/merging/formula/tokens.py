"""The words of a merge formula, with their places, and how a fault is shown at one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from kohaku_wrap.errors import UsageError
from kohaku_wrap.merging.formula.tree import Node, Span
from kohaku_wrap.wording import mark_place

LENGTH_LIMIT = 10_000
DEPTH_LIMIT = 64

TOKEN_RULES = re.compile(
    r"""
    (?P<space>[ \t\r\n]+)
  | (?P<number>[0-9]+(?:\.(?!\.)[0-9]*)?|\.[0-9]+)
  | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
  | (?P<string>"[^"\r\n]*")
  | (?P<range>\.\.)
  | (?P<sign>[-+*/(),=])
    """,
    re.VERBOSE,
)


class FormulaError(UsageError):
    """A wrong formula, shown with a mark under the place."""

    def __init__(self, message: str, source: str, span: Span) -> None:
        super().__init__(f"formula: {message}\n{mark_place(source, span.start, max(span.stop - span.start, 1))}")
        self.span = span


@dataclass(frozen=True)
class Token:
    """One word of a formula."""

    kind: str
    """A group name of TOKEN_RULES, or `end`."""

    text: str
    """As written."""

    span: Span
    """Its place in the text."""


def split_tokens(source: str) -> list[Token]:
    """The words of a formula, and an `end` after them.

    Raises FormulaError for a character that no word begins with.
    """
    if len(source) > LENGTH_LIMIT:
        what = f"{len(source):,} characters are more than {LENGTH_LIMIT:,}"
        raise FormulaError(what, source, Span(LENGTH_LIMIT, LENGTH_LIMIT + 1))
    tokens, position = [], 0
    while position < len(source):
        found = TOKEN_RULES.match(source, position)
        if not found:
            character = source[position]
            what = "a pattern's closing quote is missing" if character == '"' else f"unexpected character {character!r}"
            stop = len(source) if character == '"' else position + 1
            raise FormulaError(what, source, Span(position, stop))
        if found.lastgroup != "space":
            tokens.append(Token(str(found.lastgroup), found.group(), Span(position, found.end())))
        position = found.end()
    end = len(source.rstrip())
    return [*tokens, Token("end", "", Span(end, end + 1))]


class Reader:
    """The place reached in a formula's words."""

    def __init__(self, source: str, layout: str = "") -> None:
        self.source, self.layout = source, layout or "sdxl"
        self.tokens = split_tokens(source)
        self.place = 0
        self.depth = 0

    @property
    def token(self) -> Token:
        return self.tokens[self.place]

    def at(self, text: str) -> bool:
        return self.token.text == text and self.token.kind != "string"

    def follows(self, text: str) -> bool:
        """Whether the place reached is a name with `text` after it."""
        return self.token.kind == "name" and self.tokens[self.place + 1].text == text

    def take(self) -> Token:
        token = self.token
        self.place += token.kind != "end"
        return token

    def error(self, message: str, span: Span | None = None) -> FormulaError:
        return FormulaError(message, self.source, span or self.token.span)

    def expect(self, text: str, where: str) -> Token:
        if not self.at(text):
            raise self.error(f"expected '{text}' {where}")
        return self.take()

    def span_from(self, start: Span) -> Span:
        return Span(start.start, self.tokens[max(self.place - 1, 0)].span.stop)

    def nested(self, rule: Callable[[Reader], Node]) -> Node:
        """One level deeper, down to DEPTH_LIMIT."""
        self.depth += 1
        if self.depth > DEPTH_LIMIT:
            raise self.error(f"nested more than {DEPTH_LIMIT} deep")
        node = rule(self)
        self.depth -= 1
        return node
