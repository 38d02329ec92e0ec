"""The files of a run as the trainer reads them: flat, one value a key, so that two of them can be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.config.schema import ARGUMENT_TABLES
from kohaku_wrap.errors import KwrapError, MissingExtra, refusing
from kohaku_wrap.file_hashes import sha256_of_text
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.trainer.options import flatten_sections

TRAINER_FILE = "trainer.toml"
DATASET_FILE = "dataset.toml"
PRESET_FILE = "preset.toml"
ACCELERATE_FILE = "accelerate.yaml"
LOCK_FILE = "run.lock.toml"
PROMPTS_FILE = "sample_prompts.txt"

COMMAND_FILE = "command.txt"
"""What the person typed, and the command that starts the trainer."""

LAYERS_FILE = "layers.json"
"""The layer that set each option of a run, by key; for people, nothing follows from it."""

LOCK_FORMAT = 2
"""Of the lock; without the entry it is 1, that of kwrap 0.1."""

PLACE_KEYS = frozenset(
    {
        "output_dir",
        "output_name",
        "sample_prompts",
        "logging_dir",
        "pretrained_model_name_or_path",
        "vae",
        "tokenizer_cache_dir",
        "base_weights",
        "network_weights",
        "image_dir",
        "network_args.preset",
    }
)
"""Keys of a run's files that say where something is; what lies there is compared by its content."""

LOCK_PLACES = frozenset(
    {
        "run.name",
        "run.secrets_file",
        "run.trust",
        "run.template_files",
        "run.template_commit",
        *(f"values.{name}" for name in PLACE_KEYS),
        "dataset.image_dir",
        "inputs.base_model",
        "inputs.images",
        "inputs.vae",
        "inputs.tokenizers",
        "inputs.latents",
        "inputs.site",
        "inputs.network",
        "inputs.network_name",
        "trainer.path",
        "machine.platform",
        "machine.accelerate.main_process_ip",
        "machine.accelerate.main_process_port",
    }
)
"""Entries of a lock that say where things are, not what they are."""


class UnreadableRunFile(KwrapError):
    """A file of the run is not what its trainer could read."""


def read_run_text(name: str, text: str) -> dict[str, Any]:
    """The values of one of the run's files by key, as they take effect. Raises UnreadableRunFile.

    Keys: `learning_rate`, `network_args.factor`, `preset.target_module`, `accelerate.mixed_precision`, an option of
    the dataset file by its name alone, or `datasets.1.NAME` beyond the first dataset.
    """
    with refusing(UnreadableRunFile, f"{name}: cannot be read", "Restore the run's own files."):
        if name == TRAINER_FILE:
            return flatten_trainer(parse_toml(text))
        if name == DATASET_FILE:
            return flatten_dataset(parse_toml(text))
        if name == PRESET_FILE:
            return dict(flatten(parse_toml(text), "preset."))
        if name == ACCELERATE_FILE:
            return dict(flatten(read_yaml(text), "accelerate."))
    return {name: text}


def read_yaml(text: str) -> dict[str, Any]:
    """A YAML mapping, by the package that accelerate reads it with. Raises MissingExtra, ValueError."""
    try:
        import yaml  # type: ignore[import-untyped]  # types-PyYAML is one package more
    except ImportError:
        raise MissingExtra("training", "train") from None
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(document, dict):
        raise ValueError("not a mapping")
    return document


def flatten_trainer(document: Mapping[str, Any]) -> dict[str, Any]:
    """The options of trainer.toml, each argument of a class as an entry of its own."""
    flat: dict[str, Any] = {}
    for name, value in flatten_sections(document).items():
        if name in ARGUMENT_TABLES and isinstance(value, list):
            # The trainer splits each at the first sign of equality, and the later of two equal names counts.
            flat |= {f"{name}.{key}": text for key, _, text in (str(each).partition("=") for each in value)}
        else:
            flat[name] = value
    return flat


def flatten_dataset(document: Mapping[str, Any]) -> dict[str, Any]:
    """The options of dataset.toml: a subset's before its dataset's before the general ones."""
    flat: dict[str, Any] = dict(document.get("general", {}))
    for number, dataset in enumerate(document.get("datasets", [])):
        start = f"datasets.{number}." if number else ""
        flat |= {start + name: value for name, value in dataset.items() if name != "subsets"}
        for inner, subset in enumerate(dataset.get("subsets", [])):
            start = f"datasets.{number}.subsets.{inner}." if number or inner else ""
            flat |= {start + name: value for name, value in subset.items()}
    return flat


def merge_subsets(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of each subset of dataset.toml's first dataset, with those of the dataset and the general ones."""
    general, first = document.get("general", {}), document.get("datasets", [{}])[0]
    dataset = {name: value for name, value in first.items() if name != "subsets"}
    return [{**general, **dataset, **subset} for subset in first.get("subsets", [])]


def find_image_folder(dataset: Mapping[str, Any]) -> str:
    """The folder with the captions of flattened dataset options; that of several subsets is above theirs."""
    folder = str(dataset.get("image_dir", ""))
    return str(Path(folder).parent) if folder and "datasets.0.subsets.1.image_dir" in dataset else folder


def is_place(key: str) -> bool:
    """Whether a key of a run's files, of any subset, says where something is."""
    return key in PLACE_KEYS or key.endswith(".image_dir")


def flatten(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`table.key` and value of every entry."""
    for name, value in tables.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def digest_lock(tables: Mapping[str, Any]) -> str:
    """The sha256 in hex over a lock's entries but for places and the digest itself."""
    entries = {
        key: value
        for key, value in flatten({name: table for name, table in tables.items() if name not in ("files", "digest")})
        if key not in LOCK_PLACES
    }
    for name, text in tables.get("files", {}).items():
        for key, value in read_run_text(name, text).items():
            entries[f"files.{name}.{key}"] = None if is_place(key) else value
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return sha256_of_text(text)
