"""Layout v0's tag lists: `$1A#$2B#` in `post.tag_list`, read many posts at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kohaku_wrap.errors import KwrapError

LONGEST_TOKEN = 12
START, END = ord("$"), ord("#")


class TagListUnreadable(KwrapError):
    """A `post.tag_list` is not a row of `$ID#` tokens."""


def _digit_values() -> npt.NDArray[np.int64]:
    """The value of each byte as a digit, -1 for what is none; letters count in either case."""
    values = np.full(256, -1, dtype=np.int64)
    for value, pair in enumerate(
        [(d, d) for d in "0123456789"] + [(c, c.lower()) for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    ):
        for character in pair:
            values[ord(character)] = value
    return values


DIGITS = _digit_values()


def parse_tag_lists(
    post_ids: npt.NDArray[np.int64], lists: pa.Array, base: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The index of the post and the tag id of each token: (tokens,) each, in the order of the text.

    `lists` has no nulls. Raises TagListUnreadable with the first post whose list is something else.
    """
    offsets = np.frombuffer(lists.buffers()[1], dtype=np.int32)[lists.offset : lists.offset + len(lists) + 1]
    text = lists.buffers()[2]
    data = np.frombuffer(text, dtype=np.uint8)[offsets[0] : offsets[-1]] if text else np.empty(0, dtype=np.uint8)
    bounds = offsets.astype(np.int64) - int(offsets[0])
    starts = np.flatnonzero(data == START)
    ends = np.flatnonzero(data == END)
    digits = DIGITS[data]
    if len(starts) != len(ends) or len(starts) + len(ends) + int((digits >= 0).sum()) != len(data):
        raise _unreadable(post_ids, bounds, data, digits, base)
    lengths = ends - starts - 1
    # The first token begins with the text, every other right after the one before it.
    follows = np.empty(len(starts), dtype=bool)
    if len(starts):
        follows[0] = starts[0] == 0
        np.equal(starts[1:], ends[:-1] + 1, out=follows[1:])
    too_large = bool((digits >= base).any())
    if len(starts) and (not follows.all() or lengths.min() < 1 or lengths.max() > LONGEST_TOKEN or too_large):
        raise _unreadable(post_ids, bounds, data, digits, base)
    ids = np.zeros(len(starts), dtype=np.int64)
    for place in range(int(lengths.max(initial=0))):
        inside = np.flatnonzero(lengths > place)
        ids[inside] = ids[inside] * base + digits[starts[inside] + 1 + place]
    posts = np.searchsorted(bounds[1:], starts, side="right").astype(np.int32)
    if len(starts) and not np.array_equal(posts, np.searchsorted(bounds[1:], ends, side="right")):
        raise _unreadable(post_ids, bounds, data, digits, base)
    return posts, ids


def _unreadable(
    post_ids: npt.NDArray[np.int64],
    bounds: npt.NDArray[np.int64],
    data: npt.NDArray[np.uint8],
    digits: npt.NDArray[np.int64],
    base: int,
) -> TagListUnreadable:
    """The error for the first list that is not tokens of `base`."""
    allowed = "".join(chr(byte) for byte in range(256) if 0 <= DIGITS[byte] < base)
    for index in range(len(post_ids)):
        text = data[bounds[index] : bounds[index + 1]].tobytes().decode("utf-8", "replace")
        tokens = text.split("#")
        whole = tokens[-1] == "" and all(
            token[:1] == "$" and 0 < len(token) - 1 <= LONGEST_TOKEN and set(token[1:]) <= set(allowed)
            for token in tokens[:-1]
        )
        if text and not whole:
            shown = text if len(text) <= 60 else text[:57] + "…"
            return TagListUnreadable(
                f"post {post_ids[index]}: tag_list {shown!r} is not a row of $ID# tokens with ids in base {base}",
                "The database is damaged or of a layout that kwrap does not know; see `kwrap inspect DB`.",
            )
    return TagListUnreadable("a tag_list is not a row of $ID# tokens", "See `kwrap inspect DB`.")
