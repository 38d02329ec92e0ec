"""Cut-offs and grades."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, strategies

from kohaku_wrap.dataset.captions.quality import (
    NEVER,
    UNGRADED,
    SelectionNeeded,
    cutoffs_of_counts,
    find_cutoffs,
    grade_posts,
    tally_favourites,
)
from kohaku_wrap.dataset.captions.recipe import QualityRecipe
from kohaku_wrap.dataset.captions.words import PUBLISHED_CUTOFFS, PUBLISHED_PERCENTILES
from kohaku_wrap.dataset.recipe import read_dataset
from kohaku_wrap.dataset.selection_file import SelectedPosts
from kohaku_wrap.metadata.database import open_database
from kohaku_wrap.metadata.posts import UNKNOWN_NUMBER, merge_counts

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
    favourites = np.array([9, 9, UNKNOWN_NUMBER, 9], dtype=np.int32)
    assert grade_posts(cutoffs, ids, ratings, favourites, 9).tolist() == [0, UNGRADED, UNGRADED, UNGRADED]


def test_published_cutoffs_are_those_of_the_sheet() -> None:
    places = [PUBLISHED_PERCENTILES.index(percentile) for percentile in PERCENTILES]
    assert {rating: [row[place] for place in places] for rating, row in PUBLISHED_CUTOFFS.items()} == {
        "general": [27, 16, 10, 7, 4, 1],
        "sensitive": [56, 30, 19, 13, 8, 2],
        "questionable": [132, 75, 49, 33, 21, 8],
        "explicit": [190, 106, 69, 45, 27, 9],
    }


def recipe_of(cutoffs: str, percentiles: str = "[50, 10]") -> QualityRecipe:
    """As it comes from a recipe file."""
    text = f'[caption.quality]\ncutoffs = "{cutoffs}"\npercentiles = {percentiles}\nwords = ["a", "b", "c"]\n'
    return read_dataset(tomllib.loads(text), "test").caption.quality


def test_cutoffs_come_from_where_the_recipe_says(tmp_path: Path, writer: ModuleType) -> None:
    posts = [writer.make_post(number, rating=number % 2, fav_count=number) for number in range(1, 21)]
    path = writer.write_layout(tmp_path / "a.db", writer.World(posts, [], []))
    database = open_database(path)
    chosen = SelectedPosts(
        np.arange(4),
        np.array([0, 0, 3, -1], dtype=np.int8),
        np.array([100, 200, 7, 9], dtype=np.int32),
        np.zeros(4, dtype=np.int16),
        pa.array(["png"] * 4),
        {},
    )
    never = [NEVER, NEVER]
    # Half of 2, 4 … 20 do not exceed 10, and a tenth of them not 2.
    by_database = [[10, 2], [9, 1], never, never]
    for selection in (None, chosen):
        assert find_cutoffs(recipe_of("database"), database, selection).tolist() == by_database
        published = find_cutoffs(recipe_of("published", "[95, 5]"), database, selection)
        assert published.tolist() == [[37, 1], [81, 1], [182, 4], [262, 4]] and published.dtype == np.int64
    assert find_cutoffs(recipe_of("selection"), database, chosen).tolist() == [[100, 100], never, never, [7, 7]]
    with pytest.raises(SelectionNeeded, match="depend on the selection"):
        find_cutoffs(recipe_of("selection"), database, None)


def test_each_rating_has_its_own_tally() -> None:
    ratings = np.array([0, 1, 2, 3, 3, -1, 1, 2], dtype=np.int8)
    favourites = np.array([5, 6, -4, 8, 8, 9, UNKNOWN_NUMBER, 7], dtype=np.int32)
    tallies = {
        rating: (values.tolist(), counts.tolist())
        for rating, (values, counts) in tally_favourites(ratings, favourites).items()
    }
    assert tallies == {0: ([5], [1]), 1: ([6], [1]), 2: ([-4, 7], [1, 1]), 3: ([8], [2])}
    assert tally_favourites(ratings[:0], favourites[:0]) == {}


def test_ranks_are_whole_numbers() -> None:
    values, ones = np.arange(1, 201), np.ones(200, dtype=np.int64)
    assert cutoffs_of_counts({2: (values, ones)}, (100, 99, 50, 1))[2].tolist() == [200, 198, 100, 2]
    assert cutoffs_of_counts({0: (np.array([3, 9]), np.array([1, 2]))}, (67, 66, 34, 33))[0].tolist() == [9, 9, 9, 3]


def test_grades_by_rating_and_age() -> None:
    cutoffs = np.array([[20, 10, 5], [200, 100, 50], [NEVER] * 3, [9, 8, 7]], dtype=np.int64)
    ids = np.array([1, 2, 3, 4, 5, 6, 7, 8])
    ratings = np.array([0, 0, 0, 0, 1, 2, 3, -1], dtype=np.int8)
    favourites = np.array([21, 20, 10, 5, 21, 10**6, 8, 50], dtype=np.int32)
    levels = [0, 1, 2, 3, 3, 3, 2, UNGRADED]
    found = grade_posts(cutoffs, ids, ratings, favourites, None)
    assert found.tolist() == levels and found.dtype == np.int8
    assert grade_posts(cutoffs, ids, ratings, favourites, 3).tolist() == [*levels[:3], *[UNGRADED] * 5]
    below = np.full(8, UNKNOWN_NUMBER, dtype=np.int32)
    below[0] = -7
    assert grade_posts(cutoffs, ids, ratings, below, None).tolist() == [3, *[UNGRADED] * 7]
    assert UNGRADED == -1  # caption plans look words up by it
