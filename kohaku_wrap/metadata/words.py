"""Tags that stand as words in the posts' own columns: read once, counted by category, and kept by post."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.arrays import Int8Array, Int32Array, Int64Array
from kohaku_wrap.metadata.chunks import TagChunk
from kohaku_wrap.metadata.columns import TAG_TYPES
from kohaku_wrap.metadata.parallel import usable_threads
from kohaku_wrap.metadata.places import NOWHERE, FirstRows, place_finder
from kohaku_wrap.metadata.source import Source
from kohaku_wrap.metadata.spill import Rows, sorted_pieces

POSTS_A_BATCH = 1 << 15
"""Posts whose words are in memory at once, a few of such batches: some 40 MB of text each, and their words."""

TAGS_A_POST = 40
"""About, where nothing counts them."""

GENERAL = TAG_TYPES.index("general")


def split_words(texts: pa.Array) -> tuple[Int64Array, pa.Array]:
    """The words of texts without nulls, blanks between them: the index of the text, and the word."""
    split = pc.ascii_split_whitespace(texts)
    words, owners = pc.list_flatten(split), pc.list_parent_indices(split)
    there = pc.not_equal(words, "")
    if not pc.all(there).as_py():
        words, owners = words.filter(there), owners.filter(there)
    return owners.to_numpy(), words


class WordCounts:
    """The different words of posts, and how often each stands in which columns."""

    def __init__(self, kinds: Sequence[int]) -> None:
        """`kinds`: the categories that have a column of their own."""
        self._kinds = kinds
        self._number_of: dict[str, int] = {}
        # (words, categories and, last, all tags of a post)
        self._counts = np.zeros((0, len(TAG_TYPES) + 1), dtype=np.int64)
        self._lock = threading.Lock()

    def add(self, batch: pa.RecordBatch, places: Int32Array) -> Rows:
        """Count a batch of id, tags, and the tags of each category; the words by number of the posts with a place.

        General tags are not counted where the columns of all categories make up the tags of each post: what these
        leave of all tags is general, and they are few.
        """
        _, tags, *columns = batch.columns
        owners, words = split_words(tags)
        encoded = words.dictionary_encode()
        indices = encoded.indices.to_numpy()
        lengths = [pc.binary_length(column).to_numpy() for column in columns]
        blanks = pc.binary_length(tags).to_numpy() - sum(lengths)
        joined = (blanks == len(columns) - 1) | (blanks == sum(length > 0 for length in lengths) - 1)
        is_rest = len(columns) == len(TAG_TYPES) and bool(joined.all())
        counted = [
            (kind, pc.value_counts(split_words(column)[1]))
            for kind, column in zip(self._kinds, columns, strict=True)
            if kind != GENERAL or not is_rest
        ]
        every = np.bincount(indices, minlength=len(encoded.dictionary))
        with self._lock:
            numbers = self._number(encoded.dictionary)
            self._counts[numbers, -1] += every
            self._counts[numbers, GENERAL] += every * is_rest
            for kind, found in counted:
                rows, counts = self._number(found.field(0)), found.field(1).to_numpy()
                self._counts[rows, kind] += counts
                self._counts[rows, GENERAL] -= counts * is_rest
        places = places[owners]
        kept = np.flatnonzero(places != NOWHERE)
        return places[kept], numbers[indices[kept]]

    def _number(self, words: pa.Array) -> Int32Array:
        """The number of each word; new ones get the next."""
        known = self._number_of
        numbers = np.array([known.setdefault(word, len(known)) for word in words.to_pylist()], dtype=np.int32)
        self._counts = np.pad(self._counts, ((0, len(known) - len(self._counts)), (0, 0)))
        return numbers

    def table(self) -> tuple[tuple[str, ...], Int8Array, Int64Array, Int32Array]:
        """Words in the order of the letters, the category in whose columns each stands most often (-1: in none), how
        often it stands in posts, and from a word's number to its place among them."""
        words = list(self._number_of)
        typed = self._counts[:, :-1]
        uses = typed.sum(axis=1)
        if len(self._kinds) < len(TAG_TYPES):
            uses = np.where(self._counts[:, -1] > 0, self._counts[:, -1], uses)
        order = sorted(np.flatnonzero(uses).tolist(), key=words.__getitem__)
        row_of = np.full(len(words), NOWHERE, dtype=np.int32)
        row_of[order] = np.arange(len(order))
        types = np.where(typed.any(axis=1), typed.argmax(axis=1), -1).astype(np.int8)
        return tuple(words[number] for number in order), types[order], uses[order], row_of


def read_words(
    source: Source, post_ids: Int64Array, folder: Path | None
) -> tuple[tuple[str, ...], Int8Array, Int64Array, list[Callable[[], TagChunk]]]:
    """Of all posts `WordCounts.table`, and the tags of `post_ids` (ascending) in chunks, each of which is read once.

    The first of several rows of a post counts for its tags, all of them for the numbers. Until they are read, tags lie
    in files without a name in `folder`, 8 bytes each.
    """
    kinds = source.edition.typed
    columns = ["coalesce(id, -1) AS id", "tags", *(f"tags_{kind}" for kind in kinds)]
    counts, first_rows, place_of = WordCounts(kinds), FirstRows(), place_finder(post_ids)

    def count_batches() -> Iterator[Callable[[], Rows]]:
        for batch in source.scan(f"SELECT {', '.join(columns)} FROM ({source.edition.posts}) AS post", POSTS_A_BATCH):
            ids = batch.column(0).to_numpy()
            places = np.where(first_rows.keep(ids), place_of(ids), NOWHERE).astype(np.int32)
            yield partial(counts.add, batch, places)

    rows = TAGS_A_POST * len(post_ids)
    pieces = list(sorted_pieces(rows, count_batches(), len(post_ids), folder, usable_threads()))
    names, types, uses, row_of = counts.table()

    def read(piece: Callable[[], TagChunk]) -> TagChunk:
        chunk = piece()
        return TagChunk(chunk.first, chunk.stop, chunk.posts, row_of[chunk.tags])

    return names, types, uses, [partial(read, piece) for piece in pieces]
