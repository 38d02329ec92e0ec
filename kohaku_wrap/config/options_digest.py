"""One digest over all options that decide the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from kohaku_wrap.config.fates import ARGUMENT_PLACES, Place, fate_of
from kohaku_wrap.trainer.options import load_recorded_table

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
    text = json.dumps(decisive, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


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
