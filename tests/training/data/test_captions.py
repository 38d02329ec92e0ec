"""Captions as they are trained: what stays, what is shuffled, what is dropped, and that sd-scripts does the same."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kohaku_wrap.processes import ask_python
from kohaku_wrap.trainer.commits import SUPPORTED, SupportedCommit, installed_checkouts
from kohaku_wrap.training.data.captions import CaptionOptions, process_caption
from kohaku_wrap.training.engines.sd_scripts.compare_captions import compare

CAPTION = "1girl, hero, artist ||| red hair, blue eyes, hat, dress, smile, sky ||| best quality, safe"
INSTALLED = {folder.name: folder for folder in installed_checkouts()}
"""Looked up before the tests get a home of their own."""

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
    every = CaptionOptions(caption_dropout_every_n_epochs=1)
    assert [process_caption("a", every, epoch, random.Random(0)) for epoch in range(2)] == ["", ""]


class Drawing(random.Random):
    """Draws this number always, and counts how often it was asked."""

    def __init__(self, number: float) -> None:
        super().__init__(0)
        self.number = number
        self.asked = 0

    def random(self) -> float:
        self.asked += 1
        return self.number


def test_nothing_changes_where_nothing_is_asked_for() -> None:
    untouched = Drawing(0.0)
    for caption in (CAPTION, "a,b , c", "{a|b}, {{c}}", ""):
        assert process_caption(caption, CaptionOptions(), 0, untouched) == caption
    assert process_caption("a, b\nc", CaptionOptions(), 5, untouched) == "a, b"
    assert untouched.asked == 0  # a draw more would move all that follow
    assert CaptionOptions().keep_tokens == CaptionOptions().caption_dropout_every_n_epochs == 0


@pytest.mark.parametrize(("number", "text"), [(0.0, ""), (0.29, ""), (0.3, "a"), (0.9, "a")])
def test_captions_are_dropped_below_the_rate(number: float, text: str) -> None:
    draw = Drawing(number)
    assert process_caption("a", CaptionOptions(caption_dropout_rate=0.3), 0, draw) == text
    assert draw.asked == 1


@pytest.mark.parametrize(("number", "text"), [(0.0, "x"), (0.29, "x"), (0.3, "x, a, b"), (0.9, "x, a, b")])
def test_flexible_tags_are_dropped_below_the_rate(number: float, text: str) -> None:
    draw = Drawing(number)
    options = CaptionOptions(caption_tag_dropout_rate=0.3, keep_tokens=1)
    assert process_caption("x, a, b", options, 0, draw) == text
    assert draw.asked == 2
    # The order stays where nothing is shuffled.
    long = ", ".join("abcdefghij")
    assert process_caption(long, CaptionOptions(caption_tag_dropout_rate=0.01), 0, Drawing(0.5)) == long


def test_every_third_epoch_is_empty_from_the_third_on() -> None:
    options = CaptionOptions(caption_dropout_every_n_epochs=3)
    assert [process_caption("a", options, epoch, random.Random(0)) for epoch in range(6)] == [
        "a",
        "a",
        "",
        "a",
        "a",
        "",
    ]


def test_prefix_and_suffix_stand_with_a_space() -> None:
    options = CaptionOptions(caption_prefix="pre,", caption_suffix="post")
    assert process_caption("a", options, 0, random.Random(0)) == "pre, a post"


def test_kept_tokens_are_counted_with_the_empty_ones() -> None:
    options = CaptionOptions(shuffle_caption=True, keep_tokens=2)
    for seed in range(9):
        tags = process_caption(" a , , b, c, d", options, 0, random.Random(seed)).split(", ")
        assert tags[:2] == ["a", ""] and sorted(tags[2:]) == ["b", "c", "d"]
    # A separator that the caption does not hold leaves the count in force.
    other = CaptionOptions(shuffle_caption=True, keep_tokens=2, keep_tokens_separator="|||")
    assert process_caption("a, b, c", other, 0, random.Random(1)) == "a, b, c"


def test_the_separator_wins_over_the_count_and_empty_tags_go() -> None:
    options = CaptionOptions(caption_tag_dropout_rate=0.5, keep_tokens=3, keep_tokens_separator="|||")
    assert process_caption("a, , ||| b,, c ||| d, ", options, 0, Drawing(0.1)) == "a, d"
    assert process_caption("a, , ||| b,, c ||| d, ", options, 0, Drawing(0.9)) == "a, b, c, d"


def test_the_secondary_separator_comes_last() -> None:
    options = CaptionOptions(shuffle_caption=True, secondary_separator=";;;", caption_separator=",")
    for seed in range(5):
        text = process_caption("x;;;y, z", options, 0, random.Random(seed))
        assert text in ("x,y, z", "z, x,y")


def test_wildcards_take_one_word_and_one_line() -> None:
    options = CaptionOptions(enable_wildcard=True)
    texts = {process_caption("{red|blue} hair, {{a|b}}, {one}", options, 0, random.Random(seed)) for seed in range(30)}
    assert texts == {"red hair, {a|b}, one", "blue hair, {a|b}, one"}
    lines = {process_caption("a\nb {c|d}", options, 0, random.Random(seed)) for seed in range(40)}
    assert lines == {"a", "b c", "b d"}


@pytest.mark.parametrize("caption", ["⦅ {{a}} b", "⦆ {{a}} b", "⦅⦅ ⦆ {{a}} b ⦆⦆⦆"])
def test_braces_stay_braces_beside_the_signs_that_stand_for_them(caption: str) -> None:
    text = process_caption(caption, CaptionOptions(enable_wildcard=True), 0, random.Random(0))
    assert text == caption.replace("{{", "{").replace("}}", "}")


@pytest.mark.parametrize(("joins", "joint"), [(False, ", "), (True, "; ")])
def test_tags_are_joined_as_the_runs_commit_does(joins: bool, joint: str) -> None:
    options = CaptionOptions(shuffle_caption=True, caption_separator=";", joins_by_separator=joins)
    assert set(process_caption("a; b c;d", options, 0, random.Random(1)).split(joint)) == {"a", "b c", "d"}


@pytest.mark.sd_scripts
@pytest.mark.parametrize("commit", SUPPORTED, ids=lambda commit: commit.name)
def test_sd_scripts_makes_the_same_texts_on_each_supported_commit(commit: SupportedCommit) -> None:
    if commit.commit not in INSTALLED:
        pytest.skip(f"not installed; enable with `kwrap trainer install --commit {commit.name}`")
    answer = ask_python("kohaku_wrap.training.engines.sd_scripts.compare_captions", INSTALLED[commit.commit])
    assert answer["joins_by_separator"] == commit.joins_by_separator
    assert answer["texts"] > 1000


def test_a_text_that_is_made_otherwise_is_named() -> None:
    answer = compare(lambda dataset, subset, caption: caption.split("\n")[0].replace("1girl", "1boy"))
    assert "'1boy, solo" in answer["difference"] and "kwrap '1girl, solo" in answer["difference"]


def test_another_count_of_random_numbers_is_named() -> None:
    def process(dataset: Any, subset: Any, caption: str) -> str:
        text = process_caption(caption, CaptionOptions(), 0, random.Random(0))
        random.random()
        return text

    assert "draws another count of random numbers" in compare(process)["difference"]
