"""What `kwrap caption` made: counts of captions, of tags and of posts that lack something."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
