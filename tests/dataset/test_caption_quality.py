"""Cut-offs and grades."""

from __future__ import annotations

import numpy as np
from hypothesis import given, strategies

from kohaku_wrap.dataset.captions.quality import NEVER, UNGRADED, cutoffs_of_counts, grade_posts, tally_favourites
from kohaku_wrap.dataset.captions.words import PUBLISHED_CUTOFFS, PUBLISHED_PERCENTILES
from kohaku_wrap.metadata.posts import UNKNOWN_FAVOURITES, merge_counts

PERCENTILES = (90, 75, 60, 45, 30, 10)


@given(strategies.lists(strategies.integers(0, 40), min_size=1, max_size=200))
def test_cutoff_is_the_smallest_value_that_enough_posts_do_not_exceed(favourites: list[int]) -> None:
    values = np.array(favourites, dtype=np.int32)
    counts = tally_favourites(np.zeros(len(values), dtype=np.int8), values)
    cutoffs = cutoffs_of_counts(counts, PERCENTILES)
    for percentile, cutoff in zip(PERCENTILES, cutoffs[0].tolist(), strict=True):
        enough = [
            value for value in sorted(set(favourites)) if 100 * (values <= value).sum() >= percentile * len(values)
        ]
        assert cutoff == enough[0]
    assert (cutoffs[1:] == NEVER).all()
    levels = grade_posts(cutoffs, np.arange(len(values)), np.zeros(len(values), dtype=np.int8), values, None)
    for level, value in zip(levels.tolist(), favourites, strict=True):
        assert level == sum(value <= cutoff for cutoff in cutoffs[0].tolist())
    # The best word never goes to more than its share.
    assert (levels == 0).sum() <= 0.1 * len(values)


@given(strategies.lists(strategies.lists(strategies.integers(-5, 20), min_size=1), min_size=1, max_size=5))
def test_tallies_merge(parts: list[list[int]]) -> None:
    merged = merge_counts([np.unique(np.array(part), return_counts=True) for part in parts])
    whole = np.unique(np.array([value for part in parts for value in part]), return_counts=True)
    assert [column.tolist() for column in merged] == [column.tolist() for column in whole]


def test_posts_without_rating_favourites_or_age_are_not_graded() -> None:
    cutoffs = np.full((4, 6), 5, dtype=np.int64)
    ids = np.array([1, 2, 3, 10])
    ratings = np.array([0, -1, 0, 0], dtype=np.int8)
    favourites = np.array([9, 9, UNKNOWN_FAVOURITES, 9], dtype=np.int32)
    assert grade_posts(cutoffs, ids, ratings, favourites, 9).tolist() == [0, UNGRADED, UNGRADED, UNGRADED]


def test_published_cutoffs_are_those_of_the_sheet() -> None:
    places = [PUBLISHED_PERCENTILES.index(percentile) for percentile in PERCENTILES]
    assert {rating: [row[place] for place in places] for rating, row in PUBLISHED_CUTOFFS.items()} == {
        "general": [27, 16, 10, 7, 4, 1],
        "sensitive": [56, 30, 19, 13, 8, 2],
        "questionable": [132, 75, 49, 33, 21, 8],
        "explicit": [190, 106, 69, 45, 27, 9],
    }
