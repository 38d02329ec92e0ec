"""Characters to score: of the published index, or of the metadata database with references from extracted posts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.captions.words import PEOPLE_TAGS
from kohaku_wrap.errors import KwrapError, UsageError, reason_of, refusing
from kohaku_wrap.evaluation.judges import Features
from kohaku_wrap.files import open_regular, parse_json, read_regular
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.metadata.chunks import TagChunk
from kohaku_wrap.metadata.columns import TAG_TYPES
from kohaku_wrap.metadata.relations import map_tag_chunks
from kohaku_wrap.metadata.source import Source
from kohaku_wrap.metadata.tags import NO_TAG, TagTable, read_tags
from kohaku_wrap.sampling.compose import compose_tags
from kohaku_wrap.sampling.grammar import escape_text
from kohaku_wrap.streams import draws, stream_key

MOST_REFERENCES = 50
SOLO = "solo"
INDEX_FILE = "characters.json"
FEATURES_FILE = "feat.npy"
FEATURE_SIZE = 768
CORE_SHARE = 0.6
"""Of a character's solo posts, that have a core tag."""

MOST_CORE = 10
GENDERS = {"girl": "1girl", "female": "1girl", "boy": "1boy", "male": "1boy"}
CHARACTER, SERIES, GENERAL = (TAG_TYPES.index(name) for name in ("character", "copyright", "general"))

PRESETS = {
    "safe": "{people}, solo, {character}, {series}, masterpiece, newest, safe",
    "core": "{people}, solo, {character}, {series}, {core}, masterpiece, newest, safe",
    "published": "{people}, solo, {character}, {series}, {core}, best quality, newest, safe",
}
"""Prompts by name; each is brought into the order of the model's captions."""

INFERRED = {"published": "inferred: the pages name the score, not the prompts that it was made with"}

Int64Array = npt.NDArray[np.int64]
NONE: Int64Array = np.zeros(0, dtype=np.int64)


class BadCharacters(KwrapError):
    """The list of characters cannot be read."""


@dataclass(frozen=True)
class Character:
    """One character, and what pictures of it are compared with."""

    tag: str
    """As the site writes it."""

    series: str = ""
    """The same; empty where it is not known."""

    posts: int = 0
    """Solo posts among the extracted ones, or what the index says."""

    people: str = ""
    """`1girl`, `1boy`; empty where it is not known."""

    core_tags: tuple[str, ...] = ()
    """General tags that most of its posts have."""

    references: tuple[Path, ...] = ()
    """Pictures of it alone."""

    features: Features | None = None
    """(references, 768) in their place, of the index."""

    fault: str = ""
    """Why its features cannot be used."""

    @property
    def reference_count(self) -> int:
        return len(self.references) if self.features is None else len(self.features)


def write_prompt(character: Character, preset: str, recipe: CaptionRecipe) -> str:
    """The prompt of a character, in the model's order."""
    words = {
        "{people}": [character.people],
        "{character}": [escape_text(character.tag.replace("_", " "))],
        "{series}": [escape_text(character.series.replace("_", " "))],
        "{core}": [escape_text(tag.replace("_", " ")) for tag in character.core_tags],
    }
    parts = [word for part in PRESETS[preset].split(", ") for word in words.get(part, [part]) if word]
    types = {character.series: SERIES, character.tag: CHARACTER}
    names = tuple(name for name in types if name)
    known = TagTable(
        np.arange(len(names)), names, np.array([types[name] for name in names], dtype=np.int8),
        np.zeros(len(names), dtype=np.int64),
    )  # fmt: skip
    return compose_tags(", ".join(parts), recipe, known).text


def read_index(folder: Path) -> list[Character]:
    """The characters of a folder in the form of `deepghs/character_index`. Raises BadCharacters."""
    path = folder / INDEX_FILE
    try:
        entries = parse_json(read_regular(path))
        entries = list(entries.values()) if isinstance(entries, Mapping) else entries
        return [read_entry(folder, entry) for entry in entries]
    except FileNotFoundError:
        raise BadCharacters(
            f"{folder}: no {INDEX_FILE} in it", "Give the folder of deepghs/character_index, a list, or `db`."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCharacters(f"{path}: cannot be read ({reason_of(error)})", "Get the index again.") from None


def read_entry(folder: Path, entry: Mapping[str, Any]) -> Character:
    """One character of the index, with its features where they are whole."""
    tag = str(entry["tag"])
    short = str(entry.get("short_tag") or re.sub(r"\W+", "_", tag).strip("_"))
    prefix = str(entry.get("hprefix") or hashlib.sha1(tag.encode()).hexdigest()[:2])
    features, fault = read_features(folder / prefix / short / FEATURES_FILE)
    series = entry.get("copyright") or ""
    core = entry.get("core_tags") or ()
    return Character(
        tag=tag,
        series=str(series if isinstance(series, str) else next(iter(series), "")),
        posts=int(entry.get("post_count") or 0),
        people=GENDERS.get(str(entry.get("gender") or ""), ""),
        core_tags=tuple(map(str, core))[:MOST_CORE],
        features=features,
        fault=fault,
    )


def read_features(path: Path) -> tuple[Features, str]:
    """(references, 768) of an index's file, at most MOST_REFERENCES; none and the reason where it has none."""
    none = np.zeros((0, FEATURE_SIZE), dtype=np.float32)
    try:
        with open_regular(path) as stream:
            rows = np.load(stream, allow_pickle=False)
    except FileNotFoundError:
        return none, f"no {path.name} in the index"
    except (OSError, ValueError, EOFError) as error:
        return none, f"{path.name} cannot be read ({reason_of(error)})"
    if rows.ndim != 2 or rows.shape[1] != FEATURE_SIZE or rows.dtype.kind != "f" or not np.isfinite(rows).all():
        return none, f"{path.name} holds {rows.dtype} of shape {rows.shape}, not features of {FEATURE_SIZE}"
    return rows[:MOST_REFERENCES].astype(np.float32), ""


def read_names(path: Path) -> list[str]:
    """The tags of a list, one a line; lines that begin with # are notes. Raises BadCharacters."""
    with refusing(BadCharacters, f"{path}: cannot be read", "Give a text file with a tag a line."):
        lines = [line.strip() for line in read_regular(path).splitlines()]
    if names := [line.replace(" ", "_") for line in lines if line and not line.startswith("#")]:
        return list(dict.fromkeys(names))
    raise BadCharacters(f"{path}: no tag in it", "Write a character's tag a line, as the site writes it.")


def find_characters(
    database: Source, images: Path, names: Sequence[str] | None, spill_folder: Path, threads: int = 1
) -> list[Character]:
    """The characters that stand alone in an extracted post, with these posts as references; or those of `names`.

    A post counts that has `solo` and one character tag. References are at most MOST_REFERENCES, drawn by their ids
    alone. Raises UnknownTags, NoImages.
    """
    columns = Columns.open(images)
    tags = read_tags(database, columns.ids, spill_folder)
    if SOLO not in tags.row_of_name:
        raise UsageError(f"{database.path}: no tag {SOLO}", "Give an index of references: --characters FOLDER.")
    wanted = None
    if names is not None:
        tags.find_names(names, "--characters")
        wanted = np.array([tags.row_of_name[name] for name in names])
    posts, rows, held = [NONE], [NONE], [(NONE, NONE)]
    collect = partial(find_solo, tags=tags, solo=tags.row_of_name[SOLO], wanted=wanted)
    for alone, of_alone, pairs in map_tag_chunks(database, tags, columns.ids, collect, threads, spill_folder):
        posts.append(alone)
        rows.append(of_alone)
        add_counts(held, pairs)
    pairs, counts = reduce(merge_counts, reversed(held))
    row_of_post, width = np.concatenate(rows), len(tags)
    order = np.argsort(row_of_post, kind="stable")
    own, row_of_post = np.concatenate(posts)[order], row_of_post[order]
    found = []
    for row in np.unique(row_of_post).tolist() if wanted is None else wanted.tolist():
        first, last = np.searchsorted(row_of_post, [row, row + 1])
        begin, end = np.searchsorted(pairs, [row * width, (row + 1) * width])
        beside = dict(zip((pairs[begin:end] % width).tolist(), counts[begin:end].tolist(), strict=True))
        found.append(describe_character(tags, row, own[first:last], beside, columns))
    return found


def add_counts(held: list[tuple[Int64Array, Int64Array]], keys: Int64Array) -> None:
    """Count keys into parts that are merged as soon as they are of one size: memory grows with different keys alone."""
    held.append(np.unique(keys, return_counts=True))
    while len(held) > 1 and len(held[-2][0]) <= 2 * len(held[-1][0]):
        held[-2:] = [merge_counts(*held[-2:])]


def merge_counts(
    one: tuple[Int64Array, Int64Array], other: tuple[Int64Array, Int64Array]
) -> tuple[Int64Array, Int64Array]:
    """Keys, each once and ascending, with their counts in both."""
    keys, counts = (np.concatenate(each) for each in zip(one, other, strict=True))
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[starts], np.add.reduceat(counts[order], starts) if len(starts) else counts


def find_solo(
    chunk: TagChunk, tags: TagTable, solo: int, wanted: Int64Array | None = None
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Of a chunk: the posts with one character alone, the character of each, and character and tag of each pair.

    `wanted`: rows of the characters that count; None for all.
    """
    is_known = chunk.tags != NO_TAG
    # A post may have a tag twice.
    once = np.unique(chunk.posts[is_known].astype(np.int64) * len(tags) + chunk.tags[is_known])
    posts, rows = once // len(tags), once % len(tags)
    size = chunk.stop - chunk.first
    is_character = tags.types[rows] == CHARACTER
    count = np.bincount(posts[is_character], minlength=size)
    alone = (count == 1) & (np.bincount(posts[rows == solo], minlength=size) > 0)
    character = np.zeros(size, dtype=np.int64)
    character[posts[is_character]] = rows[is_character]
    if wanted is not None:
        alone &= np.isin(character, wanted)
    here = np.flatnonzero(alone)
    inside = alone[posts]
    return here + chunk.first, character[here], character[posts[inside]] * len(tags) + rows[inside]


def describe_character(
    tags: TagTable, row: int, posts: Int64Array, beside: Mapping[int, int], columns: Columns
) -> Character:
    """One character by the tags beside it: `beside` counts its solo posts with each."""
    ordered = sorted(beside, key=lambda each: (-beside[each], tags.names[each]))
    series = next((tags.names[each] for each in ordered if tags.types[each] == SERIES), "")
    people = next((tags.names[each] for each in ordered if tags.names[each] in PEOPLE_TAGS), "")
    core = [
        tags.names[each]
        for each in ordered
        if tags.types[each] == GENERAL and beside[each] >= CORE_SHARE * len(posts)
        and tags.names[each] not in (SOLO, *PEOPLE_TAGS)
    ]  # fmt: skip
    key = stream_key("references")
    chosen = np.sort(posts[np.argsort(draws(key, columns.ids[posts]), kind="stable")[:MOST_REFERENCES]])
    return Character(
        tag=tags.names[row],
        series=series,
        posts=len(posts),
        people=people,
        core_tags=tuple(core[:MOST_CORE]),
        references=tuple(columns.path_of(int(post)) for post in chosen),
    )
