"""One digest over all options that decide the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from kohaku_wrap.config.options import load_recorded_table
from kohaku_wrap.config.schema import ARGUMENT_TABLES

LENGTH = frozenset({"max_train_epochs", "max_train_steps"})
"""How long it trains is no part of the digest."""

BY_ATTEMPT = frozenset({"gradient_accumulation_steps", "max_data_loader_n_workers", "persistent_data_loader_workers"})
"""Options that an attempt may have otherwise without another result: the effective batch stays the same."""

PLACES = frozenset(
    {
        "output_dir",
        "output_name",
        "sample_prompts",
        "logging_dir",
        "pretrained_model_name_or_path",
        "vae",
        "tokenizer_cache_dir",
        "image_dir",
    }
)
"""Options that say where things are; what lies there has digests of its own."""

FILES_ONLY = (
    "save_",
    "sample_",
    "log_",
    "wandb_",
    "metadata_",
    "no_metadata",
    "training_comment",
    "console_log_",
    "huggingface_",
    "async_upload",
    "config_file",
    "output_config",
)
"""How the names of options begin that decide files and logs alone."""

OF_THE_RUN = ("engine", "data", "seed", "effective_batch", "batch_per_gpu")
"""Entries of the lock's [run] that decide the weights."""

PLACE_OF_TABLE = {"values": "option", "dataset": "dataset"}
"""How the fates name the lock's tables."""


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
    table = load_recorded_table()
    for name in OF_THE_RUN:
        yield f"run.{name}", lock["run"].get(name)
    defaults = {
        "values": {name: option.default for name, option in table.options.items()},
        "dataset": {name: option.default for name, option in table.dataset_options.items()},
    }
    for kind in ("values", "dataset", *ARGUMENT_TABLES, "preset"):
        for name, value in lock.get(kind, {}).items():
            if decides_weights(PLACE_OF_TABLE.get(kind, kind), name) and value != defaults.get(kind, {}).get(name):
                yield f"{kind}.{name}", value


def decides_weights(place: str, name: str) -> bool:
    """Whether an option is part of the digest. `place`: option, dataset, preset or the name of an argument table."""
    if place == "option" and name in LENGTH | BY_ATTEMPT:
        return False
    if place in ("option", "dataset") and name in PLACES:
        return False
    return not (place == "option" and name.startswith(FILES_ONLY))
