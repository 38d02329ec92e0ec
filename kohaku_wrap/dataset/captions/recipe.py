"""What captions say: groups and their order, quality, years, ratings, underscores, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from kohaku_wrap.dataset.captions.mixing import TextMix, read_text_mix
from kohaku_wrap.dataset.captions.words import (
    ARTIST_BLACK_LIST,
    KAOMOJI,
    META_BLACK_LIST,
    PEOPLE_TAGS,
    PERCENTILES,
    PUBLISHED_PERCENTILES,
    QUALITY_WORDS,
    RATING_WORDS,
    YEARS,
    breaks_caption,
)
from kohaku_wrap.errors import Problem
from kohaku_wrap.metadata.filters import RATINGS
from kohaku_wrap.toml_files import TableReader

STYLES = ("kohaku", "hakubooru")
GROUPS = ("people", "character", "series", "artist", "general", "quality", "year", "meta", "rating", "text")
PROMPT_WORDS = {
    "people": "1girl/1boy/1other/...",
    "artist": "artists",
    **{group: f"{group} tags" for group in ("general", "quality", "year", "meta", "rating")},
}
"""How a prompt format names the groups, as Epsilon's page does; character and series as they are."""
UNDERSCORE_RULES = ("kaomoji", "short")
WORD_LISTS = ("prefix", "shuffled", "suffix", "people_tags", "drop_meta", "drop_artist", "drop")
"""Keys of `[caption]` that are lists of words."""

CUTOFF_SOURCES = ("database", "selection", "published")


@dataclass(frozen=True)
class QualityRecipe:
    """How favourites become a quality word."""

    cutoffs: str = "database"
    """Where cut-offs come from: all posts of the database, the selection, or HakuBooru's published table."""

    percentiles: tuple[int, ...] = PERCENTILES
    """Descending; a post whose favourites lie above the cut-off of the first gets the first word."""

    words: tuple[str, ...] = QUALITY_WORDS
    """One more than `percentiles`."""

    max_id: int | None = None
    """Posts with a larger id get no quality word: they were too young to have favourites."""


@dataclass(frozen=True)
class YearRange:
    """Upload years that share a word."""

    word: str
    """Such as "newest"."""

    first: int
    """First year, inclusive."""

    last: int
    """Last year, inclusive."""


@dataclass(frozen=True)
class CaptionRecipe:
    """All that decides a caption beside the post itself."""

    style: str = "kohaku"
    """`kohaku`, or `hakubooru` for the captions of HakuBooru 0.0.3, which nothing else here changes."""

    prefix: tuple[str, ...] = ("people", "character", "series", "artist")
    """Groups before the shuffled part, in order."""

    shuffled: tuple[str, ...] = ("general",)
    """Groups that the trainer shuffles and drops from."""

    suffix: tuple[str, ...] = ("quality", "year", "meta", "rating")
    """Groups after the shuffled part, in order."""

    people_tags: tuple[str, ...] = PEOPLE_TAGS
    """Tags of the group `people`; without that group they are general tags."""

    underscores: str = "kaomoji"
    """Which tags keep them: the listed `kaomoji`, or the `short` ones of up to three characters."""

    kaomoji: frozenset[str] = KAOMOJI
    """The tags that keep their underscores under the rule `kaomoji`."""

    drop_meta: tuple[str, ...] = META_BLACK_LIST
    """Meta tags that contain one of these are left out."""

    drop_artist: tuple[str, ...] = ARTIST_BLACK_LIST
    """Artists whose name contains one of these are left out."""

    drop: tuple[str, ...] = ()
    """Patterns (`*`, `?`, `[…]`) of tags of any kind that are left out."""

    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tags that are written as another one."""

    quality: QualityRecipe = QualityRecipe()
    """The group `quality`."""

    years: tuple[YearRange, ...] = tuple(YearRange(*entry) for entry in YEARS)
    """The group `year`."""

    ratings: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(RATING_WORDS))
    """The group `rating`: the words of each rating."""

    text: TextMix = field(default_factory=TextMix)
    """How often the group `text`, a natural-language caption, stands alone, among the tags, or not at all."""

    @property
    def prompt_format(self) -> str:
        """What a prompt of a network that learned these captions looks like: its groups in order."""
        return ", ".join(
            f"<{PROMPT_WORDS.get(group, group)}>" for group in (*self.prefix, *self.shuffled, *self.suffix)
        )

    def with_text(self, there: bool) -> CaptionRecipe:
        """With the group `text` where there are texts, at the end of the prefix unless it has a place; else without."""
        placed = "text" in (*self.prefix, *self.suffix)
        if there:
            return self if placed else replace(self, prefix=(*self.prefix, "text"))
        prefix, suffix = (tuple(one for one in part if one != "text") for part in (self.prefix, self.suffix))
        return replace(self, prefix=prefix, suffix=suffix) if placed else self


def read_caption_recipe(table: Mapping[str, Any], problems: list[Problem]) -> CaptionRecipe:
    """The `[caption]` table; faults go to `problems`."""
    reader = TableReader("caption", table, [entry.name for entry in fields(CaptionRecipe)], problems)
    words = {name: reader.words(name, getattr(CaptionRecipe, name)) for name in WORD_LISTS}
    seen: set[str] = set()
    for part in ("prefix", "shuffled", "suffix"):
        for group in words[part]:
            if group not in GROUPS:
                reader.fault(part, f"{group!r} is not one of {', '.join(GROUPS)}")
            if group in seen:
                reader.fault(part, f"the group {group!r} stands twice")
            if group == "text" and part == "shuffled":
                reader.fault(part, "a text is one piece: place it in prefix or suffix, which are not shuffled")
            seen.add(group)
    return CaptionRecipe(
        **words,
        style=reader.choice("style", STYLES),
        underscores=reader.choice("underscores", UNDERSCORE_RULES),
        kaomoji=frozenset(reader.words("kaomoji", sorted(KAOMOJI))),
        aliases=_read_aliases(reader.table("aliases"), problems),
        quality=_read_quality(reader.table("quality"), problems),
        years=_read_years(reader, problems),
        ratings=_read_ratings(reader, problems),
        text=read_text_mix(reader.table("text"), problems),
    )


def _read_aliases(table: Mapping[str, Any], problems: list[Problem]) -> dict[str, str]:
    aliases = {}
    for name, target in table.items():
        if not isinstance(target, str) or breaks_caption(target):
            problems.append(Problem(f"caption.aliases.{name}", f"{target!r} cannot stand in a caption"))
        elif target in table:
            problems.append(Problem(f"caption.aliases.{name}", f"{target!r} is itself an alias; name its target"))
        else:
            aliases[name] = target
    return aliases


def _read_quality(table: Mapping[str, Any], problems: list[Problem]) -> QualityRecipe:
    reader = TableReader("caption.quality", table, ("cutoffs", "percentiles", "words", "max_id"), problems)
    cutoffs = reader.choice("cutoffs", CUTOFF_SOURCES)
    words = reader.words("words", QUALITY_WORDS)
    percentiles = reader.integers("percentiles", PERCENTILES)
    if list(percentiles) != sorted(set(percentiles), reverse=True) or not all(0 < one < 100 for one in percentiles):
        reader.fault("percentiles", "not descending numbers between 0 and 100")
    if len(words) != len(percentiles) + 1:
        reader.fault("words", f"{len(percentiles)} percentiles need {len(percentiles) + 1} words, not {len(words)}")
    if cutoffs == "published":
        unknown = [str(one) for one in percentiles if one not in PUBLISHED_PERCENTILES]
        if unknown:
            known = ", ".join(map(str, PUBLISHED_PERCENTILES))
            reader.fault("percentiles", f"no published cut-off for {', '.join(unknown)}; there are {known}")
    _check_words("caption.quality.words", words, problems)
    return QualityRecipe(cutoffs, percentiles, words, reader.integer("max_id"))


def _read_years(reader: TableReader, problems: list[Problem]) -> tuple[YearRange, ...]:
    if "years" not in reader.table_values:
        return tuple(YearRange(*entry) for entry in YEARS)
    ranges: list[YearRange] = []
    for number, table in enumerate(reader.tables("years"), start=1):
        where = f"caption.years {number}"
        one = TableReader(where, table, ("word", "first", "last"), problems)
        word, first, last = one.text("word"), one.integer("first"), one.integer("last")
        if not word or first is None or last is None or not 1 <= first <= last:
            problems.append(
                Problem(where, "needs a word, a first year from 1 on and a last year that is not before it")
            )
            continue
        _check_words(where, (word,), problems)
        if any(first <= other.last and other.first <= last for other in ranges):
            problems.append(Problem(where, f"{first} to {last} overlaps an earlier range"))
        ranges.append(YearRange(word, first, last))
    return tuple(ranges)


def _read_ratings(reader: TableReader, problems: list[Problem]) -> dict[str, tuple[str, ...]]:
    table = TableReader("caption.ratings", reader.table("ratings"), RATINGS, problems)
    ratings = {rating: table.words(rating, words) for rating, words in RATING_WORDS.items()}
    for rating, words in ratings.items():
        _check_words(f"caption.ratings.{rating}", words, problems)
    return ratings


def _check_words(where: str, words: tuple[str, ...], problems: list[Problem]) -> None:
    problems += [Problem(where, f"{word!r} cannot stand in a caption") for word in words if breaks_caption(word)]


def words_of_recipe(recipe: CaptionRecipe) -> Mapping[str, str]:
    """The words that come from no tag, and the group of each."""
    words = dict.fromkeys(recipe.quality.words, "quality")
    words |= {entry.word: "year" for entry in recipe.years}
    return words | {word: "rating" for listed in recipe.ratings.values() for word in listed}
