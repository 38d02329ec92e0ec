"""What a prompt holds that the model cannot have learned: unknown and rare tags, brackets, foreign words, length."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow.compute as pc

from kohaku_wrap.dataset.captions.recipe import CaptionRecipe, words_of_recipe
from kohaku_wrap.dataset.captions.tokens import first_lines, split_captions
from kohaku_wrap.formats.caption_rows import CAPTIONS_FILE, open_captions, read_batches
from kohaku_wrap.metadata.tags import TagTable
from kohaku_wrap.sampling.compose import words_of_prompt
from kohaku_wrap.sampling.grammar import Prompt

WELL_KNOWN = 1_000
KNOWN = 100
"""Posts that a tag needs to work by itself, and with emphasis, by Epsilon's page."""

QUALITY_LIKE = re.compile(
    r".* quality|masterpiece|(?:very |extremely )?(?:aesthetic|displeasing)|score[ _][0-9](?:[ _]up)?"
    r"|best|worst|ultra-detailed|8k|4k"
)
"""Words by which other models were taught quality."""

RATING_LIKE = re.compile(r"safe|sfw|general|sensitive|questionable|explicit|nsfw|rating[:_ ].*")
YEAR_LIKE = re.compile(r"old|early|mid|late|recent|newest|year [0-9]{4}|oldest")
BRACKETED = re.compile(r"[^\s\\(][^(\\]*\s\((?P<inside>[^():\\]+)\)\s*")
"""Words, then words in plain brackets, as many tags of characters and artists are written."""


@dataclass(frozen=True)
class Finding:
    """One thing to look at."""

    word: str
    """The tag or word; empty for the prompt as a whole."""

    what: str
    """What is odd about it."""

    kind: str
    """unknown, rare, brackets, quality, rating, year or length."""


@dataclass(frozen=True)
class Vocabulary:
    """The tags that a model may know."""

    source: str
    """Where the counts come from."""

    unit: str
    """What is counted: posts or captions."""

    count: Callable[[str], int | None]
    """How many have a tag, by its words in a prompt; None for a tag that there is not."""

    suggest: Callable[[str], str]
    """The nearest tag that there is, as a prompt has it, or nothing."""


def vocabulary_of_tags(tags: TagTable, recipe: CaptionRecipe, path: Path) -> Vocabulary:
    """The tags of a database, with the database's own counts."""

    def find(word: str) -> int | None:
        for name in (word.replace(" ", "_"), word):
            if (row := tags.row_of_name.get(name)) is not None:
                return int(tags.popularity[row])
        return None

    @cache
    def names(first: str) -> list[str]:
        return [name for name in tags.names if name[:1] == first]

    def suggest(word: str) -> str:
        near = nearest(word.lower().replace(" ", "_"), names(word[:1].lower()))
        return near if near in recipe.kaomoji else near.replace("_", " ")

    return Vocabulary(str(path), "posts", find, suggest)


def vocabulary_of_captions(images: Path) -> Vocabulary:
    """The words of a folder's captions, counted over all of them. Raises NoImages."""
    open_captions(images)
    counts: Counter[str] = Counter()
    for batch in read_batches(images / CAPTIONS_FILE, "caption"):
        words = pc.value_counts(split_captions(first_lines(batch.column(0)))[1])
        counts.update(dict(zip(words.field(0).to_pylist(), words.field(1).to_pylist(), strict=True)))
    counts.pop("", None)
    return Vocabulary(str(images), "captions", counts.get, lambda word: nearest(word.lower(), list(counts)))


def nearest(word: str, known: list[str]) -> str:
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.75)), "")


def find_oddities(
    source: str, prompt: Prompt, recipe: CaptionRecipe, vocabulary: Vocabulary | None, tokens: int, most_tokens: int
) -> list[Finding]:
    """What is odd about a prompt, in its order. `source`: its text; `tokens`: its length, of `most_tokens` trained."""
    findings = list(find_brackets(source, vocabulary))
    bracketed = {" ".join(re.sub("[()]", "", finding.word).split()) for finding in findings}
    own = words_of_recipe(recipe)
    for word in dict.fromkeys(words_of_prompt(prompt)):
        if word in own or word in bracketed:
            continue
        count = vocabulary.count(word) if vocabulary else None
        finding = find_foreign(word, own, count)
        if finding is None and vocabulary:
            finding = judge_count(word, count, vocabulary)
        if finding:
            findings.append(finding)
    if tokens > most_tokens:
        what = f"{tokens} tokens; captions were trained up to {most_tokens}, so the model has seen none as long"
        findings.append(Finding("", what, "length"))
    return findings


def judge_count(word: str, count: int | None, vocabulary: Vocabulary) -> Finding | None:
    """Whether a tag is unknown or rare."""
    if count is None:
        near = vocabulary.suggest(word)
        return Finding(word, "unknown" + (f"; did you mean {near}?" if near else ""), "unknown")
    shown = f"{count:,} {vocabulary.unit if count != 1 else vocabulary.unit[:-1]}"
    if count < KNOWN:
        return Finding(word, f"{shown}, fewer than {KNOWN}: it hardly works", "rare")
    if count < WELL_KNOWN:
        return Finding(word, f"{shown}, fewer than {WELL_KNOWN:,}: it may need emphasis", "rare")
    return None


def find_foreign(word: str, own: Mapping[str, str], count: int | None) -> Finding | None:
    """Whether a word is meant for quality, rating or year, and is none of the recipe's."""
    for kind, like in (("quality", QUALITY_LIKE), ("rating", RATING_LIKE), ("year", YEAR_LIKE)):
        if like.fullmatch(word.lower()) and not count:
            words = ", ".join(each for each, group in own.items() if group == kind) or "none"
            return Finding(word, f"no {kind} word of this recipe; it has {words}", kind)
    return None


def find_brackets(source: str, vocabulary: Vocabulary | None) -> Iterator[Finding]:
    """Tags whose brackets are not escaped: `ask (askzy)` is read as emphasis on askzy."""
    for part in source.split(","):
        word = " ".join(part.split())
        plain = word.replace("\\", "")
        known = vocabulary.count(plain) if vocabulary else None
        if "(" not in word.replace("\\(", "") or not (known is not None or BRACKETED.fullmatch(word)):
            continue
        right = plain.replace("(", "\\(").replace(")", "\\)")
        yield Finding(plain, f"its brackets are read as emphasis; write {right}", "brackets")
