"""Captions of many rows as numbers of tags, and how often each tag stands in them as the trainer draws them."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.dataset.captions.words import SEPARATOR
from kohaku_wrap.evaluation.caption_loops import BOUNDARY, EMPTY, begin_words, count_captions, count_written
from kohaku_wrap.streams import seeds_of
from kohaku_wrap.training.data.captions import CaptionOptions
from kohaku_wrap.training.data.items import Items

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

COMMA = ","
MARK = "\0"
"""Stands for keep_tokens_separator while captions are split."""

NO_TAGS = {"": EMPTY, MARK: BOUNDARY}

FIRST_WORDS = begin_words()


def split_tags(caption: str, options: CaptionOptions) -> set[str]:
    """The tags of a caption: what stands between commas, line ends and the separators of the dataset's options."""
    boundaries = {COMMA, "\n", SEPARATOR, options.caption_separator, options.keep_tokens_separator} - {""}
    pieces = re.split("|".join(map(re.escape, sorted(boundaries, key=len, reverse=True))), caption)
    return {piece.strip() for piece in pieces} - {""}


@dataclass
class Block:
    """Rows of one subset, split."""

    rows: Int64Array
    """(rows,) in the columns."""

    places: Int64Array
    """(tags,) every tag of the rows once, by its place among those of all rows."""

    tags: npt.NDArray[np.int32]
    """Where in `places`, BOUNDARY or EMPTY, of all rows one after another."""

    starts: Int64Array
    """(rows + 1,) where in `tags` each row begins."""

    odd: BoolArray
    """(rows,) captions that only the trainer's own rules can take apart; their tags are none here."""


class Names:
    """Every tag once, by the place where it is counted; threads may ask at once."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self._lock = threading.Lock()

    def place(self, names: Iterable[str]) -> Int64Array:
        """Where these are counted."""
        places = self.places
        with self._lock:
            return np.array([places.setdefault(name, len(places)) for name in names], dtype=np.int64)


def split_block(
    rows: Int64Array, captions: pa.Array, texts: pa.Array | None, options: CaptionOptions, names: Names
) -> Block:
    """Take the captions of some rows apart; `captions`, `texts`: (rows,)."""
    whole = captions
    if options.caption_prefix:
        whole = pc.binary_join_element_wise(large(options.caption_prefix), whole, large(" "))
    if options.caption_suffix:
        whole = pc.binary_join_element_wise(whole, large(options.caption_suffix), large(" "))
    keep = options.keep_tokens_separator
    odd = as_mask(pc.match_substring_regex(whole, r"[{}\n\x00]" if options.enable_wildcard else r"[\n\x00]"))
    if texts is not None:
        odd |= as_mask(pc.not_equal(texts, ""))
    if keep:
        odd |= as_mask(pc.greater(pc.count_substring(whole, keep), 2))
    if keep != SEPARATOR:
        odd |= as_mask(pc.match_substring(whole, SEPARATOR))
    secondary = options.secondary_separator
    if secondary:
        odd |= as_mask(pc.match_substring(whole, secondary))
    if options.caption_separator != COMMA or COMMA in keep or COMMA in secondary or " " in secondary:
        odd[:] = True
    whole = pc.if_else(pa.array(odd), "", whole)
    if keep:
        whole = pc.replace_substring(whole, keep, f"{COMMA}{MARK}{COMMA}")
    pieces = pc.split_pattern(whole, COMMA)
    encoded = pieces.flatten().dictionary_encode()
    stripped = [piece.strip() for piece in encoded.dictionary.to_pylist()]
    found = np.array([NO_TAGS.get(name, 0) for name in stripped], dtype=np.int64)
    found[found == 0] = names.place(name for name in stripped if name not in NO_TAGS)
    places, codes = np.unique(found, return_inverse=True)
    no_tags = int((places < 0).sum())
    codes = np.where(found < 0, found, codes - no_tags).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(pc.list_value_length(pieces).to_numpy())]).astype(np.int64)
    return Block(rows, places[no_tags:], codes[encoded.indices.to_numpy()], starts, odd)


def large(text: str) -> pa.Scalar:
    """A text of the type of the captions' column."""
    return pa.scalar(text, pa.large_string())


def as_mask(values: pa.Array) -> BoolArray:
    """A boolean array of arrow as one of numpy's own."""
    return np.array(values.to_numpy(zero_copy_only=False), dtype=bool)


@dataclass
class Tally:
    """Counts of one block's tags in captions as drawn."""

    counts: Int64Array
    """(places,) captions with the tag."""

    odd_counts: dict[str, int]
    """The same for tags of odd rows."""

    bare: int = 0
    """Captions without any tag or text."""

    texts: int = 0
    """Captions with a natural-language text."""

    @classmethod
    def of_block(cls, block: Block) -> Tally:
        return cls(np.zeros(len(block.places), dtype=np.int64), {})

    def add_odd(self, tags: Sequence[str] | set[str], weight: int) -> None:
        for tag in tags:
            self.odd_counts[tag] = self.odd_counts.get(tag, 0) + weight


def count_stock(block: Block, captions: Sequence[str], options: CaptionOptions) -> Tally:
    """In how many of the block's captions as written each tag stands; `captions`: of the odd rows."""
    tally = Tally.of_block(block)
    count_written(block.tags, block.starts, tally.counts)
    for caption in captions:
        whole = " ".join([options.caption_prefix, caption, options.caption_suffix])
        # Without wildcards no line but the first is ever trained.
        tally.add_odd(split_tags(whole if options.enable_wildcard else whole.partition("\n")[0], options), 1)
    return tally


def count_block(items: Items, block: Block, place: int, epoch: int, repeat: int, weights: Int64Array) -> Tally:
    """How often each tag of a block is trained in one epoch and repeat.

    `place`: of the block's subset; `weights`: (rows,) how often each row is trained.
    """
    options = items.options.of_subset(place)
    rules, tally = options.captions, Tally.of_block(block)
    plain = np.where(block.odd, 0, weights)
    used = np.flatnonzero(plain)
    ids = items.columns.ids[block.rows[used]].tolist()
    seeds = np.zeros(len(plain), dtype=np.uint64)
    seeds[used] = seeds_of(ids, "item", items.seed, epoch, None, *([repeat] if repeat else []))
    buckets = items.buckets
    spares = np.zeros((0, 2), dtype=np.int64)
    if options.random_crop:
        targets = buckets.resolutions[buckets.bucket_of_image[block.rows]].astype(np.int64)
        spares = np.maximum(buckets.resized_sizes[block.rows].astype(np.int64) - targets, 0)
    every = rules.caption_dropout_every_n_epochs
    tally.bare += count_captions(
        seeds,
        plain,
        spares,
        block.tags,
        block.starts,
        FIRST_WORDS,
        options.flip_aug,
        options.random_crop,
        float(rules.caption_dropout_rate),
        every > 0 and (epoch + 1) % every == 0,
        rules.shuffle_caption or rules.caption_tag_dropout_rate > 0,
        rules.shuffle_caption,
        float(rules.caption_tag_dropout_rate),
        rules.keep_tokens,
        tally.counts,
    )
    for at in np.flatnonzero(np.where(block.odd, weights, 0)).tolist():
        count_odd(items, tally, int(block.rows[at]), epoch, repeat, int(weights[at]))
    return tally


def count_odd(items: Items, tally: Tally, row: int, epoch: int, repeat: int, weight: int) -> None:
    """Count one row by the trainer's own rules."""
    draw, _, _ = items.begin_item(row, epoch, repeat)
    caption, sign, _ = items.draw_tags(row, epoch, repeat, draw)
    has_text = bool(sign) and sign in caption
    tags = split_tags(caption.replace(sign, COMMA) if sign else caption, items.options_of(row).captions)
    tally.add_odd(tags, weight)
    tally.texts += weight * has_text
    tally.bare += weight * (not tags and not has_text)
