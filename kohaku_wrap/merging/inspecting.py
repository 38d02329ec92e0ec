"""What a checkpoint or network file is: kind, keys, types, hashes, metadata and the merge that made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.files import Progress
from kohaku_wrap.formats.network_names import is_diffusers_name
from kohaku_wrap.formats.safetensors import Header, read_header
from kohaku_wrap.formats.sdxl import TEXT_ENCODER_2_PREFIX, TEXT_ENCODER_PREFIX, UNET_PREFIX
from kohaku_wrap.merging.blocks import is_vae
from kohaku_wrap.merging.hashes import FileHashes, hash_files
from kohaku_wrap.merging.networks import algorithm_of, group_modules, is_network
from kohaku_wrap.merging.recipes import RECIPE_TYPE, as_table, command_of_recipe, parse_json

SQLITE_MAGIC = b"SQLite format 3\x00"


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


def is_database(path: Path) -> bool:
    """Whether a file is an sqlite database, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC


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
    keys = header.tensors
    if is_network(header):
        found = Counter(algorithm_of(tensors) or "unknown" for tensors in group_modules(header).values())
        main = [name for name, _ in found.most_common() if name != "norm"] or ["norm"]
        dora = any(key.endswith(".dora_scale") for key in keys)
        naming = "diffusers" if any(is_diffusers_name(key.partition(".")[0]) for key in keys) else "sgm"
        return f"{' + '.join(main)} network{' with DoRA' if dora else ''} ({naming} names)"
    if any(key.startswith(TEXT_ENCODER_2_PREFIX) for key in keys) and any(key.startswith(UNET_PREFIX) for key in keys):
        return "SDXL checkpoint"
    if any(key.startswith("cond_stage_model.") for key in keys):
        return "SD 1 or 2 checkpoint"
    if any(key.startswith(UNET_PREFIX) for key in keys):
        return "UNet of a checkpoint"
    if any(key.startswith(("down_blocks.", "up_blocks.")) for key in keys):
        return "UNet in diffusers' form"
    if keys and all(
        is_vae(key) or key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant")) for key in keys
    ):
        return "VAE"
    return "tensors of no known model" if keys else "no tensors"


def parts_of_file(header: Header) -> dict[str, int]:
    """Tensors by part of a checkpoint, or modules by algorithm of a network."""
    if is_network(header):
        modules = group_modules(header)
        parts: Counter[str] = Counter()
        for name, tensors in modules.items():
            place = "UNet" if name.startswith("lora_unet_") else "text encoder"
            parts[f"{place} modules, {algorithm_of(tensors) or 'unknown'}"] += 1
        return dict(parts)
    names = {UNET_PREFIX: "UNet", TEXT_ENCODER_PREFIX: "text encoder 1", TEXT_ENCODER_2_PREFIX: "text encoder 2"}
    counts: Counter[str] = Counter()
    for key in header.tensors:
        part = next(
            (name for prefix, name in names.items() if key.startswith(prefix)), "VAE" if is_vae(key) else "other"
        )
        counts[part] += 1
    return dict(counts)


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
        "auto_v2": hashes.auto_v2 if hashes else None,
        "sshs_model_hash": hashes.data_sha256 if hashes else None,
        "metadata": header.metadata,
        "merge_recipe": report.recipe,
        "merge_models": report.parents,
        "replay": report.replay,
        "keys": keys_of_header(header),
    }


def keys_of_header(header: Header) -> list[dict[str, Any]]:
    return [{"key": key, "dtype": spot.dtype, "shape": list(spot.shape)} for key, spot in header.tensors.items()]


def short_metadata(metadata: Mapping[str, str], limit: int = 200) -> dict[str, str]:
    """Metadata for a table: without the merge's own entries, long values cut."""
    own = ("sd_merge_recipe", "sd_merge_models")
    return {
        key: value if len(value) <= limit else f"{value[:limit]}… ({len(value):,} characters)"
        for key, value in metadata.items()
        if key not in own
    }
