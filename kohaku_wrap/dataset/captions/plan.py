"""What each tag of a database becomes in a caption: its text, its place, or the reason why it is left out."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from kohaku_wrap.arrays import Int8Array, Int32Array, UInt8Array
from kohaku_wrap.dataset.captions.hakubooru import hakubooru_recipe
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.captions.words import SEPARATOR, breaks_caption
from kohaku_wrap.metadata.filters import RATINGS
from kohaku_wrap.metadata.tags import TagTable

WRITTEN, NOT_A_TAG, BREAKING, META_BLACK_LISTED, ARTIST_BLACK_LISTED, DROPPED, GROUP_OFF, NO_TYPE = range(8)
FATES = (
    "written",
    "not_in_tag_table",
    "would_break_caption",
    "meta_black_list",
    "artist_black_list",
    "drop_pattern",
    "group_left_out",
    "unknown_type",
)
"""What happens to a tag, by the numbers above."""

GROUP_OF_TYPE = ("general", "artist", "character", "series", "meta")
MOST_SLOTS = 16


@dataclass(frozen=True)
class CaptionPlan:
    """A recipe worked out for one tag table.

    Captions are made of elements: the tags by their rows, then the words that do not come from tags. Each element
    has a slot, its place in the order of groups; slots lie in parts, within which a comma stands between elements.
    """

    recipe: CaptionRecipe
    """What was worked out."""

    slots: tuple[str, ...]
    """Groups and separators in the order of the caption."""

    part_of_slot: Int8Array
    """(MOST_SLOTS,) a number a part; each separator is a part of its own."""

    slot_of: UInt8Array
    """(elements,)"""

    texts: pa.Array
    """(2 × elements,) each element's text as the first of its part, then each with a comma before it."""

    element_of_tag: Int32Array
    """(tags,) the element that is written for each tag: its own, or that of its alias."""

    fate_of_tag: UInt8Array
    """(tags + 1,) an index of FATES; the last entry is that of relation rows without a tag."""

    separators: tuple[int, ...]
    """Elements that every caption has."""

    quality: Int32Array
    """(levels,) element of each quality word, best first; empty when the group is left out."""

    years: Int32Array
    """(3000,) element of each year's word, -1 for years without one; all -1 when the group is left out."""

    ratings: Int32Array
    """(5,) element of ratings 0 … 3, and -1 for an unknown one at place -1."""

    collapse_duplicates: bool
    """Whether a tag that a post has twice is written once."""

    unused: tuple[str, ...]
    """Aliases and patterns of the recipe that fit no tag of the database."""


def plan_captions(recipe: CaptionRecipe, tags: TagTable) -> CaptionPlan:
    """Work out what every tag becomes."""
    haku = recipe.style == "hakubooru"
    effective = hakubooru_recipe() if haku else recipe
    separator = f", {SEPARATOR}" if haku else f" {SEPARATOR} "
    slots = (*effective.prefix, SEPARATOR, *effective.shuffled)
    if not haku:
        slots += (SEPARATOR, *effective.suffix)
    group_slots = {group: place for place, group in enumerate(slots) if group != SEPARATOR}
    fates, slot_of, texts, element_of_tag, unused = _plan_tags(effective, tags, group_slots, strip=not haku)

    def add(group_slot: int | None, text: str) -> int:
        if group_slot is None:
            return -1
        texts.append(text)
        slot_of.append(group_slot)
        return len(texts) - 1

    separators = tuple(add(place, separator) for place, slot in enumerate(slots) if slot == SEPARATOR)
    quality = [add(group_slots.get("quality"), word) for word in effective.quality.words]
    years = np.full(3000, -1, dtype=np.int32)
    for entry in effective.years:
        years[max(entry.first, 0) : entry.last + 1] = add(group_slots.get("year"), entry.word)
    ratings = [
        add(group_slots.get("rating"), ", ".join(effective.ratings[rating])) if effective.ratings[rating] else -1
        for rating in RATINGS
    ]
    is_separator = np.array([slot == SEPARATOR for slot in slots])
    part_of_slot = np.zeros(MOST_SLOTS, dtype=np.int8)
    part_of_slot[: len(slots)] = 2 * np.cumsum(is_separator) - is_separator
    plain = pa.array(texts, type=pa.string())
    with_comma = pa.array([f", {text}" for text in texts], type=pa.string())
    return CaptionPlan(
        recipe=effective,
        slots=slots,
        part_of_slot=part_of_slot,
        slot_of=np.array(slot_of, dtype=np.uint8),
        texts=pa.concat_arrays([plain, with_comma]),
        element_of_tag=element_of_tag,
        fate_of_tag=np.array([*fates, NOT_A_TAG], dtype=np.uint8),
        separators=separators,
        quality=np.array([] if "quality" not in group_slots else quality, dtype=np.int32),
        years=years,
        ratings=np.array([*ratings, -1], dtype=np.int32),
        collapse_duplicates=not haku,
        unused=unused,
    )


def _plan_tags(
    recipe: CaptionRecipe, tags: TagTable, group_slots: Mapping[str, int], strip: bool
) -> tuple[list[int], list[int], list[str], Int32Array, tuple[str, ...]]:
    """For each tag its fate, slot, text and element, and what of the recipe fits no tag."""
    people = frozenset(recipe.people_tags) if "people" in group_slots else frozenset()
    names = list(tags.names)
    element_of_tag = np.arange(len(names), dtype=np.int32)
    unused = _apply_aliases(recipe, tags, names, element_of_tag)
    pattern = re.compile("|".join(fnmatch.translate(one) for one in recipe.drop)) if recipe.drop else None
    fates: list[int] = []
    slots: list[int] = []
    texts: list[str] = []
    by_list = recipe.underscores == "kaomoji"
    for name, original, tag_type in zip(names, tags.names, tags.types.tolist(), strict=True):
        text = name if (name in recipe.kaomoji if by_list else len(name) <= 3) else name.replace("_", " ")
        if strip:
            text = text.strip()
        slot = group_slots.get(GROUP_OF_TYPE[tag_type]) if tag_type >= 0 else None
        if name in people and tag_type == 0:
            slot = group_slots["people"]
        if tag_type < 0:
            fate = NO_TYPE
        elif breaks_caption(text):
            fate = BREAKING
        elif tag_type == 4 and any(word in name for word in recipe.drop_meta):
            fate = META_BLACK_LISTED
        elif tag_type == 1 and any(word in name for word in recipe.drop_artist):
            fate = ARTIST_BLACK_LISTED
        elif pattern and (pattern.match(original) or pattern.match(name)):
            fate = DROPPED
        else:
            fate = GROUP_OFF if slot is None else WRITTEN
        fates.append(fate)
        slots.append(slot if fate == WRITTEN and slot is not None else 0)
        texts.append(text if fate == WRITTEN else "")
    # A tag that is written as another one shares that one's fate, unless its own name is left out.
    for row in np.flatnonzero(element_of_tag != np.arange(len(names))).tolist():
        if fates[row] != DROPPED:
            fates[row] = fates[element_of_tag[row]]
    unused += [one for one in recipe.drop if not fnmatch.filter(tags.names, one)]
    return fates, slots, texts, element_of_tag, tuple(unused)


def _apply_aliases(recipe: CaptionRecipe, tags: TagTable, names: list[str], element_of_tag: Int32Array) -> list[str]:
    """Lead aliased tags to their target's row, or rename them where no tag has the target's name."""
    unused: list[str] = []
    renamed: dict[str, int] = {}
    for name, target in recipe.aliases.items():
        row = tags.row_of_name.get(name)
        if row is None:
            unused.append(name)
            continue
        shared = tags.row_of_name.get(target, renamed.get(target))
        if shared is None:
            renamed[target] = row
            names[row] = target
        else:
            element_of_tag[row] = shared
    return unused
