r"""Prompts in the webui's grammar: `(x)`, `[x]`, `(x:1.1)`, escapes, `BREAK`; read into weighted pieces, written back.

The rules are those of `parse_prompt_attention` in AUTOMATIC1111/stable-diffusion-webui (modules/prompt_parser.py).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from decimal import Decimal

from kohaku_wrap.errors import UsageError
from kohaku_wrap.wording import mark_place

ROUND = 1.1
SQUARE = 1 / 1.1
BREAK_WEIGHT = -1.0
"""What the webui gives a BREAK; one that brackets change is a word to it."""

TOKEN = re.compile(r"\\[()\[\]\\]|\\|[(\[]|:\s*([+-]?[.\d]+)\s*\)|[)\]]|[^\\()\[\]:]+|:")
BREAK = re.compile(r"\s*\bBREAK\b\s*")
WORDS_THAT_ACT = re.compile(r"\b(?:(BRE)(AK)|(A)(ND))\b")
NO_TEXT = re.compile(r"[\ud800-\udfff]")
COMPOSITION = re.compile(r"\bAND\b")
DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
LIKE_A_NUMBER = re.compile(r"\s*[+-]?(?:[0-9][0-9.,]*(?:e[+-]?[0-9]+)?%?|nan|inf(?:inity)?)\s*", re.IGNORECASE)

MOST_SHOWN = 50
"""Characters of what is wrong."""


class PromptError(UsageError):
    """A wrong prompt, shown with a mark under the place."""

    def __init__(self, message: str, source: str, place: int, length: int = 1, advice: str = "") -> None:
        shown = mark_place(source, place, min(length, MOST_SHOWN))
        super().__init__(f"prompt: {message} at character {place + 1}\n{shown}", advice)
        self.place = place


@dataclass(frozen=True)
class Piece:
    """A stretch of text and its weight."""

    text: str
    """Without escapes; may hold brackets, colons and line breaks."""

    weight: float = 1.0
    """1 where nothing stresses it."""


@dataclass(frozen=True)
class Prompt:
    """A prompt read: no piece is empty, and neighbours differ in weight."""

    parts: tuple[tuple[Piece, ...], ...] = ((),)
    """The pieces between one BREAK and the next."""

    @property
    def text(self) -> str:
        """All words, without weights."""
        return " ".join("".join(piece.text for piece in part) for part in self.parts)


@dataclass
class Bracket:
    """One that is open."""

    place: int
    """Where it stands."""

    first: int
    """The first piece that it covers."""

    colons: list[int] = field(default_factory=list)
    """Where colons stand in it, deeper brackets left out."""

    bars: list[int] = field(default_factory=list)
    """The same of `|`."""


def parse_prompt(source: str, lenient: bool = False) -> Prompt:
    """The pieces of a prompt.

    `lenient`: an open bracket reaches to the end with its weight of 1.1, as in the webui. Raises PromptError.
    """
    return Parser(source, lenient).parse()


class Parser:
    """One reading of a prompt."""

    def __init__(self, source: str, lenient: bool) -> None:
        self.source, self.lenient = source, lenient
        self.found: list[tuple[str, float, bool]] = []
        self.round: list[Bracket] = []
        self.square: list[Bracket] = []

    def parse(self) -> Prompt:
        if odd := NO_TEXT.search(self.source):
            raise PromptError("a byte that is no UTF-8", self.source, odd.start(), 1, "Write it anew, as UTF-8.")
        if composition := COMPOSITION.search(self.source):
            raise PromptError(
                "AND (several prompts composed) is not read", self.source, composition.start(), 3,
                "Write one prompt, or one line each in the file of prompts.",
            )  # fmt: skip
        escaped = False
        for token in TOKEN.finditer(self.source):
            self.take(token, escaped)
            escaped = token[0] == "\\"
        for bracket in (*self.round, *self.square):
            if not self.lenient:
                sign = self.source[bracket.place]
                raise PromptError(
                    f"{sign} is never closed", self.source, bracket.place, 1,
                    f"Close it, write \\{sign} for the character itself, or read it as the webui does with --lenient.",
                )  # fmt: skip
            self.multiply(bracket.first, ROUND if bracket in self.round else SQUARE, bracket.place)
        return self.collect()

    def take(self, token: re.Match[str], escaped: bool) -> None:
        text, weight, place = token[0], token[1], token.start()
        if text[0] == "\\":
            self.add(text[1:])
        elif text == "(":
            self.round.append(Bracket(place, len(self.found)))
        elif text == "[":
            self.square.append(Bracket(place, len(self.found)))
        elif weight is not None and self.round:
            self.multiply(self.round.pop().first, self.read_weight(weight, place), place)
        elif text == ")" and self.round:
            bracket = self.round.pop()
            self.refuse_odd_weight(bracket, place)
            self.multiply(bracket.first, ROUND, place)
        elif text == "]" and self.square:
            bracket = self.square.pop()
            self.refuse_schedule(bracket, place)
            self.multiply(bracket.first, SQUARE, place)
        else:
            self.take_text(text, place, escaped)

    def take_text(self, text: str, place: int, escaped: bool) -> None:
        if innermost := self.innermost():
            innermost.colons += [place] if text == ":" else []
            innermost.bars += [place + at for at, sign in enumerate(text) if sign == "|" and not (escaped and at == 0)]
        position = 0
        for word in BREAK.finditer(text):
            if (self.round or self.square) and not self.lenient:
                raise PromptError(
                    "BREAK inside brackets is a plain word to the webui", self.source, place + word.start(),
                    len(word[0]), "Close the brackets before BREAK and open them again after it.",
                )  # fmt: skip
            self.add(text[position : word.start()])
            self.found.append(("BREAK", BREAK_WEIGHT, True))
            position = word.end()
        self.add(text[position:])

    def innermost(self) -> Bracket | None:
        return max((stack[-1] for stack in (self.round, self.square) if stack), key=lambda one: one.place, default=None)

    def add(self, text: str) -> None:
        self.found.append((text, 1.0, False))

    def multiply(self, first: int, factor: float, place: int) -> None:
        for at in range(first, len(self.found)):
            text, weight, is_break = self.found[at]
            if not math.isfinite(weight * factor):
                raise PromptError("a weight is beyond all numbers", self.source, place, 1, "Write a smaller one.")
            self.found[at] = text, weight * factor, is_break

    def read_weight(self, text: str, place: int) -> float:
        if not DECIMAL.fullmatch(text) or not math.isfinite(float(text)):
            at = self.source.index(text, place)
            raise PromptError(
                f"{text[:MOST_SHOWN]} is not a weight", self.source, at, len(text), "Write a decimal, such as 1.1."
            )
        return float(text)

    def refuse_odd_weight(self, bracket: Bracket, place: int) -> None:
        """Raise PromptError for `(x:1,2)` and `(x:1e3)`, which the webui reads as text with a weight of 1.1."""
        if self.lenient or not bracket.colons:
            return
        text = self.source[bracket.colons[-1] + 1 : place]
        if LIKE_A_NUMBER.fullmatch(text):
            raise PromptError(
                f"{text.strip()[:MOST_SHOWN]} is not a plain decimal", self.source, bracket.colons[-1] + 1, len(text),
                "Write a weight such as 1.1; write \\( and \\) for brackets that are part of a tag.",
            )  # fmt: skip

    def refuse_schedule(self, bracket: Bracket, place: int) -> None:
        """Raise PromptError for `[a:b:0.5]` and `[a|b]`, which change the prompt while a picture is drawn."""
        whole = place + 1 - bracket.place
        advice = "Write \\[ and \\] for the characters themselves, or put both prompts in the sheet."
        if bracket.colons and DECIMAL.fullmatch(self.source[bracket.colons[-1] + 1 : place].strip()):
            raise PromptError("schedules, as [a:b:0.5], are not read", self.source, bracket.place, whole, advice)
        if bracket.bars:
            raise PromptError("alternations, as [a|b], are not read", self.source, bracket.place, whole, advice)

    def collect(self) -> Prompt:
        parts: list[list[Piece]] = [[]]
        for text, weight, is_break in self.found:
            if is_break and weight == BREAK_WEIGHT:
                parts.append([])
            elif text and parts[-1] and parts[-1][-1].weight == weight:
                parts[-1][-1] = Piece(parts[-1][-1].text + text, weight)
            elif text:
                parts[-1].append(Piece(text, weight))
        return Prompt(tuple(map(tuple, parts)))


def format_prompt(prompt: Prompt) -> str:
    """The prompt as text that `parse_prompt` and the webui read into the same pieces."""
    return " BREAK ".join(format_part(part) for part in prompt.parts)


def format_part(pieces: tuple[Piece, ...]) -> str:
    """The pieces between two BREAKs. A lone backslash keeps spaces that BREAK would take."""
    text = "".join(format_piece(piece) for piece in pieces)
    if pieces and pieces[0].weight == 1.0 and pieces[0].text[:1].isspace():
        text = f"\\{text}"
    return f"{text}\\" if pieces and pieces[-1].weight == 1.0 and pieces[-1].text[-1:].isspace() else text


def format_piece(piece: Piece) -> str:
    """One piece, in brackets where it has a weight."""
    text = escape_text(piece.text)
    return text if piece.weight == 1.0 else f"({text}:{format_weight(piece.weight)})"


def escape_text(text: str) -> str:
    r"""Words as a prompt has them: brackets and backslashes escaped; a lone `\`, which is dropped, parts BRE\AK."""
    text = re.sub(r"[\\()\[\]]", r"\\\g<0>", text)
    return WORDS_THAT_ACT.sub(lambda word: "\\".join(filter(None, word.groups())), text)


def format_weight(weight: float) -> str:
    """A plain decimal that gives the same number again."""
    return format(Decimal(repr(weight)), "f")
