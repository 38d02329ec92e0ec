"""The seeded selection of posts: strata, filters before and after the sample, every drop counted by its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kohaku_wrap.arrays import BoolArray, Int64Array
from kohaku_wrap.dataset.recipe import RANGES, TAG_CONDITIONS, DatasetRecipe, SelectionRecipe, Stratum
from kohaku_wrap.dataset.selection_file import write_selection
from kohaku_wrap.errors import KwrapError, command_line
from kohaku_wrap.files import Progress, unheard
from kohaku_wrap.metadata import filters
from kohaku_wrap.metadata.editions import find_lacks
from kohaku_wrap.metadata.posts import PostDrops, posts_with_tags, read_drops, read_posts
from kohaku_wrap.metadata.source import Source
from kohaku_wrap.metadata.tags import read_tags
from kohaku_wrap.streams import draws, stream_key

GENERATOR = "SplitMix64 keyed by BLAKE2b (kohaku_wrap.streams)"
"""What draws the sample: the same on every machine and Python version."""


class EmptySelection(KwrapError):
    """No post is left."""


@dataclass(frozen=True)
class StratumReport:
    """What became of one stratum."""

    first_id: int | None
    """Smallest id of the stratum."""

    last_id: int | None
    """Largest id of the stratum."""

    asked: int | None
    """Posts to sample; None: all."""

    available: int
    """Posts of the stratum that pass the filters before the sample."""

    sampled: int
    """Posts taken."""

    selected: int
    """Posts left after the filters that follow the sample."""


@dataclass(frozen=True)
class SelectionReport:
    """A selection and how it came about."""

    dataset: str
    """The recipe's name or path."""

    seed: int
    """Of the sample."""

    layout: str
    """Of the database."""

    edition: str
    """What the database was recognised as."""

    lacks: Mapping[str, str]
    """What the edition does not say, and what follows."""

    duplicate_ids: int
    """Rows of posts beyond the first of their id, which do not count."""

    posts: int
    """In the database."""

    outside_strata: int
    """Posts whose id lies in no stratum."""

    strata: tuple[StratumReport, ...]
    """One a stratum, in the recipe's order."""

    dropped_before_sample: Mapping[str, int]
    """By reason; a post counts under the first of the recipe's order that it meets."""

    sampled: int
    """Posts taken from all strata."""

    dropped: Mapping[str, int]
    """Sampled posts that the later filters dropped, by reason, counted likewise."""

    selected: int
    """Posts in the selection: `sampled` less all of `dropped`."""

    unknown: Mapping[str, int]
    """By filter, posts that reached it and whose value the database does not say: kept by a flag, dropped by a
    condition."""

    warnings: tuple[str, ...]
    """What the recipe asked for and the database does not have."""


def select_posts(source: Source, dataset: DatasetRecipe, out: Path, on_progress: Progress = unheard) -> SelectionReport:
    """Select by the recipe and write `out`, a Parquet file of one row a post by ascending id.

    Raises EmptySelection when nothing is left, UnknownTags for a tag the database does not have.
    """
    recipe = dataset.selection
    scanned, drops = find_drops(source, recipe, on_progress)
    ids = scanned.ids
    inside = np.zeros(len(ids), dtype=bool)
    bounds = [stratum_bounds(ids, stratum) for stratum in recipe.strata]
    for start, stop in bounds:
        inside[start:stop] = True
    outside = int(len(ids) - inside.sum())
    unknown: dict[str, int] = {}
    dropped_before = count_first_reasons(recipe.before_sample, drops, inside, unknown)
    sampled = np.zeros(len(ids), dtype=bool)
    available = []
    for number, (stratum, (start, stop)) in enumerate(zip(recipe.strata, bounds, strict=True)):
        candidates = start + np.flatnonzero(inside[start:stop])
        available.append(len(candidates))
        sampled[sample_stratum(ids, candidates, stratum.sample, recipe.seed, number)] = True
    selected = sampled.copy()
    dropped = count_first_reasons(recipe.after_sample, drops, selected, unknown)
    strata = tuple(
        StratumReport(
            stratum.first_id,
            stratum.last_id,
            stratum.sample,
            count,
            int(sampled[start:stop].sum()),
            int(selected[start:stop].sum()),
        )
        for stratum, count, (start, stop) in zip(recipe.strata, available, bounds, strict=True)
    )
    report = SelectionReport(
        dataset=dataset.name,
        seed=recipe.seed,
        layout=source.edition.layout,
        edition=source.edition.name,
        lacks=find_lacks(source.edition, *(int(drops.of(name).sum()) for name in ("deleted", "no_offset"))),
        duplicate_ids=scanned.duplicates,
        posts=len(ids),
        outside_strata=outside,
        strata=strata,
        dropped_before_sample=dropped_before,
        sampled=int(sampled.sum()),
        dropped=dropped,
        selected=int(selected.sum()),
        unknown=unknown,
        warnings=tuple(find_shortages(recipe.strata, strata)),
    )
    if not report.selected:
        told = ", ".join(f"{count:,} {reason}" for reason, count in (dropped_before | dropped).items() if count)
        raise EmptySelection(
            f"{dataset.name}: no post is left of {report.posts:,} in {source.path}"
            + (f" (sampled {report.sampled:,}; dropped: {told})" if told else f" (sampled {report.sampled:,})"),
            f"Compare the recipe's ids and filters with `{command_line('inspect', source.path)}`.",
        )
    about = {
        "dataset": dataset.name,
        "dataset_sha256": dataset.sha256,
        "seed": recipe.seed,
        "generator": GENERATOR,
        "caption": dataset.caption_table,
        "layout": report.layout,
        "edition": {"name": report.edition, "columns": source.edition.columns, "lacks": report.lacks},
        "metadata": dataset.metadata_table,
        "db_digest": source.digest(),
        "counts": {
            "posts": report.posts,
            "duplicate_ids": report.duplicate_ids,
            "sampled": report.sampled,
            "dropped": dict(dropped),
            "selected": report.selected,
        },
    }
    write_selection(out, read_posts(source, ids[selected], on_progress, scanned.in_order), report.selected, about)
    return report


@dataclass(frozen=True)
class Drops:
    """Which filter drops which post."""

    bits: Int64Array
    """(posts,) a bit for each answer."""

    places: Mapping[str, int]
    """The bit of each filter by its name, of what it does not know by `unknown NAME`, of `deleted` and `no_offset`."""

    def of(self, name: str) -> BoolArray:
        """(posts,) true where the answer is yes; nothing is unknown to conditions on tags."""
        if name not in self.places:
            return np.zeros(len(self.bits), dtype=bool)
        mask: BoolArray = (self.bits >> self.places[name]) & 1 == 1
        return mask


def find_drops(source: Source, recipe: SelectionRecipe, on_progress: Progress = unheard) -> tuple[PostDrops, Drops]:
    """All post ids, ascending, and what each filter and condition of the recipe says about them.

    One scan of the post table for all but the tag conditions, which read the tags' own posts.
    """
    names = (*recipe.before_sample, *recipe.after_sample)
    on_tags = [name for name in names if name in TAG_CONDITIONS]
    tags = read_tags(source) if on_tags else None
    wanted_tags = {
        name: tags.find_names(recipe.conditions[name], f"selection.drop.unless.{name}").tolist()
        for name in on_tags
        if tags
    }
    made = [build_filter(name, recipe.conditions.get(name)) for name in names if name not in TAG_CONDITIONS]
    asked = [*made, *(filters.Filter(f"unknown {one.name}", one.unknown) for one in made)]
    asked += [filters.flag_filter("deleted"), filters.Filter("no_offset", filters.NO_OFFSET)]
    scanned = read_drops(source, asked, on_progress)
    bits, places = scanned.drops, {one.name: place for place, one in enumerate(asked)}
    holders = (
        posts_with_tags(source, tags, sorted({tag for some in wanted_tags.values() for tag in some})) if tags else {}
    )
    has_tag = {tag: np.isin(scanned.ids, posts, assume_unique=True) for tag, posts in holders.items()}
    combine = {
        "tags_all": lambda masks: ~np.logical_and.reduce(masks),
        "tags_any": lambda masks: ~np.logical_or.reduce(masks),
        "tags_none": lambda masks: np.logical_or.reduce(masks),
    }
    for place, (name, some) in enumerate(wanted_tags.items(), len(asked)):
        places[name] = place
        bits |= combine[name]([has_tag[tag] for tag in some]).astype(np.int64) << place
    return scanned, Drops(bits, places)


def build_filter(name: str, value: Any) -> filters.Filter:
    """The SQL filter of a flag, or of a condition with its value."""
    if name in filters.FLAGS:
        return filters.flag_filter(name)
    if name in RANGES:
        return filters.range_filter(name, RANGES[name], *value)
    if name == "pixels":
        return filters.range_filter(name, "CAST(image_width AS DOUBLE) * image_height", *value)
    if name == "date":
        return filters.date_filter(name, *value)
    if name == "ratings":
        return filters.rating_filter(name, value)
    return filters.extension_filter(name, value)


def stratum_bounds(ids: Int64Array, stratum: Stratum) -> tuple[int, int]:
    """The slice of ascending `ids` that lies in the stratum."""
    start = 0 if stratum.first_id is None else int(np.searchsorted(ids, stratum.first_id))
    stop = len(ids) if stratum.last_id is None else int(np.searchsorted(ids, stratum.last_id, side="right"))
    return start, stop


def sample_stratum(ids: Int64Array, candidates: Int64Array, sample: int | None, seed: int, number: int) -> Int64Array:
    """The `sample` candidates (places in `ids`) with the smallest draws of the stratum's stream.

    All of them when `sample` is None or not below their number. The draw of a post depends on the seed, the
    stratum's number and the post's id alone, so other posts of the database never change it; no two ids of a stream
    draw the same number.
    """
    if sample is None or sample >= len(candidates):
        return candidates
    numbers = draws(stream_key("select", seed, number), ids[candidates])
    taken: Int64Array = candidates[np.sort(np.argpartition(numbers, sample - 1)[:sample])]
    return taken


def count_first_reasons(names: Sequence[str], drops: Drops, kept: BoolArray, unknown: dict[str, int]) -> dict[str, int]:
    """Take out of `kept`, in place, what each filter drops; how many each took.

    Posts that reach a filter and whose value is unknown are added to `unknown` under its name.
    """
    counts = {}
    for name in names:
        if asked := int((kept & drops.of(f"unknown {name}")).sum()):
            unknown[name] = asked
        drop = drops.of(name)
        counts[name] = int((kept & drop).sum())
        kept &= ~drop
    return counts


def find_shortages(strata: Sequence[Stratum], reports: Sequence[StratumReport]) -> Iterator[str]:
    """What the recipe asked for and did not get, one sentence a stratum."""
    for stratum, report in zip(strata, reports, strict=True):
        if not report.available:
            yield f"{stratum.title}: empty, no post there passes the filters before the sample"
        elif stratum.sample is not None and report.available < stratum.sample:
            yield f"{stratum.title}: {stratum.sample:,} asked, only {report.available:,} there; all were taken"
