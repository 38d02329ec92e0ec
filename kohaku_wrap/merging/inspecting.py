"""What a checkpoint or network file is: kind, keys, types, hashes, metadata and the merge that made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.files import Progress
from kohaku_wrap.formats.layouts import WORDS_OF_PART, part_of_key, read_layout
from kohaku_wrap.formats.safetensors import Header, read_header
from kohaku_wrap.merging.hashes import FileHashes, find_auto_v1, hash_files, name_recorded_hash
from kohaku_wrap.merging.networks.files import describe_network, group_modules, is_network
from kohaku_wrap.merging.networks.modules import algorithm_of
from kohaku_wrap.merging.replays import RECIPE_TYPE, as_table, command_of_recipe, parse_json

SHOWN = 200
"""Characters of a value of the metadata."""


@dataclass(frozen=True)
class FileReport:
    """All that `kwrap inspect` tells of a safetensors file."""

    header: Header
    """Keys, types and metadata."""

    kind: str
    """In words, such as `SDXL checkpoint` or `LoKr network`."""

    hashes: FileHashes | None
    """None where they were not asked for."""

    dtypes: dict[str, tuple[int, int, int]]
    """For each type: tensors, elements, bytes."""

    parts: dict[str, int]
    """How many tensors belong to each part: UNet, text encoders, VAE, or a network's modules by kind."""

    recipe: Any
    """`sd_merge_recipe`, parsed; None without one."""

    parents: dict[str, Any]
    """`sd_merge_models`, parsed: what is known of each parent by its sha256."""

    replay: str
    """The command that would make the file again; empty where its recipe is not kwrap's."""


def inspect_file(path: Path, hashed: bool = True, on_progress: Progress = lambda done, total: None) -> FileReport:
    """The report on a safetensors file.

    `hashed`: whether the whole file is read for its hashes. Raises MalformedFile or PickledFile.
    """
    header = read_header(path)
    dtypes: dict[str, tuple[int, int, int]] = {}
    for spot in header.tensors.values():
        tensors, elements, size = dtypes.get(spot.dtype, (0, 0, 0))
        dtypes[spot.dtype] = tensors + 1, elements + spot.elements, size + spot.size_bytes
    recipe = parse_json(header.metadata.get("sd_merge_recipe"))
    parents = as_table(parse_json(header.metadata.get("sd_merge_models")))
    ours = isinstance(recipe, dict) and recipe.get("type") == RECIPE_TYPE
    return FileReport(
        header,
        kind_of_file(header),
        hash_files([path], on_progress=on_progress, read_again=True)[0] if hashed else None,
        dtypes,
        parts_of_file(header),
        recipe,
        parents,
        command_of_recipe(recipe, parents, header.metadata, path.name) if ours else "",
    )


def kind_of_file(header: Header) -> str:
    """The kind of model or network in words."""
    return describe_network(header) if is_network(header) else read_layout(header).kind


def parts_of_file(header: Header) -> dict[str, int]:
    """Tensors by part of a checkpoint, or modules by algorithm of a network."""
    if is_network(header):
        modules = group_modules(header)
        parts: Counter[str] = Counter()
        for name, tensors in modules.items():
            place = "UNet" if name.startswith("lora_unet_") else "text encoder"
            parts[f"{place} modules, {algorithm_of(tensors) or 'unknown'}"] += 1
        return dict(parts)
    return dict(Counter(WORDS_OF_PART.get(part_of_key(key), "other") for key in read_layout(header).header.tensors))


def describe_report(report: FileReport) -> dict[str, Any]:
    """The report as one JSON value."""
    header, hashes = report.header, report.hashes
    return {
        "file": str(header.path),
        "kind": report.kind,
        "size_bytes": header.size_bytes,
        "tensors": len(header.tensors),
        "parts": report.parts,
        "dtypes": {
            name: {"tensors": tensors, "elements": elements, "bytes": size}
            for name, (tensors, elements, size) in report.dtypes.items()
        },
        "sha256": hashes.sha256 if hashes else None,
        "auto_v1": find_auto_v1(header.path) if hashes else None,
        "auto_v2": hashes.auto_v2 if hashes else None,
        "auto_v3": hashes.auto_v3 if hashes else None,
        "sshs_model_hash": hashes.data_sha256 if hashes else None,
        "recorded": recorded_hashes(report),
        "metadata": header.metadata,
        "merge_recipe": report.recipe,
        "merge_models": report.parents,
        "replay": report.replay,
        "keys": [{"key": key, "dtype": spot.dtype, "shape": list(spot.shape)} for key, spot in header.tensors.items()],
    }


def recorded_hashes(report: FileReport) -> dict[str, str]:
    """The hashes that the file's metadata say, each with what it is."""
    said, words = report.header.metadata, {}
    if recorded := said.get("sshs_model_hash"):
        what = f" ({name_recorded_hash(recorded, report.hashes)})" if report.hashes else ""
        words["sshs_model_hash"] = f"{recorded}{what}"
    if "sshs_legacy_hash" in said:
        words["sshs_legacy_hash"] = f"{said['sshs_legacy_hash']} (AutoV1 of the file with its ss_ metadata alone)"
    return words


def short_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata for a table: without the merge's own entries, long values cut."""
    own = ("sd_merge_recipe", "sd_merge_models", "sshs_model_hash", "sshs_legacy_hash")
    return {
        key: value if len(value) <= SHOWN else f"{value[:SHOWN]}… ({len(value):,} characters)"
        for key, value in metadata.items()
        if key not in own
    }
