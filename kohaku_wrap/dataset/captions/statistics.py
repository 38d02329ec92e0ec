"""What the captions of a selection are made of: tag frequencies, shares of the groups, lengths in tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.dataset.captions.making import POST_COUNTS, CaptionCounts, Elements, arrange_elements
from kohaku_wrap.dataset.captions.plan import FATES, CaptionPlan, plan_captions
from kohaku_wrap.dataset.captions.quality import find_cutoffs
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.captions.text_table import TextTable
from kohaku_wrap.dataset.captions.tokens import CountTokens, Lengths, choose_counter
from kohaku_wrap.dataset.captions.words import SEPARATOR
from kohaku_wrap.dataset.selection_file import read_selected_posts
from kohaku_wrap.files import Progress, unheard
from kohaku_wrap.metadata.chunks import RowsOutOfOrder, TagChunk
from kohaku_wrap.metadata.relations import map_tag_chunks
from kohaku_wrap.metadata.source import Source
from kohaku_wrap.metadata.tags import read_tags

POPULARITIES = (100, 1000)
MOST_FREQUENT = 10
"""Words of each group, or of each subset, that are shown."""


@dataclass(frozen=True)
class CaptionStatistics:
    """What `kwrap caption --stats` tells."""

    style: str
    """kohaku or hakubooru."""

    posts: int
    """Captions looked at."""

    groups: Mapping[str, int]
    """Words by group, in the order of the caption."""

    tags: Mapping[str, int]
    """Tags of the posts by what became of them."""

    lacking: Mapping[str, int]
    """Posts without tags, date, rating, favourites, quality or year word."""

    distinct_words: int
    """Different words written."""

    frequent: Mapping[str, tuple[tuple[str, int], ...]]
    """For each group, the most frequent words and in how many captions they stand."""

    rare: tuple[tuple[str, int], ...]
    """Words that stand in fewer captions than asked for, the rarest first, and in how many."""

    popularity: Mapping[str, int]
    """Tags of the database whose popularity is at least 100 and 1000."""

    used_popularity: Mapping[str, int]
    """Of these, the ones that stand in a caption here."""

    tokens_by: str
    """"tokenizer FOLDER", or "estimate"."""

    token_quantiles: Mapping[str, int]
    """Tokens of a caption as the trainer sees it, without the separators; by quantile, and the maximum."""

    cut: Mapping[str, int]
    """By max_token_length, the captions that are longer and lose their end."""


class Tally:
    """Sums over chunks of captions."""

    def __init__(self, plan: CaptionPlan, count: CountTokens) -> None:
        self.plan = plan
        size = len(plan.slot_of)
        texts = plan.texts.slice(0, size).to_pylist()
        self.count = count
        self.counts = CaptionCounts()
        self.texts = 0
        self.uses = np.zeros(size, dtype=np.int64)
        self.lengths = Lengths()
        separators = list(plan.separators)
        # Tokens never cross a blank, so a caption's are the sum over its words, each with the comma that follows it.
        self.tokens = count([f"{text}," for text in texts])
        self.last_tokens = count(texts)
        self.tokens[separators] = self.last_tokens[separators] = 0

    def add(self, arranged: Elements, counts: CaptionCounts, texts: pa.Array | None) -> None:
        """Count one chunk, each text with the tags of its post."""
        elements, ends = arranged.of, arranged.ends
        self.counts.add(counts)
        self.uses += np.bincount(elements, minlength=len(self.uses))
        totals = np.diff(np.concatenate([[0], np.cumsum(self.tokens[elements])[ends - 1]]))
        is_word = np.ones(len(self.uses), dtype=bool)
        is_word[list(self.plan.separators)] = False
        places = np.maximum.accumulate(np.where(is_word[elements], np.arange(len(elements)), -1))[ends - 1]
        starts = np.concatenate([[0], ends[:-1]])
        has_word = places >= starts
        last = elements[np.maximum(places, 0)]
        totals -= np.where(has_word, self.tokens[last] - self.last_tokens[last], 0)
        if texts is not None:
            totals += self.count(pc.if_else(pc.equal(texts, ""), "", pc.binary_join_element_wise(texts, ",", "")))
            self.texts += pc.sum(pc.not_equal(texts, "")).as_py() or 0
        self.lengths.add(totals)


def measure_captions(
    database: Source,
    selection: Path,
    recipe: CaptionRecipe,
    tokenizer: Path | None,
    spill_folder: Path,
    rare_below: int = 0,
    threads: int = 1,
    on_progress: Progress = unheard,
    texts: TextTable | None = None,
) -> CaptionStatistics:
    """Make all captions of the selection without writing them, and count; `texts` go in with tags and text."""
    recipe = recipe.with_text(texts is not None)
    posts = read_selected_posts(selection, "dateutil" if recipe.style == "hakubooru" else "iso")
    tags = read_tags(database, posts.ids, spill_folder)
    plan = plan_captions(recipe, tags)
    cutoffs = find_cutoffs(plan.recipe.quality, database, posts)
    tokens_by, count = choose_counter(tokenizer)

    def arrange(chunk: TagChunk) -> tuple[Elements, CaptionCounts, pa.Array | None]:
        own = texts.texts_of(posts.ids[chunk.first : chunk.stop])[0] if texts else None
        return (*arrange_elements(plan, chunk, posts, cutoffs), own)

    def tally_all(folder: Path | None) -> Tally:
        tally = Tally(plan, count)
        for result in map_tag_chunks(database, tags, posts.ids, arrange, threads, folder):
            tally.add(*result)
            on_progress(tally.counts.posts, len(posts))
        return tally

    try:
        tally = tally_all(None)
    except RowsOutOfOrder:
        tally = tally_all(spill_folder)
    used = tally.uses[: len(tags)] > 0
    return CaptionStatistics(
        style=recipe.style,
        posts=tally.counts.posts,
        groups={
            slot: tally.texts if slot == "text" else int(tally.uses[plan.slot_of == number].sum())
            for number, slot in enumerate(plan.slots)
            if slot != SEPARATOR
        },
        tags=dict(zip(FATES, tally.counts.tags.tolist(), strict=True)),
        lacking=dict(zip(POST_COUNTS, tally.counts.lacking.tolist(), strict=True)),
        distinct_words=int((tally.uses > 0).sum()) - len(plan.separators),
        frequent=most_frequent_words(plan, tally.uses),
        rare=rare_words(plan, tally.uses, rare_below),
        popularity={str(least): int((tags.popularity >= least).sum()) for least in POPULARITIES},
        used_popularity={str(least): int((used & (tags.popularity >= least)).sum()) for least in POPULARITIES},
        tokens_by=tokens_by,
        token_quantiles=tally.lengths.quantiles(),
        cut=tally.lengths.beyond_limits(),
    )


def most_frequent_words(plan: CaptionPlan, uses: Int64Array) -> dict[str, tuple[tuple[str, int], ...]]:
    """For each group its most frequent words and their counts, ties by word."""
    found = {}
    for number, slot in enumerate(plan.slots):
        if slot == SEPARATOR:
            continue
        here = np.flatnonzero((plan.slot_of == number) & (uses > 0))
        if len(here) > MOST_FREQUENT:
            here = here[uses[here] >= np.partition(uses[here], -MOST_FREQUENT)[-MOST_FREQUENT]]
        words = sorted(
            ((plan.texts[int(place)].as_py(), int(uses[place])) for place in here), key=lambda w: (-w[1], w[0])
        )
        found[slot] = tuple(words[:MOST_FREQUENT])
    return found


def rare_words(plan: CaptionPlan, uses: Int64Array, below: int) -> tuple[tuple[str, int], ...]:
    """The words in fewer than `below` captions and their counts, the rarest first, ties by word."""
    found: Counter[str] = Counter()
    # Two tags may be one word, such as long_hair and "long hair".
    for place in np.flatnonzero(uses).tolist() if below > 1 else ():
        if place not in plan.separators:
            found[plan.texts[place].as_py()] += int(uses[place])
    return tuple(sorted(((w, n) for w, n in found.items() if n < below), key=lambda word: (word[1], word[0])))
