"""How many CLIP tokens texts have: counted with a tokenizer where one is at hand, otherwise estimated."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.dataset.captions.words import SEPARATOR
from kohaku_wrap.errors import UsageError, refusing
from kohaku_wrap.formats.sdxl import TOKENIZERS

CountTokens = Callable[[Sequence[str] | pa.Array], Int64Array]

CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""How CLIP cuts a text before its byte pairs are merged."""

TOKEN_LIMITS = (75, 150, 225)
"""The values of `max_token_length` that trainers have, without the start and end tokens."""

ESTIMATED_TOKENS = re.compile(r"[^\W\d_]{1,5}|\d|_|[^\w\s]+")
ESTIMATED_BY_ARROW = r"\p{L}{1,5}|\p{N}|_|[^\s\p{L}\p{N}_]+"
"""One for each digit and each run of signs, one for every five letters begun; the same as Arrow writes it."""


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class NoTokenizer(UsageError):
    """The folder given for the tokenizer holds none."""


def find_tokenizer(folder: Path | None) -> Path | None:
    """The folder of a CLIP tokenizer: `folder`, or the hub's cache; None where there is none.

    Raises NoTokenizer when `folder` is given and holds none, itself or one level down.
    """
    if folder is not None:
        for candidate in (folder, *sorted(path for path in folder.glob("*") if path.is_dir())):
            if _holds_tokenizer(candidate):
                return candidate
        raise NoTokenizer(
            f"{folder}: no tokenizer.json, nor vocab.json with merges.txt", "Give a CLIP tokenizer's folder."
        )
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"), "hub")
    with suppress(OSError):  # a cache that may not be read is none
        snapshots = sorted(cache.glob(f"models--{TOKENIZERS[0].replace('/', '--')}/snapshots/*"))
        return next((path for path in snapshots if _holds_tokenizer(path)), None)
    return None


def _holds_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )


def load_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer of a folder, as the package `tokenizers` has it: `encode` gives ids and places in the text.

    Raises ModuleNotFoundError without that package, NoTokenizer for damaged files.
    """
    tokenizers: Any = importlib.import_module("tokenizers")
    # The package raises plain exceptions.
    with refusing(NoTokenizer, f"{folder}: a damaged tokenizer:", "Copy a CLIP tokenizer's files again.", Exception):
        return _read_tokenizer(folder, tokenizers)


def _read_tokenizer(folder: Path, tokenizers: Any) -> Any:
    regex, normalizers, pre_tokenizers = tokenizers.Regex, tokenizers.normalizers, tokenizers.pre_tokenizers
    if (folder / "tokenizer.json").is_file():
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    merges = [
        tuple(line.split(" "))
        for line in (folder / "merges.txt").read_text("utf-8").splitlines()
        if line and not line.startswith("#version")
    ]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=json.loads((folder / "vocab.json").read_text("utf-8")),
            merges=merges,
            unk_token="<|endoftext|>",
            end_of_word_suffix="</w>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def load_counter(folder: Path) -> CountTokens:
    """A function from texts to their numbers of CLIP tokens, without the start and end tokens.

    Raises ModuleNotFoundError without the package `tokenizers`.
    """
    tokenizer = load_tokenizer(folder)

    def count(texts: Sequence[str] | pa.Array) -> Int64Array:
        listed = texts.to_pylist() if isinstance(texts, pa.Array) else list(texts)
        encoded = tokenizer.encode_batch(listed, add_special_tokens=False)
        return np.array([len(one.ids) for one in encoded], dtype=np.int64)

    return count


def estimate_tokens(texts: Sequence[str] | pa.Array) -> Int64Array:
    """A guess: one for each digit and each run of signs, one for every five letters begun."""
    counts = pc.count_substring_regex(
        texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string()), ESTIMATED_BY_ARROW
    )
    return np.asarray(counts.to_numpy(), dtype=np.int64)


def join_parts(captions: pa.StringArray) -> pa.StringArray:
    """Captions without their separators, as the trainer joins the parts."""
    joined = pc.replace_substring_regex(captions, rf"\s*\|{{{len(SEPARATOR)}}}\s*", ", ")
    return pc.utf8_trim(pc.replace_substring_regex(joined, "(, )+", ", "), ", ")


def choose_counter(tokenizer: Path | None) -> tuple[str, CountTokens]:
    """The CLIP tokenizer in the folder or the hub's cache, else the estimate; and its name."""
    folder = find_tokenizer(tokenizer)
    if folder is not None:
        try:
            return f"tokenizer {folder}", load_counter(folder)
        except (ModuleNotFoundError, NoTokenizer):
            if tokenizer is not None:
                raise
    return "estimate", estimate_tokens


class Lengths:
    """How many texts have how many tokens."""

    def __init__(self) -> None:
        self._texts = np.zeros(1, dtype=np.int64)
        """By the number of tokens; as long as the longest text needs it."""

    def add(self, tokens: Int64Array) -> None:
        """Count these texts too, by the tokens of each."""
        more = np.bincount(tokens, minlength=len(self._texts))
        more[: len(self._texts)] += self._texts
        self._texts = more

    def quantiles(self) -> dict[str, int]:
        """Nearest-rank quantiles, and the maximum."""
        up_to = np.cumsum(self._texts)
        found = {f"{quantile:.0%}": int(np.searchsorted(up_to, quantile * up_to[-1])) for quantile in QUANTILES}
        return {**found, "maximum": int(np.flatnonzero(self._texts)[-1]) if up_to[-1] else 0}

    def beyond_limits(self) -> dict[str, int]:
        """By each of TOKEN_LIMITS, the texts that are longer."""
        return {str(limit): int(self._texts[limit + 1 :].sum()) for limit in TOKEN_LIMITS}


def split_captions(captions: pa.Array) -> tuple[Int64Array, pa.Array]:
    """What stands between commas and separators, some of it empty: the index of the caption, and the word."""
    split = pc.split_pattern(pc.replace_substring(captions, SEPARATOR, ","), ",")
    return pc.list_parent_indices(split).to_numpy(), pc.utf8_trim_whitespace(pc.list_flatten(split))


def first_lines(captions: pa.Array) -> pa.Array:
    """Captions as far as they are trained: of several lines the first one."""
    return pc.replace_substring_regex(captions, r"(?s)\n.*", "")
