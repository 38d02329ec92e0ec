"""Quality words: the percentile of a post's favourites among the posts of its rating."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kohaku_wrap.arrays import Int8Array, Int32Array, Int64Array
from kohaku_wrap.dataset.captions.recipe import QualityRecipe
from kohaku_wrap.dataset.captions.words import PUBLISHED_CUTOFFS, PUBLISHED_PERCENTILES
from kohaku_wrap.dataset.selection_file import SelectedPosts
from kohaku_wrap.errors import UsageError
from kohaku_wrap.metadata.filters import RATINGS
from kohaku_wrap.metadata.posts import UNKNOWN_NUMBER, count_favourites
from kohaku_wrap.metadata.source import Source

UNGRADED = -1
"""Level of a post that gets no quality word."""

NEVER = np.iinfo(np.int64).max
"""Cut-off of a rating that no counted post has."""


class SelectionNeeded(UsageError):
    """Cut-offs of the selection were asked for, and none was given."""


def find_cutoffs(recipe: QualityRecipe, database: Source, selection: SelectedPosts | None) -> Int64Array:
    """(4, percentiles) the `fav_count` that a post of each rating must exceed for each percentile, descending.

    The cut-off of percentile P is the smallest value that at least P % of the rating's posts do not exceed (nearest
    rank). Posts without a rating or without favourites are not counted. Raises SelectionNeeded.
    """
    if recipe.cutoffs == "published":
        places = [PUBLISHED_PERCENTILES.index(percentile) for percentile in recipe.percentiles]
        return np.array([[PUBLISHED_CUTOFFS[rating][place] for place in places] for rating in RATINGS], dtype=np.int64)
    if recipe.cutoffs == "selection":
        if selection is None:
            raise SelectionNeeded(
                "the recipe's quality words depend on the selection", "Give SEL.parquet before --post too."
            )
        counts = tally_favourites(selection.ratings, selection.favourites)
    else:
        counts = count_favourites(database)
    return cutoffs_of_counts(counts, recipe.percentiles)


def tally_favourites(ratings: Int8Array, favourites: Int32Array) -> dict[int, tuple[Int64Array, Int64Array]]:
    """For each known rating, the values of `fav_count` and how many posts have each."""
    known = favourites != UNKNOWN_NUMBER
    counts = {}
    for rating in range(len(RATINGS)):
        values, how_many = np.unique(favourites[known & (ratings == rating)], return_counts=True)
        if len(values):
            counts[rating] = (values.astype(np.int64), how_many.astype(np.int64))
    return counts


def cutoffs_of_counts(counts: Mapping[int, tuple[Int64Array, Int64Array]], percentiles: tuple[int, ...]) -> Int64Array:
    """(4, percentiles) nearest-rank percentiles of each rating's tally."""
    cutoffs = np.full((len(RATINGS), len(percentiles)), NEVER, dtype=np.int64)
    for rating, (values, how_many) in counts.items():
        up_to = np.cumsum(how_many)
        # Whole numbers: rank ≥ P / 100 × posts without rounding.
        ranks = -(-np.array(percentiles, dtype=np.int64) * up_to[-1] // 100)
        cutoffs[rating] = values[np.searchsorted(up_to, ranks)]
    return cutoffs


def grade_posts(
    cutoffs: Int64Array,
    ids: Int64Array,
    ratings: Int8Array,
    favourites: Int32Array,
    max_id: int | None,
) -> Int8Array:
    """(posts,) the index of each post's quality word, 0 the best; UNGRADED where a post gets none."""
    exceeded = favourites[:, None] > cutoffs[np.maximum(ratings, 0)]
    levels: Int8Array = (cutoffs.shape[1] - exceeded.sum(axis=1)).astype(np.int8)
    graded = (ratings >= 0) & (favourites != UNKNOWN_NUMBER)
    if max_id is not None:
        graded &= ids <= max_id
    levels[~graded] = UNGRADED
    return levels
