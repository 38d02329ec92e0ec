"""Layout v0's tag lists."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, strategies

from kohaku_wrap.metadata.relations import TagListUnreadable, parse_tag_lists

LISTS = strategies.lists(strategies.lists(strategies.integers(0, 36**6), max_size=8), max_size=12)


def write(ids: list[int], base: int) -> str:
    return "".join(f"${np.base_repr(one, base)}#" for one in ids)


@given(LISTS, strategies.sampled_from([10, 36]), strategies.booleans())
def test_tokens_come_back(lists: list[list[int]], base: int, lower: bool) -> None:
    texts = [write(ids, base) for ids in lists]
    texts = [text.lower() for text in texts] if lower else texts
    posts, tags = parse_tag_lists(np.arange(len(lists)), pa.array(texts, pa.string()), base)
    assert list(zip(posts.tolist(), tags.tolist(), strict=True)) == [
        (place, tag) for place, ids in enumerate(lists) for tag in ids
    ]


def test_a_slice_of_a_column_is_read_alone() -> None:
    column = pa.array(["$1#", "$2#$3#", "", "$4#"]).slice(1, 2)
    posts, tags = parse_tag_lists(np.array([5, 6]), column, 10)
    assert (posts.tolist(), tags.tolist()) == ([0, 0], [2, 3])


@pytest.mark.parametrize("bad", ["1girl solo", "$12", "12#", "$#", "$1##", "$1 #", "#1$", "$1#x", "$é#", "$1A#"])
def test_other_texts_are_refused_with_the_post(bad: str) -> None:
    with pytest.raises(TagListUnreadable, match="post 77: tag_list"):
        parse_tag_lists(np.array([76, 77, 78]), pa.array(["$1#", bad, "$2#"]), 10)


def test_a_token_over_two_lists_is_refused() -> None:
    with pytest.raises(TagListUnreadable, match="post 1: "):
        parse_tag_lists(np.array([1, 2]), pa.array(["$1", "2#"]), 10)
