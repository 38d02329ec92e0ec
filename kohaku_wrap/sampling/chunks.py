"""A prompt cut into chunks of 75 tokens, as the webui cuts it; each chunk is read by the text encoders on its own.

The rules are those of `tokenize_line` in AUTOMATIC1111/stable-diffusion-webui (modules/sd_hijack_clip.py): a chunk
that is full ends behind its last comma where that is among its last 20 tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from kohaku_wrap.dataset.captions.tokens import ESTIMATED_TOKENS, find_tokenizer, load_tokenizer
from kohaku_wrap.formats.sdxl import CHUNK_TOKENS, TOKENIZER_FOLDERS
from kohaku_wrap.sampling.grammar import Piece, Prompt

TEXT_TOKENS = CHUNK_TOKENS - 2
"""Of a chunk, without its start and its end."""

COMMA_REACH = 20
TOKENIZER_NAMES = tuple(zip(TOKENIZER_FOLDERS, ("tokenizer", "tokenizer_2"), strict=True))
"""Where sd-scripts and diffusers keep the two tokenizers of SDXL."""

SECOND_PADDING = 0
"""The second encoder's chunks are filled with `!`; the first one's with its end token."""


@dataclass(frozen=True)
class Token:
    """One token of a text."""

    id: int
    """Its number in the vocabulary."""

    start: int
    """First character."""

    end: int
    """The character after its last."""


@dataclass(frozen=True)
class Tokenizer:
    """How one text encoder cuts a text."""

    name: str
    """Its folder, or `estimate`."""

    encode: Callable[[str], list[Token]]
    """The tokens of a text, without start and end."""

    comma: int
    """The token of a comma; -1 where there is none."""

    start: int = -1
    """The token before a chunk."""

    end: int = -1
    """The token behind it."""


@dataclass
class Chunk:
    """What is encoded at once, without its start, end and filling."""

    tokens: list[int] = field(default_factory=list)
    """At most 75."""

    weights: list[float] = field(default_factory=list)
    """One a token."""

    pieces: list[Piece] = field(default_factory=list)
    """The texts that the tokens stand for."""


Placed = tuple[Token, Piece]
"""A token and the piece that it comes from; neighbours of a part differ."""


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder."""
    found = load_tokenizer(folder)

    def encode(text: str) -> list[Token]:
        encoded = found.encode(text, add_special_tokens=False)
        return [Token(id, *offsets) for id, offsets in zip(encoded.ids, encoded.offsets, strict=True)]

    def number(word: str) -> int:
        id = found.token_to_id(word)
        return -1 if id is None else int(id)

    return Tokenizer(str(folder), encode, number(",</w>"), number("<|startoftext|>"), number("<|endoftext|>"))


def find_tokenizers(folder: Path | None) -> tuple[Path, Path] | None:
    """The folders of the first and the second encoder's tokenizer, which may be one; None where there is none.

    Raises NoTokenizer where `folder` is given and holds none.
    """
    if folder is not None:
        both = [[folder / name for name in names if (folder / name).is_dir()] for names in TOKENIZER_NAMES]
        if both[0] and both[1]:
            first, second = find_tokenizer(both[0][0]), find_tokenizer(both[1][0])
            return (first, second) if first and second else None
    one = find_tokenizer(folder)
    return (one, one) if one else None


def digest_tokenizers(folders: tuple[Path, Path]) -> str:
    """A sha256 over the files that say how both tokenizers cut a text."""
    digest = hashlib.sha256()
    for folder in folders:
        for name in ("tokenizer.json", "vocab.json", "merges.txt"):
            content = (folder / name).read_bytes() if (folder / name).is_file() else b""
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def load_tokenizers(folder: Path | None) -> tuple[Tokenizer, Tokenizer] | None:
    """Both tokenizers, or None where there are none. Raises NoTokenizer."""
    found = find_tokenizers(folder)
    return (read_tokenizer(found[0]), read_tokenizer(found[1])) if found else None


def estimate(text: str) -> list[Token]:
    """Tokens without a tokenizer: one for each digit and run of signs, one for every five letters begun."""
    return [Token(0 if one[0] == "," else 1, one.start(), one.end()) for one in ESTIMATED_TOKENS.finditer(text)]


ESTIMATE = Tokenizer("estimate", estimate, 0)


def cut_chunks(prompt: Prompt, tokenizer: Tokenizer) -> list[Chunk]:
    """The chunks of a prompt; at least one, which may be empty."""
    full: list[list[Placed]] = []
    for part in prompt.parts:
        full.append([])
        last_comma = -1
        for piece in part:
            for token in tokenizer.encode(piece.text):
                chunk = full[-1]
                if token.id == tokenizer.comma:
                    last_comma = len(chunk)
                elif len(chunk) == TEXT_TOKENS and last_comma != -1 and len(chunk) - last_comma <= COMMA_REACH:
                    full.append(chunk[last_comma + 1 :])
                    del chunk[last_comma + 1 :]
                    last_comma = -1
                if len(full[-1]) == TEXT_TOKENS:
                    full.append([])
                    last_comma = -1
                full[-1].append((token, piece))
    if len(full) > 1 and not full[-1]:
        full.pop()
    return [make_chunk(placed) for placed in full]


def make_chunk(placed: list[Placed]) -> Chunk:
    """Tokens, weights, and the stretches of text that they cover."""
    chunk = Chunk([token.id for token, _ in placed], [piece.weight for _, piece in placed])
    for piece, own in groupby(placed, key=lambda each: each[1]):
        tokens = [token for token, _ in own]
        chunk.pieces.append(Piece(piece.text[tokens[0].start : tokens[-1].end], piece.weight))
    return chunk


def fill_chunk(chunk: Chunk, tokenizer: Tokenizer, padding: int) -> tuple[list[int], list[float]]:
    """77 tokens and their weights: start, the chunk, end, and `padding`."""
    rest = TEXT_TOKENS - len(chunk.tokens)
    tokens = [tokenizer.start, *chunk.tokens, tokenizer.end, *[padding] * rest]
    return tokens, [1.0, *chunk.weights, 1.0, *[1.0] * rest]
