"""Both tokenizers load offline as CLIP's, and learn their pieces by byte-pair encoding."""

from __future__ import annotations

import json

import pytest

from kohaku_wrap.demo.tokenizers import join_pair, learn_merges, list_byte_symbols
from kohaku_wrap.formats.sdxl import TOKENIZER_FOLDERS


def test_merges_join_the_most_frequent_pair_first():
    assert learn_merges(["hat hat hats", "cat"], 3) == [("a", "t</w>"), ("h", "at</w>"), ("a", "t")]


def test_merges_end_when_all_words_are_whole():
    assert learn_merges(["ab"], 100) == [("a", "b</w>")]


def test_join_pair_joins_every_occurrence():
    assert join_pair(("a", "b", "a", "b", "a"), ("a", "b")) == ("ab", "ab", "a")


def test_every_byte_has_its_own_symbol():
    symbols = list_byte_symbols()
    assert len(set(symbols)) == 256
    assert symbols[0] == "!"


@pytest.mark.slow
def test_both_load_offline(world):
    from transformers import CLIPTokenizer

    captions = ["1girl, long hair, >_<, :|, masterpiece", "né — 漢字"]
    padding = []
    for name in TOKENIZER_FOLDERS:
        folder = world.folder / "base" / "tokenizers" / name
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        assert tokenizer.eos_token == "<|endoftext|>"
        assert tokenizer.eos_token_id == max(vocabulary.values()) == len(vocabulary) - 1
        assert tokenizer.model_max_length == 77
        padding.append(tokenizer.pad_token_id)
        for caption in captions:
            ids = tokenizer(caption).input_ids
            assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == caption.replace(" ", "")
        hair = tokenizer("long hair").input_ids
        assert len(hair) == 4, "common tags are one token a word"
    assert padding == [len(vocabulary) - 1, 0]
