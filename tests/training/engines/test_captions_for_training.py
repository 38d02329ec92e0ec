"""Captions as they are trained: what stays, what is shuffled, what is dropped, and that sd-scripts does the same."""

from __future__ import annotations

import random
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from kohaku_wrap.training.data.captions import CaptionOptions, process_caption

CAPTION = "1girl, hero, artist ||| red hair, blue eyes, hat, dress, smile, sky ||| best quality, safe"
KEPT = CaptionOptions(shuffle_caption=True, caption_tag_dropout_rate=0.5, keep_tokens_separator="|||")


def test_both_ends_stay_and_the_middle_is_shuffled_and_thinned() -> None:
    texts = [process_caption(CAPTION, KEPT, 0, random.Random(seed)) for seed in range(200)]
    middle = [text.removeprefix("1girl, hero, artist").removesuffix(", best quality, safe") for text in texts]
    assert all(len(each) < len(text) - 30 for each, text in zip(middle, texts, strict=True))
    tags = [tag for each in middle for tag in each.split(", ") if tag]
    assert set(tags) == {"red hair", "blue eyes", "hat", "dress", "smile", "sky"}
    assert 0.42 < len(tags) / (200 * 6) < 0.58
    assert len(set(middle)) > 100


def test_one_separator_keeps_the_head_alone() -> None:
    options = CaptionOptions(shuffle_caption=True, keep_tokens_separator="|||")
    text = process_caption("a, b ||| c, d, e", options, 0, random.Random(3))
    assert text.startswith("a, b, ")
    assert set(text.split(", ")) == {"a", "b", "c", "d", "e"}


def test_the_generator_passed_in_is_the_only_source() -> None:
    random.seed(0)
    before = random.getstate()
    first = process_caption(CAPTION, KEPT, 0, random.Random(7))
    assert process_caption(CAPTION, KEPT, 0, random.Random(7)) == first
    assert random.getstate() == before


def test_every_nth_epoch_is_empty() -> None:
    options = CaptionOptions(caption_dropout_every_n_epochs=2)
    assert [process_caption("a", options, epoch, random.Random(0)) for epoch in range(4)] == ["a", "", "a", ""]


OPTIONS = [
    CaptionOptions(),
    KEPT,
    CaptionOptions(shuffle_caption=True, keep_tokens=2),
    CaptionOptions(caption_tag_dropout_rate=0.15, keep_tokens_separator="|||", keep_tokens=1),
    CaptionOptions(shuffle_caption=True, caption_dropout_rate=0.4, caption_prefix="pre", caption_suffix="post"),
    CaptionOptions(shuffle_caption=True, secondary_separator=";;;", caption_separator=", "),
    CaptionOptions(shuffle_caption=True, enable_wildcard=True, caption_tag_dropout_rate=0.2),
    CaptionOptions(caption_dropout_every_n_epochs=3, shuffle_caption=True),
]
CAPTIONS = [
    CAPTION,
    "no separator, here, at all",
    "only one ||| separator, here",
    "a, , b,, ||| , c,  , d ||| ",
    "first line, a\nsecond line, b, c",
    "{red|blue} hair, {{braces}}, x;;;y, z;;;w",
    " ||| tag one, tag two ||| ",
    "three ||| separators, a ||| b ||| c",
]


@pytest.mark.sd_scripts
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_sd_scripts_makes_the_same_texts(options: CaptionOptions, sd_scripts: Any) -> None:
    subset = SimpleNamespace(**asdict(options), token_warmup_step=0, token_warmup_min=1)
    for epoch in range(3):
        trainer = SimpleNamespace(current_epoch=epoch + 1, current_step=0, max_train_steps=10, replacements={})
        for caption in CAPTIONS:
            for seed in range(20):
                random.seed(seed)
                theirs = sd_scripts.train_util.BaseDataset.process_caption(trainer, subset, caption)
                assert process_caption(caption, options, epoch, random.Random(seed)) == theirs
