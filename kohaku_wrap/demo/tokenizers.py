"""Both tokenizers of SDXL in small: CLIP's byte-pair encoding, learned from the embedded world's own words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from kohaku_wrap.formats.sdxl import TOKENIZER_FOLDERS

START, END = "<|startoftext|>", "<|endoftext|>"
"""The last two ids: sd-scripts and older transformers find the end of a text as its highest id."""

WORD_END = "</w>"
MERGES = 600
WORDS = re.compile(r"[^\W\d_]+|\d|(?:[^\s\w]|_)+")
"""CLIP splits text into runs of letters, single digits and runs of other signs."""

Word = tuple[str, ...]


def list_byte_symbols() -> list[str]:
    """A printable character for each of the 256 bytes, in the order of CLIP's vocabulary: `!` is id 0."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def learn_merges(texts: Iterable[str], count: int = MERGES) -> list[tuple[str, str]]:
    """The pairs that byte-pair encoding joins, most frequent first; ties in alphabetical order."""
    found = Counter(word for text in texts for word in WORDS.findall(text.lower()) if word.isascii())
    words: list[tuple[Word, int]] = [((*word[:-1], word[-1] + WORD_END), uses) for word, uses in sorted(found.items())]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, uses in words:
            for pair in pairwise(symbols):
                pairs[pair] += uses
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = [(join_pair(symbols, best), uses) for symbols, uses in words if len(symbols) > 1]
    return merges


def join_pair(symbols: Word, pair: tuple[str, str]) -> Word:
    """The word with every neighbouring `pair` made one symbol."""
    if pair[0] not in symbols:
        return symbols
    first, last = map(re.escape, pair)
    return tuple(re.sub(rf"(?<!\S){first} {last}(?!\S)", lambda _: "".join(pair), " ".join(symbols)).split(" "))


def write_tokenizers(folder: Path, texts: Iterable[str]) -> None:
    """Write both tokenizer folders under `folder`; they differ in padding, as the real ones do."""
    merges = learn_merges(texts)
    alphabet = list_byte_symbols()
    tokens = [*alphabet, *(symbol + WORD_END for symbol in alphabet), *(first + last for first, last in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, START, END])}
    for name, padding in zip(TOKENIZER_FOLDERS, (END, "!"), strict=True):
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": padding}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
        files = {
            "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + "".join(f"{first} {last}\n" for first, last in merges),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
            "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        }
        (folder / name).mkdir(parents=True)
        for file, text in files.items():
            (folder / name / file).write_text(text, encoding="utf-8")
