"""Captions as token ids: three chunks of 77, as sd-scripts cuts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_world import CAPTION, World

from kohaku_wrap.training.data.tokens import CaptionTokenizer, TokenizerMissing

CAPTIONS = ["", "hat", CAPTION, ", ".join(["blue eyes"] * 40), ", ".join(["red hair, long dress"] * 90)]


@pytest.mark.parametrize(("length", "chunks"), [(None, 1), (75, 1), (150, 2), (225, 3)])
def test_chunks_begin_with_the_start_and_hold_77(world: World, length: int | None, chunks: int) -> None:
    tokenizer = CaptionTokenizer.load(world.tokenizers, length)
    for caption in CAPTIONS:
        for ids, each in zip(tokenizer(caption), tokenizer.tokenizers, strict=True):
            assert ids.shape == (chunks, 77)
            assert (ids[:, 0] == each.bos_token_id).all()
            assert each.eos_token_id in ids


def test_a_missing_tokenizer_is_named(world: World, tmp_path: Path) -> None:
    with pytest.raises(TokenizerMissing, match="openai_clip-vit-large-patch14"):
        CaptionTokenizer.load(tmp_path, 225)


@pytest.mark.sd_scripts
@pytest.mark.parametrize("length", [None, 75, 150, 225])
def test_sd_scripts_makes_the_same_ids(world: World, sd_scripts: Any, length: int | None) -> None:
    theirs = sd_scripts.strategy.SdxlTokenizeStrategy(length, str(world.tokenizers))
    tokenizer = CaptionTokenizer.load(world.tokenizers, length)
    for caption in CAPTIONS:
        for own, other in zip(tokenizer(caption), theirs.tokenize(caption), strict=True):
            assert torch.equal(own, other[0])
