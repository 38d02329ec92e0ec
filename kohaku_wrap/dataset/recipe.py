"""Dataset recipes: `datasets/*.toml` and files like them, read and checked whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kohaku_wrap.dataset.captions.recipe import CaptionRecipe, read_caption_recipe
from kohaku_wrap.errors import Problem, ProblemsFound, UsageError
from kohaku_wrap.file_hashes import sha256_of_file
from kohaku_wrap.files import describe_absence, shipped_folder
from kohaku_wrap.metadata.columns import DANBOORU, SiteMapping, read_site_mapping
from kohaku_wrap.metadata.filters import FLAGS, RATINGS
from kohaku_wrap.toml_files import TableReader, load_toml
from kohaku_wrap.wording import suggest

RANGES = {
    "score": "score",
    "fav_count": "fav_count",
    "width": "image_width",
    "height": "image_height",
}
"""Conditions that are a range of one column, and the column."""

TAG_CONDITIONS = ("tags_all", "tags_any", "tags_none")
CONDITIONS = (*TAG_CONDITIONS, "ratings", "extensions", "date", "pixels", *RANGES)
"""Keys of `[selection.drop.unless]`, and the reasons that reports count."""


class UnknownDataset(UsageError):
    """Neither a shipped dataset nor a file."""


@dataclass(frozen=True)
class Stratum:
    """A stretch of post ids and how many of its posts to take."""

    first_id: int | None
    """Smallest id, inclusive; None: from the first."""

    last_id: int | None
    """Largest id, inclusive; None: to the last."""

    sample: int | None
    """How many posts; None: all."""

    @property
    def title(self) -> str:
        """Such as "ids 0 to 1,999,999"."""
        first = "the first" if self.first_id is None else f"{self.first_id:,}"
        last = "the last" if self.last_id is None else f"{self.last_id:,}"
        return f"ids {first} to {last}"


@dataclass(frozen=True)
class SelectionRecipe:
    """Which posts a dataset is made of."""

    seed: int = 0
    """Of the sample."""

    strata: tuple[Stratum, ...] = (Stratum(None, None, None),)
    """By ascending ids, without overlap."""

    before_sample: tuple[str, ...] = ()
    """Filters and conditions that posts pass to be sampled at all, in order."""

    after_sample: tuple[str, ...] = ()
    """Filters and conditions that sampled posts pass to be selected, in order."""

    conditions: Mapping[str, Any] = field(default_factory=dict)
    """Values of the conditions: tuples of words, or (smallest, largest) with None for no limit."""


@dataclass(frozen=True)
class DatasetRecipe:
    """A whole dataset file."""

    name: str
    """As given on the command line."""

    path: Path | None
    """The file; None for the defaults."""

    sha256: str
    """Of the file's bytes."""

    selection: SelectionRecipe
    """Which posts."""

    caption: CaptionRecipe
    """What their captions say."""

    caption_table: Mapping[str, Any] = field(default_factory=dict)
    """The `[caption]` table as the file has it."""

    metadata: SiteMapping = DANBOORU
    """How another site's metadata is read."""

    metadata_table: Mapping[str, Any] = field(default_factory=dict)
    """The `[metadata]` table as the file has it."""


def dataset_names() -> list[str]:
    """The shipped datasets."""
    return sorted(path.stem for path in shipped_folder("datasets").glob("*.toml"))


def load_dataset(name: str) -> DatasetRecipe:
    """The dataset of a shipped name or of a path. Raises UnknownDataset, UnreadableToml and ProblemsFound."""
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        if name not in dataset_names():
            raise UnknownDataset(
                f"{name}: no such dataset{suggest(name, dataset_names())}",
                f"Shipped: {', '.join(dataset_names())}. Or give the path of a dataset file (.toml).",
            )
        path = shipped_folder("datasets") / f"{name}.toml"
    if not path.is_file():
        raise UnknownDataset(f"{path}: {describe_absence(path)}", f"Shipped datasets: {', '.join(dataset_names())}.")
    return read_dataset(load_toml(path), name, path, sha256_of_file(path))


def read_dataset(document: Mapping[str, Any], name: str, path: Path | None = None, sha256: str = "") -> DatasetRecipe:
    """Check a dataset's tables. Raises ProblemsFound with every fault."""
    problems: list[Problem] = []
    names = ("title", "notes", "metadata", "selection", "caption", "dataset_options")
    top = TableReader("", document, names, problems)
    top.text("title")
    top.text("notes")
    top.table("dataset_options")  # For the template that names the dataset, which checks them.
    metadata_table = top.table("metadata")
    metadata = read_site_mapping(metadata_table, problems)
    selection = read_selection_recipe(top.table("selection"), problems)
    caption_table = top.table("caption")
    caption = read_caption_recipe(caption_table, problems)
    if problems:
        example = shipped_folder("datasets") / "epsilon.toml"
        raise ProblemsFound(str(path or name), problems, f"Every key is explained in {example}.")
    return DatasetRecipe(name, path, sha256, selection, caption, caption_table, metadata, metadata_table)


def read_selection_recipe(table: Mapping[str, Any], problems: list[Problem]) -> SelectionRecipe:
    """The `[selection]` table; faults go to `problems`."""
    reader = TableReader("selection", table, ("seed", "strata", "drop"), problems)
    seed = reader.integer("seed")
    strata = _read_strata(reader.tables("strata"), problems)
    if "seed" not in table and any(stratum.sample is not None for stratum in strata):
        problems.append(Problem("selection.seed", "missing: a sample needs one to be the same tomorrow"))
    drop = TableReader("selection.drop", reader.table("drop"), ("before_sample", "after_sample", "unless"), problems)
    conditions = _read_conditions(drop.table("unless"), problems)
    before = _read_order("before_sample", drop, conditions)
    after = _read_order("after_sample", drop, conditions)
    twice = [name for name in before if name in after]
    problems += [Problem("selection.drop", f"{name!r} stands both before and after the sample") for name in twice]
    before += tuple(name for name in conditions if name not in (*before, *after))
    return SelectionRecipe(seed or 0, strata, before, after, conditions)


def _read_strata(tables: list[Mapping[str, Any]], problems: list[Problem]) -> tuple[Stratum, ...]:
    strata = []
    for number, table in enumerate(tables, start=1):
        where = f"selection.strata {number}"
        reader = TableReader(where, table, ("first_id", "last_id", "sample"), problems)
        sample = table.get("sample", "all")
        if sample != "all" and (type(sample) is not int or sample < 1):
            reader.fault("sample", f'{sample!r} is neither a count of at least 1 nor "all"')
            sample = "all"
        stratum = Stratum(reader.integer("first_id"), reader.integer("last_id"), None if sample == "all" else sample)
        if None not in (stratum.first_id, stratum.last_id) and (stratum.first_id or 0) > (stratum.last_id or 0):
            problems.append(Problem(where, f"first_id {stratum.first_id} is above last_id {stratum.last_id}"))
        strata.append(stratum)
    in_order = sorted(strata, key=lambda one: -(1 << 62) if one.first_id is None else one.first_id)
    for low, high in itertools.pairwise(in_order):
        if low.last_id is None or high.first_id is None or high.first_id <= low.last_id:
            twice = f"{low.title} and {high.title} overlap: their posts would come twice"
            problems.append(Problem("selection.strata", twice))
    return tuple(strata) or (Stratum(None, None, None),)


def _read_order(key: str, drop: TableReader, conditions: Mapping[str, Any]) -> tuple[str, ...]:
    names = drop.words(key, ())
    for name in names:
        if name not in FLAGS and name not in conditions:
            hint = ", ".join([*FLAGS, *conditions])
            missing = " has no value in [selection.drop.unless]" if name in CONDITIONS else f" is not one of {hint}"
            drop.fault(key, f"{name!r}{missing}")
    if len(set(names)) < len(names):
        drop.fault(key, "a filter is named twice")
    return tuple(name for name in names if name in FLAGS or name in conditions)


def _read_conditions(table: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """`[selection.drop.unless]`: a post is dropped unless it meets each of these."""
    reader = TableReader("selection.drop.unless", table, CONDITIONS, problems)
    conditions: dict[str, Any] = {}
    for key in table:
        if key in TAG_CONDITIONS or key in ("ratings", "extensions"):
            conditions[key] = reader.words(key, ())
            if not conditions[key]:
                reader.fault(key, "names nothing")
        elif key in RANGES or key == "pixels":
            conditions[key] = _read_range(reader, key, TableReader.integer, ("min", "max"))
        elif key == "date":
            conditions[key] = _read_range(reader, key, TableReader.date, ("first", "last"))
    for rating in conditions.get("ratings", ()):
        if rating not in RATINGS:
            reader.fault("ratings", f"{rating!r} is not one of {', '.join(RATINGS)}")
    return conditions


def _read_range(
    reader: TableReader, key: str, read: Callable[[TableReader, str], Any], keys: tuple[str, str]
) -> tuple[Any, Any]:
    """(smallest, largest) of the table `key` with one or both of `keys`, inclusive."""
    value = reader.table_values[key]
    if not isinstance(value, Mapping) or not value:
        reader.fault(key, f"a table with {keys[0]} or {keys[1]} or both is wanted, not {value!r}")
        return None, None
    inner = TableReader(f"{reader.prefix}{key}", value, keys, reader.problems)
    low, high = read(inner, keys[0]), read(inner, keys[1])
    if low is not None and high is not None and low > high:
        reader.fault(key, f"{keys[0]} {low} is above {keys[1]} {high}")
    return low, high
