"""What `kwrap caption` made: counts of captions, of tags and of posts that lack something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.dataset.captions import formats as formats_of
from kohaku_wrap.dataset.captions.on_disk import CaptionImages
from kohaku_wrap.dataset.captions.plan import CaptionPlan
from kohaku_wrap.dataset.captions.quality import NEVER
from kohaku_wrap.dataset.captions.text_table import TextCounts, TextTable
from kohaku_wrap.metadata.filters import RATINGS
from kohaku_wrap.wording import count_of


@dataclass(frozen=True)
class Changes:
    """What writing one format did, counted in captions."""

    written: int = 0
    """New or different."""

    unchanged: int = 0
    """There already, word for word."""

    removed: int = 0
    """There before, and no longer selected."""


@dataclass(frozen=True)
class CaptionReport:
    """What `kwrap caption` made."""

    style: str
    """kohaku or hakubooru."""

    dataset: str
    """Whose caption rules."""

    posts: int
    """Captions made: one a selected post."""

    images: int
    """Of these, posts whose verified image is on disk."""

    vanished: int
    """Images that extract wrote and that are no longer there."""

    formats: Mapping[str, Changes]
    """By format, `arrow` included."""

    digest: str
    """Of the rows of captions.arrow; empty without images."""

    tags: Mapping[str, int]
    """Tags of the posts by what became of them."""

    duplicates: int
    """Tags that a post had twice."""

    lacking: Mapping[str, int]
    """Posts without tags, date, rating, favourites, quality or year word."""

    cutoffs: Mapping[str, Mapping[str, int | None]]
    """By rating and percentile the `fav_count` to exceed; None where no post has the rating."""

    texts: Mapping[str, int]
    """Posts with a natural-language caption and what was changed in them; empty where none were asked for."""

    sorted_rows: bool
    """True when the relation's rows had to be sorted first."""

    notes: tuple[str, ...] = field(default_factory=tuple)
    """What is worth knowing."""

    @property
    def changes(self) -> Changes:
        """Of the .txt files where they were asked for, else of captions.arrow, else of captions.jsonl."""
        for name in ("txt", "arrow", "jsonl"):
            if name in self.formats:
                return self.formats[name]
        return Changes()


def describe_texts(texts: TextTable, counts: TextCounts, posts: int) -> Iterator[str]:
    """What is worth knowing of natural-language captions."""
    if not counts.with_text:
        yield f"{texts.path}: no text of any of the {posts:,} selected posts; are its ids those of posts?"
        return
    yield (
        "tags, text or both: drawn once for each image in .txt, metadata_cache.json and captions.jsonl; anew for each "
        'epoch and image where kwrap.data = "kwrap"'
    )
    if counts.tight_commas:
        yield (
            f"{count_of(counts.tight_commas, 'text')} with a comma without one space after it, where plain sd-scripts "
            'writes one when it shuffles; kwrap.data = "kwrap" changes no text'
        )
    if texts.repeated:
        yield f"{texts.path}: {count_of(texts.repeated, 'row')} of an id that an earlier row has; the first one counts"


def find_stale_files(folder: Path, formats: Sequence[str], images: CaptionImages | None) -> Iterator[str]:
    """Files of other formats that lie there from an earlier call and were not written now."""
    if "txt" not in formats and images and images.has_text.any():
        texts = int(images.has_text.sum())
        yield f".txt files beside {count_of(texts, 'image')} were not written now; add txt to --format to write them"
    for name, file in (("cache", formats_of.CACHE_FILE), ("jsonl", formats_of.LINES_FILE)):
        if name not in formats and (folder / file).exists():
            yield f"{folder / file} is from an earlier call; add {name} to --format to bring it up to date"


def describe_cutoffs(plan: CaptionPlan, cutoffs: Int64Array) -> dict[str, dict[str, int | None]]:
    """The cut-offs by the names of ratings and percentiles."""
    return {
        rating: {
            str(percentile): None if cutoffs[row, column] == NEVER else int(cutoffs[row, column])
            for column, percentile in enumerate(plan.recipe.quality.percentiles)
        }
        for row, rating in enumerate(RATINGS)
    }
