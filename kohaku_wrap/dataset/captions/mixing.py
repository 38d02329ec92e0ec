"""Natural-language captions beside tags: where a text stands, and which of tags, text or both is trained each time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.arrays import Int8Array, Int32Array, Int64Array
from kohaku_wrap.dataset.captions.words import SEPARATOR
from kohaku_wrap.errors import Problem
from kohaku_wrap.streams import draws, stream_key
from kohaku_wrap.toml_files import TableReader

TAGS, TEXT, BOTH = range(3)
"""What a caption is made of; the order of the shares."""

BETWEEN_PARTS = f" {SEPARATOR} "
ALONE = f"{BETWEEN_PARTS}{BETWEEN_PARTS}"
"""After a text that stands alone, so that it is fixed as in any other caption."""


@dataclass(frozen=True)
class TextMix:
    """The shares of images with a text that are trained with each; images without one always have their tags."""

    tags: float = 0.0
    """With the tags only."""

    text: float = 0.0
    """With the text only."""

    both: float = 1.0
    """With the text at its place among the tags."""

    def choose(self, seed: int, epoch: int, ids: Int64Array, repeat: int = 0) -> Int8Array:
        """(images,) TAGS, TEXT or BOTH: a function of seed, epoch, repeat and id alone."""
        shares = draws(stream_key("text", seed, epoch, repeat), ids) / float(1 << 64)
        return np.searchsorted([self.tags, self.tags + self.text], shares, side="right").astype(np.int8)


def read_text_mix(table: Mapping[str, Any], problems: list[Problem]) -> TextMix:
    """The `[caption.text]` table; faults go to `problems`."""
    if not table:
        return TextMix()
    reader = TableReader("caption.text", table, ("tags", "text", "both"), problems)
    shares = [table.get(name, 0.0) for name in ("tags", "text", "both")]
    wrong = [one for one in shares if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one <= 1]
    if wrong or abs(sum(shares) - 1) > 1e-6:
        reader.fault("both", "tags, text and both are shares from 0 to 1 that make 1 together, such as 0.2, 0.3, 0.5")
        return TextMix()
    return TextMix(*map(float, shares))


def put_text(caption: str, text: str, at: int, form: int) -> str:
    """A caption of tags, a text, or both; `at`: the bytes of the caption before the text's place."""
    if form == TAGS or not text:
        return caption
    if form == TEXT:
        return f"{text}{ALONE}"
    whole = caption.encode()
    before, after = whole[:at].decode(), whole[at:].decode()
    begins = not before or before.endswith(BETWEEN_PARTS)
    left = "" if begins else ", "
    right = ", " if begins and after and not after.startswith(BETWEEN_PARTS) else ""
    return f"{before}{left}{text}{right}{after}"


def put_texts(captions: pa.Array, texts: pa.Array, places: Int32Array, forms: Int8Array) -> pa.Array:
    """`put_text` of many; all captions lie one after another in their buffer."""
    _, offsets, data = captions.buffers()
    bounds = np.frombuffer(offsets, np.int32)[captions.offset : captions.offset + len(captions) + 1]
    cuts = np.empty(2 * len(captions) + 1, dtype=np.int32)
    cuts[::2], cuts[1::2] = bounds, bounds[:-1] + places
    halves = pa.StringArray.from_buffers(len(cuts) - 1, pa.py_buffer(cuts), data)
    rows = np.arange(len(captions)) * 2
    before, after = halves.take(pa.array(rows)), halves.take(pa.array(rows + 1))
    begins = pc.or_(pc.equal(before, ""), pc.ends_with(before, BETWEEN_PARTS))
    ends = pc.or_(pc.equal(after, ""), pc.starts_with(after, BETWEEN_PARTS))
    left = pc.if_else(begins, "", ", ")
    right = pc.if_else(pc.and_not(begins, ends), ", ", "")
    both = pc.binary_join_element_wise(before, left, texts, right, after, "")
    form = np.where(np.asarray(pc.equal(texts, "").to_numpy(zero_copy_only=False)), np.int8(TAGS), forms)
    alone = pc.binary_join_element_wise(texts, ALONE, "")
    return pc.choose(pa.array(form), captions, alone, both)
