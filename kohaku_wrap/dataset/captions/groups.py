"""What captions say of rating, year and quality, and posts drawn from each rating and year alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe, words_of_recipe
from kohaku_wrap.dataset.captions.tokens import split_captions
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.streams import draws, stream_key

GROUPS = ("rating", "year", "quality")
"""Of few words, which are counted one by one."""

STRATA = ("rating", "year")
UNKNOWN = "unknown"
ROWS_A_BLOCK = 1 << 14


@dataclass(frozen=True)
class Grouping:
    """What the captions say of each post."""

    words: Mapping[str, tuple[str, ...]]
    """By group of GROUPS (posts,) the word, or UNKNOWN."""


def find_words(captions: pa.Array, listed: Sequence[str]) -> Int64Array:
    """(captions,) the place in `listed` of the last of its words that a caption has; -1 for none.

    Explicit posts have two rating words, the stronger one last.
    """
    owners, words = split_captions(captions)
    places = pc.fill_null(pc.index_in(words, value_set=pa.array(listed, words.type)), -1).to_numpy()
    found = np.full(len(captions), -1, dtype=np.int64)
    hits = np.flatnonzero(places >= 0)
    found[owners[hits]] = places[hits]
    return found


def list_words(recipe: CaptionRecipe) -> dict[str, list[str]]:
    """The words of each group of GROUPS, then UNKNOWN, which -1 names."""
    group_of = words_of_recipe(recipe)
    return {name: [*sorted(word for word, group in group_of.items() if group == name), UNKNOWN] for name in GROUPS}


def read_captions(columns: Columns, rows: Sequence[int] | Int64Array) -> Iterator[pa.Array]:
    """The captions of rows, some at a time."""
    for start in range(0, len(rows), ROWS_A_BLOCK):
        yield pa.array([columns.caption_of(int(row)) for row in rows[start : start + ROWS_A_BLOCK]], pa.large_string())


def group_posts(columns: Columns, rows: Sequence[int], recipe: CaptionRecipe) -> Grouping:
    """The rating, year and quality words of captions, by the words of a dataset's recipe."""
    listed, found = list_words(recipe), dict[str, list[str]]()
    for captions in read_captions(columns, rows):
        for name, words in listed.items():
            found.setdefault(name, []).extend(words[place] for place in find_words(captions, words[:-1]).tolist())
    return Grouping({name: tuple(found.get(name, ())) for name in GROUPS})


def find_strata(blocks: Iterable[pa.Array], recipe: CaptionRecipe) -> tuple[list[str], Int64Array]:
    """The names of all ratings with all years, sorted, and of each caption the place of its own."""
    listed = list_words(recipe)
    ratings, years = (listed[name] for name in STRATA)
    names = [f"{rating}\t{year}" for rating in ratings for year in years]
    order = sorted(range(len(names)), key=names.__getitem__)
    place_of = np.empty(len(names), dtype=np.int64)
    place_of[order] = np.arange(len(names))
    parts = [np.empty(0, dtype=np.int64)]
    for captions in blocks:
        rating, year = (find_words(captions, listed[name][:-1]) for name in STRATA)
        parts.append(place_of[rating % len(ratings) * len(years) + year % len(years)])
    return [names[each] for each in order], np.concatenate(parts)


def draw_from_strata(ids: Int64Array, strata: Int64Array, wanted: int) -> Int64Array:
    """(posts,) ascending places in `ids`, drawn by the ids alone, of each stratum in the share that it has."""
    if wanted >= len(ids):
        return np.arange(len(ids))
    counts = np.bincount(strata)
    shares = counts * wanted / len(ids)
    quotas = np.floor(shares).astype(np.int64)
    # The largest remainders get what is left; ties go by name.
    for place in np.argsort(-(shares - quotas), kind="stable")[: wanted - int(quotas.sum())]:
        quotas[place] += 1
    order = np.argsort(draws(stream_key("held-out"), ids), kind="stable")
    chosen = [order[strata[order] == place][: quotas[place]] for place in np.flatnonzero(quotas)]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *chosen]))


def draw_posts(columns: Columns, rows: Int64Array, wanted: int, recipe: CaptionRecipe) -> Int64Array:
    """(posts,) ascending, of `rows`: drawn by their ids alone, of each rating and year in the share that it has."""
    if wanted >= len(rows):
        return rows
    _, strata = find_strata(read_captions(columns, rows), recipe)
    return rows[draw_from_strata(columns.ids[rows], strata, wanted)]
