"""Captions of many posts at once: elements in order, their texts taken into one buffer, cut between posts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from kohaku_wrap.arrays import BoolArray, Int32Array, Int64Array
from kohaku_wrap.dataset.captions.plan import FATES, NOT_A_TAG, WRITTEN, CaptionPlan
from kohaku_wrap.dataset.captions.quality import UNGRADED, grade_posts
from kohaku_wrap.dataset.counts import Counts
from kohaku_wrap.dataset.selection_file import SelectedPosts
from kohaku_wrap.dataset.years import UNKNOWN_YEAR
from kohaku_wrap.metadata.chunks import TagChunk
from kohaku_wrap.metadata.posts import UNKNOWN_NUMBER

POST_COUNTS = (
    "without_tags",
    "unknown_date",
    "year_without_word",
    "unknown_rating",
    "unknown_favourites",
    "without_quality_word",
)
"""Posts that lack something, counted; a post may count under several."""


@dataclass
class CaptionCounts(Counts):
    """What was counted while captions were made."""

    posts: int = 0
    """Captions made."""

    tags: Int64Array = field(default_factory=lambda: np.zeros(len(FATES), dtype=np.int64))
    """Tags of the posts by fate."""

    duplicates: int = 0
    """Rows that repeat a tag of the same post."""

    lacking: Int64Array = field(default_factory=lambda: np.zeros(len(POST_COUNTS), dtype=np.int64))
    """Posts by POST_COUNTS."""


@dataclass(frozen=True)
class Elements:
    """The elements of a stretch of captions in the order of the text."""

    of: Int32Array
    """(elements,) index into the plan's elements."""

    begins_part: BoolArray
    """(elements,) true where no comma stands before."""

    ends: Int64Array
    """(posts,) the index after each caption's last element."""

    text_at: Int64Array | None
    """(posts,) the index of the first element after the place of the text; None in a recipe without one."""


def arrange_elements(
    plan: CaptionPlan, chunk: TagChunk, posts: SelectedPosts, cutoffs: Int64Array
) -> tuple[Elements, CaptionCounts]:
    """The elements of the captions of a chunk's posts, and what was counted."""
    size = chunk.stop - chunk.first
    counts = CaptionCounts(posts=size)
    fates = plan.fate_of_tag[chunk.tags]
    counts.tags += np.bincount(fates, minlength=len(FATES))
    owners = chunk.posts
    counts.lacking[0] = size - np.count_nonzero(np.bincount(owners[fates != NOT_A_TAG], minlength=size))
    if counts.tags[WRITTEN] < len(fates):
        written = np.flatnonzero(fates == WRITTEN)
        owners = owners[written]
        elements = plan.element_of_tag[chunk.tags[written]]
    else:
        elements = plan.element_of_tag[chunk.tags]
    if plan.collapse_duplicates:
        repeated = find_repeats(owners, elements, size)
        if len(repeated):
            counts.duplicates = len(repeated)
            owners, elements = np.delete(owners, repeated), np.delete(elements, repeated)
    words, word_owners = words_of_posts(plan, chunk, posts, cutoffs, counts)
    elements = np.concatenate([elements, words])
    keys = np.concatenate([owners, word_owners]).astype(np.int64) << 4
    keys |= plan.slot_of[elements]
    # Post, slot and row in one number: sorting values is several times faster than a stable argsort.
    bits = max(1, len(elements).bit_length())
    keys <<= bits
    keys |= np.arange(len(elements))
    keys.sort()
    order = keys & ((1 << bits) - 1)
    keys >>= bits
    parts = (keys & ~15) | plan.part_of_slot[keys & 15]
    begins_part = np.ones(len(parts), dtype=bool)
    np.not_equal(parts[1:], parts[:-1], out=begins_part[1:])
    ends = np.searchsorted(keys, np.arange(1, size + 1, dtype=np.int64) << 4)
    text_at = None
    if "text" in plan.slots:
        posts_at = np.arange(size, dtype=np.int64) << 4
        text_at = np.searchsorted(keys, posts_at | plan.slots.index("text"))
    return Elements(elements[order], begins_part, ends, text_at), counts


def make_captions(
    plan: CaptionPlan, chunk: TagChunk, posts: SelectedPosts, cutoffs: Int64Array
) -> tuple[pa.Array, CaptionCounts]:
    """(posts,) the captions of a chunk's posts as Arrow strings, and what was counted."""
    elements, counts = arrange_elements(plan, chunk, posts, cutoffs)
    return join_elements(plan, elements)[0], counts


def join_elements(plan: CaptionPlan, elements: Elements) -> tuple[pa.Array, Int32Array | None]:
    """(posts,) the captions as Arrow strings, and the bytes of each before the place of its text."""
    places = elements.of + np.where(elements.begins_part, np.int32(0), np.int32(len(plan.slot_of)))
    texts = plan.texts.take(pa.array(places))
    offsets = np.frombuffer(texts.buffers()[1], dtype=np.int32)
    # Elements of one caption lie side by side in the buffer, so a caption is a slice of it: nothing is joined.
    bounds = np.concatenate([offsets[:1], offsets[elements.ends]])
    captions = pa.StringArray.from_buffers(len(elements.ends), pa.py_buffer(bounds), texts.buffers()[2])
    return captions, None if elements.text_at is None else offsets[elements.text_at] - bounds[:-1]


def find_repeats(owners: Int32Array, elements: Int32Array, posts: int) -> Int64Array:
    """The rows that repeat an element of the same post; the first of each stays."""
    element_bits = int(elements.max(initial=0)).bit_length()
    row_bits = len(elements).bit_length()
    if posts.bit_length() + element_bits + row_bits > 62:
        _, first = np.unique((owners.astype(np.int64) << 32) | elements, return_index=True)
        return np.setdiff1d(np.arange(len(elements)), first)
    keys = ((owners.astype(np.int64) << element_bits) | elements) << row_bits
    keys |= np.arange(len(elements))
    keys.sort()
    pairs = keys >> row_bits
    again = np.flatnonzero(pairs[1:] == pairs[:-1]) + 1
    repeated: Int64Array = keys[again] & ((1 << row_bits) - 1)
    return repeated


def words_of_posts(
    plan: CaptionPlan,
    chunk: TagChunk,
    posts: SelectedPosts,
    cutoffs: Int64Array,
    counts: CaptionCounts,
) -> tuple[Int32Array, Int32Array]:
    """The elements that do not come from tags (separators, quality, year, rating), and the post of each."""
    here = slice(chunk.first, chunk.stop)
    size = chunk.stop - chunk.first
    ratings, favourites, years = posts.ratings[here], posts.favourites[here], posts.years[here]
    columns = [np.full(size, separator, dtype=np.int32) for separator in plan.separators]
    if len(plan.quality):
        levels = grade_posts(cutoffs, posts.ids[here], ratings, favourites, plan.recipe.quality.max_id)
        columns.append(np.where(levels == UNGRADED, -1, plan.quality[levels]).astype(np.int32))
        counts.lacking[5] = int((levels == UNGRADED).sum())
    year_words = plan.years[np.clip(years, 0, len(plan.years) - 1)]
    columns += [year_words, plan.ratings[ratings]]
    counts.lacking[1] = int((years == UNKNOWN_YEAR).sum())
    if "year" in plan.slots:
        counts.lacking[2] = int(((years != UNKNOWN_YEAR) & (year_words < 0)).sum())
    counts.lacking[3] = int((ratings < 0).sum())
    counts.lacking[4] = int((favourites == UNKNOWN_NUMBER).sum())
    words = np.concatenate(columns)
    owners = np.tile(np.arange(size, dtype=np.int32), len(columns))
    there = words >= 0
    return words[there], owners[there]
