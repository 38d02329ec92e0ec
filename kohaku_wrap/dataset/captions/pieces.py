"""The captions of a stretch of posts in every form that is written: made, mixed with texts, and put into buffers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from kohaku_wrap.arrays import Int32Array, Int64Array
from kohaku_wrap.dataset.captions import formats as formats_of
from kohaku_wrap.dataset.captions.making import CaptionCounts, arrange_elements, join_elements
from kohaku_wrap.dataset.captions.mixing import BOTH, TextMix, put_texts
from kohaku_wrap.dataset.captions.on_disk import CaptionImages
from kohaku_wrap.dataset.captions.plan import CaptionPlan
from kohaku_wrap.dataset.captions.summary import CaptionSummary, Seen
from kohaku_wrap.dataset.captions.text_table import TextCounts, TextTable
from kohaku_wrap.dataset.captions.tokens import TOKEN_LIMITS, CountTokens, join_parts
from kohaku_wrap.dataset.selection_file import SelectedPosts
from kohaku_wrap.metadata.chunks import TagChunk
from kohaku_wrap.metadata.source import Source


@dataclass(frozen=True)
class Piece:
    """The captions of a stretch of posts in every form that is written."""

    posts: int
    counts: CaptionCounts
    images: slice
    captions: pa.Array
    lines: pa.Buffer | None
    entries: pa.Buffer | None
    text_counts: TextCounts
    texts: tuple[pa.Array, Int32Array] | None
    """Of the images: their texts, and the bytes of each caption before the place of its text."""

    seen: Seen | None
    """What the captions of the images add to the folder's summary."""


@dataclass(frozen=True)
class Work:
    """All that making and writing captions needs, read once."""

    database: Source
    plan: CaptionPlan
    posts: SelectedPosts
    cutoffs: Int64Array
    images: CaptionImages | None
    folder: Path
    formats: tuple[str, ...]
    texts: TextTable | None
    count_tokens: CountTokens
    summary: CaptionSummary | None
    """Of the captions of all images, where there are any."""

    def make_piece(self, chunk: TagChunk) -> Piece:
        """Make the captions of a chunk and put them into buffers of the forms that are one file."""
        elements, counts = arrange_elements(self.plan, chunk, self.posts, self.cutoffs)
        tagged, text_at = join_elements(self.plan, elements)
        captions, own, texts, text_counts = tagged, tagged, None, TextCounts()
        if self.texts and text_at is not None:
            ids = self.posts.ids[chunk.first : chunk.stop]
            texts, text_counts = self.texts.texts_of(ids)
            both = put_texts(tagged, texts, text_at, np.full(len(ids), BOTH, dtype=np.int8))
            lengths = self.count_tokens(join_parts(both))
            text_counts.over = np.array([(lengths > limit).sum() for limit in TOKEN_LIMITS], dtype=np.int64)
            captions = mix_once(self.plan.recipe.text, ids, tagged, texts, text_at)
        here = self.images.slice_of(chunk.first, chunk.stop) if self.images else slice(0, 0)
        with_texts = None
        lines = entries = None
        escaped = formats_of.escape_json(captions) if {"jsonl", "cache"} & set(self.formats) else captions
        prefix = formats_of.path_prefix(self.folder)
        if "jsonl" in self.formats:
            lines = self._lines(chunk, here, escaped, prefix)
        if self.images:
            rows = pa.array(self.images.places[here] - chunk.first)
            own = tagged.take(rows)
            if texts is not None and text_at is not None:
                with_texts = texts.take(rows), text_at[self.images.places[here] - chunk.first]
            if "cache" in self.formats:
                files = self.images.files.slice(here.start, here.stop - here.start)
                sizes = self.images.widths[here], self.images.heights[here]
                entries = formats_of.cache_entries(prefix, files, escaped.take(rows), *sizes)
        seen = self.summary.look_at(here.start, own) if self.summary else None
        return Piece(chunk.stop - chunk.first, counts, here, own, lines, entries, text_counts, with_texts, seen)

    def _lines(self, chunk: TagChunk, here: slice, escaped: pa.Array, prefix: str) -> pa.Buffer:
        """Every post's line: with its image's own name and size, or with the name that it would have."""
        ids = self.posts.ids[chunk.first : chunk.stop]
        files = formats_of.shard_paths(ids, self.posts.extensions.slice(chunk.first, len(ids)))
        widths, heights = np.zeros(len(ids), dtype=np.int32), np.zeros(len(ids), dtype=np.int32)
        if self.images:
            rows = self.images.places[here] - chunk.first
            widths[rows], heights[rows] = self.images.widths[here], self.images.heights[here]
            source = np.arange(len(ids))
            source[rows] = len(ids) + np.arange(len(rows))
            own = self.images.files.slice(here.start, here.stop - here.start)
            files = pa.concat_arrays([files, own]).take(pa.array(source))
        return formats_of.json_lines(prefix, files, escaped, widths, heights)


def mix_once(mix: TextMix, ids: Int64Array, captions: pa.Array, texts: pa.Array, places: Int32Array) -> pa.Array:
    """The captions of files, for which tags, text or both are drawn once, by the id alone."""
    return put_texts(captions, texts, places, mix.choose(0, 0, ids))
