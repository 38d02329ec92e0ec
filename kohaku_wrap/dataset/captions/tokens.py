"""How many CLIP tokens texts have: counted with a tokenizer where one is at hand, otherwise estimated."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.errors import UsageError

CountTokens = Callable[[Sequence[str]], npt.NDArray[np.int64]]

CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""How CLIP cuts a text before its byte pairs are merged."""

ESTIMATED_WORDS = re.compile(r"[^\W\d_]+|\d|[^\w\s]+|_")
LETTERS_A_TOKEN = 5


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
    snapshots = sorted(cache.glob("models--openai--clip-vit-large-patch14/snapshots/*"))
    return next((path for path in snapshots if _holds_tokenizer(path)), None)


def _holds_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )


def load_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer of a folder, as the package `tokenizers` has it: `encode` gives ids and places in the text.

    Raises ModuleNotFoundError without that package.
    """
    tokenizers: Any = importlib.import_module("tokenizers")
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

    def count(texts: Sequence[str]) -> npt.NDArray[np.int64]:
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return np.array([len(one.ids) for one in encoded], dtype=np.int64)

    return count


def estimate_tokens(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """A guess: one token for each digit and each run of signs, one for every five letters begun."""
    return np.array([sum(-(-len(word) // LETTERS_A_TOKEN) if word[0].isalpha() else 1
                         for word in ESTIMATED_WORDS.findall(text)) for text in texts], dtype=np.int64)  # fmt: skip
