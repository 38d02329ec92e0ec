"""Which posts a loss is measured on, in which chunks, and in which groups it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kohaku_wrap.dataset.buckets import BucketAssignment
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.captions.words import SEPARATOR
from kohaku_wrap.formats.caption_rows import Columns
from kohaku_wrap.sampling.compose import words_of_recipe
from kohaku_wrap.streams import draws, stream_key

GROUPS = ("rating", "year", "quality")
UNKNOWN = "unknown"
TRAIN_TIMESTEPS = 1000

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Grouping:
    """What the captions say of each post."""

    words: Mapping[str, tuple[str, ...]]
    """By group of GROUPS (posts,) the word, or UNKNOWN."""


def list_timesteps(count: int) -> list[int]:
    """The middles of so many equal parts of the time steps, ascending."""
    return [int((2 * place + 1) * TRAIN_TIMESTEPS / (2 * count)) for place in range(count)]


def group_posts(columns: Columns, rows: Sequence[int], recipe: CaptionRecipe) -> Grouping:
    """The rating, year and quality words of captions, by the words of a dataset's recipe."""
    group_of = words_of_recipe(recipe)
    found: dict[str, list[str]] = {name: [] for name in GROUPS}
    for row in rows:
        caption = columns.caption_of(row).replace(SEPARATOR, ",")
        own = [word.strip() for word in caption.split(",")]
        for name in GROUPS:
            # Explicit posts have two rating words, the stronger one last.
            words = [word for word in own if group_of.get(word) == name]
            found[name].append(words[-1] if words else UNKNOWN)
    return Grouping({name: tuple(words) for name, words in found.items()})


def draw_posts(columns: Columns, rows: Int64Array, wanted: int, recipe: CaptionRecipe) -> Int64Array:
    """(posts,) ascending, of `rows`: drawn by their ids alone, of each rating and year in the share that it has."""
    if wanted >= len(rows):
        return rows
    groups = group_posts(columns, rows.tolist(), recipe).words
    strata = np.array([f"{rating}\t{year}" for rating, year in zip(groups["rating"], groups["year"], strict=True)])
    names, inverse, counts = np.unique(strata, return_inverse=True, return_counts=True)
    shares = counts * wanted / len(rows)
    quotas = np.floor(shares).astype(np.int64)
    # The largest remainders get what is left; ties go by name.
    for place in np.argsort(-(shares - quotas), kind="stable")[: wanted - int(quotas.sum())]:
        quotas[place] += 1
    order = np.argsort(draws(stream_key("held-out"), columns.ids[rows]), kind="stable")
    chosen = [order[inverse[order] == place][: quotas[place]] for place in range(len(names))]
    return np.sort(rows[np.concatenate(chosen)])


def cut_chunks(rows: Int64Array, buckets: BucketAssignment, size: int) -> list[list[int]]:
    """Rows of one bucket each, by id, at most `size`: every process cuts them alike."""
    found = []
    of_rows = buckets.bucket_of_image[rows]
    for bucket in np.unique(of_rows).tolist():
        inside = rows[of_rows == bucket]
        found += [inside[start : start + size].tolist() for start in range(0, len(inside), size)]
    return found
