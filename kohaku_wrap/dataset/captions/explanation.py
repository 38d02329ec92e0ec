"""One post's caption explained: which tag went where, what was left out and why, how the other words came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kohaku_wrap.dataset.captions.making import arrange_elements, join_elements
from kohaku_wrap.dataset.captions.mixing import BOTH, put_text
from kohaku_wrap.dataset.captions.plan import FATES, WRITTEN, plan_captions
from kohaku_wrap.dataset.captions.quality import find_cutoffs
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.captions.report import describe_cutoffs
from kohaku_wrap.dataset.captions.text_table import TextTable
from kohaku_wrap.dataset.captions.words import SEPARATOR
from kohaku_wrap.dataset.selection_file import SelectedPosts, read_selected_posts
from kohaku_wrap.dataset.years import read_years
from kohaku_wrap.errors import KwrapError, command_line
from kohaku_wrap.metadata.chunks import TagChunk
from kohaku_wrap.metadata.columns import TAG_TYPES
from kohaku_wrap.metadata.filters import RATINGS
from kohaku_wrap.metadata.posts import UNKNOWN_NUMBER, read_posts
from kohaku_wrap.metadata.relations import map_tag_chunks
from kohaku_wrap.metadata.source import Source
from kohaku_wrap.metadata.tags import NO_TAG, read_tags


class NoSuchPost(KwrapError):
    """The database has no post of that id."""


@dataclass(frozen=True)
class ExplainedTag:
    """What became of one tag."""

    name: str
    """As the database has it; empty for a relation row whose tag does not exist."""

    type: str
    """general, artist, character, copyright, meta or unknown."""

    fate: str
    """`written`, or the reason why it is left out."""

    text: str
    """As it stands in the caption; empty when left out."""


@dataclass(frozen=True)
class PostExplanation:
    """A caption and where every part of it comes from."""

    id: int
    """Of the post."""

    caption: str
    """The whole."""

    groups: tuple[tuple[str, tuple[str, ...]], ...]
    """In the order of the caption: group or separator, and its words."""

    tags: tuple[ExplainedTag, ...]
    """In the database's order."""

    rating: str
    """By name, or unknown."""

    fav_count: int | None
    """Favourites."""

    cutoffs: Mapping[str, int | None]
    """By percentile, the `fav_count` to exceed within the rating; None where no post of it was counted."""

    created_at: str
    """As the database has it."""

    year: int | None
    """Of upload, None where it cannot be read."""


def explain_post(
    database: Source,
    recipe: CaptionRecipe,
    post_id: int,
    selection: Path | None = None,
    texts: TextTable | None = None,
) -> PostExplanation:
    """Make and explain the caption of one post, as it is in the captions of `selection`, with its text.

    Raises NoSuchPost.
    """
    recipe = recipe.with_text(texts is not None)
    fits = -(1 << 63) <= post_id < 1 << 63
    ids = np.array([post_id] if fits else [], dtype=np.int64)
    batches = list(read_posts(database, ids))
    if not batches:
        range_of_ids = f"`{command_line('inspect', database.path)}` shows the range of its ids."
        raise NoSuchPost(f"{database.path}: no post {post_id}", range_of_ids)
    row = {name: column[0] for name, column in batches[0].to_pydict().items()}
    parser = "dateutil" if recipe.style == "hakubooru" else "iso"
    posts = SelectedPosts(
        ids=ids,
        ratings=np.array([row["rating"]], dtype=np.int8),
        favourites=np.array([row["fav_count"]], dtype=np.int32),
        years=read_years(batches[0].column("created_at"), parser),
        extensions=batches[0].column("file_ext").dictionary_encode(),
        about={},
    )
    tags = read_tags(database, ids)
    plan = plan_captions(recipe, tags)
    selected = read_selected_posts(selection) if selection else None
    cutoffs = find_cutoffs(plan.recipe.quality, database, selected)
    chunks: list[TagChunk] = list(map_tag_chunks(database, tags, ids, lambda chunk: chunk, 1, None))
    elements, _ = arrange_elements(plan, chunks[0], posts, cutoffs)
    words = [plan.texts[int(element)].as_py() for element in elements.of]
    slots = plan.slot_of[elements.of].tolist()
    groups = tuple(
        (slot, tuple(text for text, place in zip(words, slots, strict=True) if place == number))
        for number, slot in enumerate(plan.slots)
    )
    caption, text_at = join_elements(plan, elements)
    text = texts.texts_of(ids)[0][0].as_py() if texts else ""
    whole = caption[0].as_py() if text_at is None else put_text(caption[0].as_py(), text, int(text_at[0]), BOTH)
    groups = tuple((slot, (text,) if slot == "text" and text else words) for slot, words in groups)
    explained = []
    for tag in chunks[0].tags.tolist():
        fate = int(plan.fate_of_tag[tag])
        explained.append(
            ExplainedTag(
                name="" if tag == NO_TAG else tags.names[tag],
                type="unknown" if tag == NO_TAG or tags.types[tag] < 0 else TAG_TYPES[tags.types[tag]],
                fate=FATES[fate],
                text=plan.texts[int(plan.element_of_tag[tag])].as_py() if fate == WRITTEN else "",
            )
        )
    rating = row["rating"]
    return PostExplanation(
        id=post_id,
        caption=whole,
        groups=tuple((slot, ()) if slot == SEPARATOR else (slot, words) for slot, words in groups),
        tags=tuple(explained),
        rating="unknown" if rating < 0 else RATINGS[rating],
        fav_count=None if row["fav_count"] == UNKNOWN_NUMBER else row["fav_count"],
        cutoffs={} if rating < 0 else describe_cutoffs(plan, cutoffs)[RATINGS[rating]],
        created_at=row["created_at"],
        year=int(posts.years[0]) or None,
    )
