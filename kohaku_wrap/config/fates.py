"""What each option decides: the weights, files only, or nothing because it is refused; one table, `fates.toml`.

And one digest over all options of a run that decide the weights.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

from kohaku_wrap.config.run_files import DATASET_FILE, TRAINER_FILE
from kohaku_wrap.config.schema import ARGUMENT_TABLES
from kohaku_wrap.file_hashes import sha256_of_text
from kohaku_wrap.trainer.options import load_recorded_table

FATES_FILE = Path(__file__).with_name("fates.toml")
"""The table; its head says what each column means."""

Place = Literal["option", "dataset", "network_args", "preset", "optimizer_args", "lr_scheduler_args"]
"""Where an option stands: trainer.toml, dataset.toml, the trainer's lists of `key=value`, the LyCORIS preset."""

FateKind = Literal["weights", "files", "refused", "unverified"]
"""Decides the weights; decides files, logs or speed; refused by name; left to the trainer."""

Apart = Literal["", "place", "length", "attempt"]
"""Why an option that decides the weights is not in the digest."""

ARGUMENT_PLACES = cast(tuple[Place, ...], ARGUMENT_TABLES)
"""Tables whose names belong to a class that may be anybody's."""

OWN_KEYS: Mapping[str, FateKind] = {
    "effective_batch": "weights",
    "preset": "weights",
    "kwrap": "weights",
    "cache": "weights",
    "states": "files",
    "samples": "files",
    "validation": "files",
    "validation.posts": "weights",
}
"""What kwrap's own keys and tables decide."""

UNKNOWN_ARGUMENT = "not in kwrap's table: an argument of a class of its own"
UNKNOWN_OPTION = "not in kwrap's table: the trainer is newer"


@dataclass(frozen=True)
class Fate:
    """What one option decides."""

    kind: FateKind
    """One of the four."""

    reason: str = ""
    """Why it is refused or unverified."""

    needs: Mapping[str, Any] | list[Mapping[str, Any]] = field(default_factory=dict)
    """What must hold beside it for it to do anything, by key; a list of tables: any one of them."""

    idle: bool = False
    """Whether it is only noted, not refused, where what it needs is missing."""

    other: Any = None
    """A value unlike the default, which the census sets; None where it sets none."""

    beside: Mapping[str, Any] = field(default_factory=dict)
    """What the census sets with it so that a difference can show."""

    untestable: str = ""
    """Why the census does not set it."""

    apart: Apart = ""
    """Why it is not in the digest."""

    given_by: str = ""
    """What kwrap takes it from; a template may not set it."""

    @property
    def in_digest(self) -> bool:
        """Whether the options digest of a run holds it; unknown and unverified ones may decide the weights too."""
        return self.kind in ("weights", "unverified") and not self.apart

    def ways(self) -> list[Mapping[str, Any]]:
        """What it needs, each table enough by itself; empty where it needs nothing."""
        tables = self.needs if isinstance(self.needs, list) else [self.needs]
        return [table for table in tables if table]

    def describe(self) -> str:
        """The fate in a few words, for `template show --why`."""
        if self.reason:
            return f"{self.kind}: {self.reason}"
        words = "files only" if self.kind == "files" else self.kind
        return f"{words}, not testable here: {self.untestable}" if self.untestable else words


@cache
def load_fates() -> dict[tuple[str, str], Fate]:
    """Every row, by place and name."""
    return parse_fates(FATES_FILE.read_text(encoding="utf-8"))


def parse_fates(text: str) -> dict[tuple[str, str], Fate]:
    """The rows of a table in TOML. Raises ValueError for an unknown place, kind or column."""
    rows: dict[tuple[str, str], Fate] = {}
    for place, table in tomllib.loads(text).items():
        if place not in get_args(Place):
            raise ValueError(f"fates: [{place}] is no place")
        for name, row in table.items():
            columns = dict(row)
            kind = columns.pop("fate")
            if kind not in get_args(FateKind):
                raise ValueError(f"fates: {place}.{name}: {kind!r} is no fate")
            try:
                rows[place, name] = Fate(kind, **columns)
            except TypeError as error:
                raise ValueError(f"fates: {place}.{name}: {error}") from None
    return rows


def rows_of(place: Place) -> dict[str, Fate]:
    """The rows of one place, by name."""
    return {name: fate for (other, name), fate in load_fates().items() if other == place}


def fate_of(place: Place, name: str) -> Fate:
    """The fate of an option; `unverified` for one that no row names.

    A name that both files of the trainer have is asked for in either place. An argument of a class that kwrap does
    not know decides the weights: it belongs into the digest, and no census has looked at it.
    """
    rows = load_fates()
    row = rows.get((place, name))
    if row is None and place in ("option", "dataset"):
        row = rows.get(("dataset" if place == "option" else "option", name))
    if row is None and place == "preset":
        row = rows.get((place, f"map.{name.rpartition('.')[2]}"))
    if row is not None:
        return row
    if place in ARGUMENT_PLACES or place == "preset":
        return Fate("weights", untestable=UNKNOWN_ARGUMENT)
    return Fate("unverified", reason=UNKNOWN_OPTION)


def fate_of_key(key: str) -> Fate | None:
    """The fate of a template's key, `learning_rate`, `dataset_options.resolution`, `network_args.factor`.

    None for a key of no table that there is.
    """
    table, _, name = key.rpartition(".")
    for own in (key, table or key):
        if own in OWN_KEYS:
            return Fate(OWN_KEYS[own])
    place = "dataset" if table == "dataset_options" else table
    if place in ("dataset", *ARGUMENT_PLACES):
        return fate_of(place, name)
    return None if table else fate_of("option", key)


def list_unverified(files: Mapping[str, str]) -> tuple[str, ...]:
    """Options of a run's files that are left to the trainer. `files`: the text of each by its name."""
    names: set[tuple[Place, str]] = set()
    for section, values in tomllib.loads(files.get(TRAINER_FILE, "")).items():
        names |= {("option", name) for name in (values if isinstance(values, dict) else [section])}
    for dataset in tomllib.loads(files.get(DATASET_FILE, "")).get("datasets", []):
        for table in (dataset, *dataset.get("subsets", [])):
            names |= {("dataset", name) for name in table if name != "subsets"}
    return tuple(sorted(name for place, name in names if fate_of(place, name).kind == "unverified"))


OF_THE_RUN = ("engine", "data", "seed", "effective_batch", "batch_per_gpu")
"""Entries of the lock's [run] that decide the weights."""

PLACES: Mapping[str, Place] = {
    "values": "option",
    "dataset": "dataset",
    "preset": "preset",
    **{place: place for place in ARGUMENT_PLACES},
}
"""The lock's tables of options, and what the fates call them."""


def digest_options(lock: Mapping[str, Any]) -> str:
    """The sha256 in hex over the options of a lock that decide the weights.

    Left out are places, the length, what an attempt may have otherwise, and values that are the trainer's own
    defaults: setting one of them changes nothing.
    """
    decisive = dict(list_decisive(lock))
    return sha256_of_text(json.dumps(decisive, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def list_decisive(lock: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`table.name` and value of every option of the digest."""
    for name in OF_THE_RUN:
        yield f"run.{name}", lock["run"].get(name)
    for name, value in lock.get("cache", {}).items():
        yield f"cache.{name}", value
    if held_out := lock.get("validation", {}).get("digest"):
        yield "validation.digest", held_out
    known = load_recorded_table()
    options = {"values": known.options, "dataset": known.dataset_options}
    for table, place in PLACES.items():
        for name, value in lock.get(table, {}).items():
            option = options.get(table, {}).get(name)
            if fate_of(place, name).in_digest and (option is None or value != option.default):
                yield f"{table}.{name}", value
