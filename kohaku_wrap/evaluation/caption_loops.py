"""The draws behind many captions, compiled by numba: Python's own generator, its shuffle, and dropout of tags.

Source: CPython's `_randommodule.c` (MT19937 of Matsumoto and Nishimura, 2002, with `init_by_array`) and `random.py`;
the order of the draws is that of `Items.begin_item` and `process_caption`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kohaku_wrap.merging.arithmetic.loops import compiled

WORDS = 624
APART = 397
BOUNDARY, EMPTY = -2, -1
"""Stand among tags for keep_tokens_separator and for a tag without text."""

RANDOM_UNIT = 1.0 / 9007199254740992.0


def begin_words() -> NDArray[np.uint32]:
    """The generator's 624 words before a seed is mixed in: `init_genrand(19650218)`."""
    words = [19650218]
    for place in range(1, WORDS):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + place) & 0xFFFFFFFF)
    return np.array(words, dtype=np.uint32)


@compiled
def mix(word: Any, before: Any, factor: int) -> Any:
    """A word of the state, changed by the one before it."""
    left = np.uint32(before ^ np.uint32(before >> np.uint32(30)))
    return np.uint32(word ^ np.uint32(left * np.uint32(factor)))


@compiled
def seed_words(words: NDArray[Any], first_words: NDArray[Any], seed: Any) -> None:
    """Set the generator as `random.Random(seed)` does, for a seed below 2**64."""
    words[:] = first_words
    low, high = np.uint32(seed & np.uint64(0xFFFFFFFF)), np.uint32(seed >> np.uint64(32))
    place, is_second = 1, False
    for _ in range(WORDS):
        key = np.uint32(high + np.uint32(1)) if is_second else low
        words[place] = np.uint32(mix(words[place], words[place - 1], 1664525) + key)
        is_second = bool(high > 0) and not is_second
        place += 1
        if place == WORDS:
            words[0] = words[WORDS - 1]
            place = 1
    for _ in range(WORDS - 1):
        words[place] = np.uint32(mix(words[place], words[place - 1], 1566083941) - np.uint32(place))
        place += 1
        if place == WORDS:
            words[0] = words[WORDS - 1]
            place = 1
    words[0] = np.uint32(0x80000000)


@compiled
def next_word(words: NDArray[Any], place: NDArray[Any]) -> Any:
    """The generator's next 32 bits; `place`: (1,) the word that is renewed for them."""
    here = place[0]
    after = here + 1 if here + 1 < WORDS else 0
    far = here + APART if here + APART < WORDS else here + APART - WORDS
    both = np.uint32((words[here] & np.uint32(0x80000000)) | (words[after] & np.uint32(0x7FFFFFFF)))
    odd = np.uint32(np.uint32(both & np.uint32(1)) * np.uint32(0x9908B0DF))
    bits = np.uint32(words[far] ^ np.uint32(both >> np.uint32(1)) ^ odd)
    words[here] = bits
    place[0] = after
    bits = np.uint32(bits ^ np.uint32(bits >> np.uint32(11)))
    bits = np.uint32(bits ^ np.uint32(np.uint32(bits << np.uint32(7)) & np.uint32(0x9D2C5680)))
    bits = np.uint32(bits ^ np.uint32(np.uint32(bits << np.uint32(15)) & np.uint32(0xEFC60000)))
    return np.uint32(bits ^ np.uint32(bits >> np.uint32(18)))


@compiled
def draw_share(words: NDArray[Any], place: NDArray[Any]) -> float:
    """`random()`."""
    high = np.float64(np.uint32(next_word(words, place) >> np.uint32(5)))
    low = np.float64(np.uint32(next_word(words, place) >> np.uint32(6)))
    return float((high * 67108864.0 + low) * RANDOM_UNIT)


@compiled
def draw_below(words: NDArray[Any], place: NDArray[Any], limit: int) -> int:
    """`_randbelow(limit)`: from 0 to `limit` - 1, for a limit of 32 bits."""
    bits, rest = 0, limit
    while rest:
        bits += 1
        rest >>= 1
    found = np.int64(next_word(words, place) >> np.uint32(32 - bits))
    while found >= limit:
        found = np.int64(next_word(words, place) >> np.uint32(32 - bits))
    return int(found)


@compiled
def count_captions(
    seeds: NDArray[Any],
    weights: NDArray[Any],
    spares: NDArray[Any],
    tags: NDArray[Any],
    starts: NDArray[Any],
    first_words: NDArray[Any],
    flip: bool,
    crop: bool,
    caption_dropout: float,
    is_dropped: bool,
    splits: bool,
    shuffle: bool,
    tag_dropout: float,
    keep_tokens: int,
    counts: NDArray[Any],
) -> int:
    """Add to `counts`, (tags,) int64, in how many captions each stands as drawn.

    Returns how many captions have no tag.

    `seeds`: (rows,) of the items' generators; `weights`: (rows,) how often each is trained with it, 0 for not at all;
    `spares`: (rows, 2) pixels to crop, read where `crop`; `tags`: numbers of all rows' tags, with BOUNDARY and EMPTY,
    those of row n from `starts[n]` on. `is_dropped`: whether the epoch trains every caption empty; `splits`: whether
    the trainer takes captions apart at all.
    """
    words, place = np.empty(WORDS, np.uint32), np.zeros(1, np.int64)
    noted = np.full(counts.size, -1, np.int64)
    flexible = np.empty(tags.size + 1, np.int64)
    bare = 0
    for row in range(weights.size):
        weight = weights[row]
        if weight == 0:
            continue
        place[0] = 0
        seed_words(words, first_words, seeds[row])
        if flip:
            draw_share(words, place)
        if crop:
            for side in range(2):
                if spares[row, side] > 0:
                    draw_below(words, place, spares[row, side] + 1)
        dropped = caption_dropout > 0 and draw_share(words, place) < caption_dropout
        if dropped or is_dropped:
            bare += weight
            continue
        boundaries = 0
        for at in range(starts[row], starts[row + 1]):
            boundaries += int(tags[at] == BOUNDARY)
        part, kept, size, has_tag = 0, 0, 0, False
        for at in range(starts[row], starts[row + 1]):
            tag = tags[at]
            if tag == BOUNDARY:
                part += 1
            elif splits and (part == 1 if boundaries else kept >= keep_tokens):
                if tag != EMPTY or not boundaries:
                    flexible[size] = tag
                    size += 1
            else:
                kept += 1
                has_tag |= tag != EMPTY
                if tag != EMPTY and noted[tag] != row:
                    noted[tag] = row
                    counts[tag] += weight
        if shuffle:
            for last in range(size - 1, 0, -1):
                other = draw_below(words, place, last + 1)
                flexible[last], flexible[other] = flexible[other], flexible[last]
        for at in range(size):
            tag = flexible[at]
            is_kept = tag_dropout <= 0 or draw_share(words, place) >= tag_dropout
            if is_kept and tag != EMPTY:
                has_tag = True
                if noted[tag] != row:
                    noted[tag] = row
                    counts[tag] += weight
        bare += 0 if has_tag else weight
    return bare


@compiled
def count_written(tags: NDArray[Any], starts: NDArray[Any], counts: NDArray[Any]) -> None:
    """Add to `counts`, (tags,) int64, in how many rows each tag stands; `tags` and `starts` as in `count_captions`."""
    noted = np.full(counts.size, -1, np.int64)
    for row in range(starts.size - 1):
        for at in range(starts[row], starts[row + 1]):
            tag = tags[at]
            if tag >= 0 and noted[tag] != row:
                noted[tag] = row
                counts[tag] += 1
