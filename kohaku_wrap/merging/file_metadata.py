"""What a file that a formula made says of itself: title and kind, how it was made, its parents and their licenses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kohaku_wrap
from kohaku_wrap.formats.layouts import read_layout
from kohaku_wrap.formats.machine_paths import clean_value, without_paths
from kohaku_wrap.formats.network_names import KOHYA_LORA, LYCORIS
from kohaku_wrap.formats.safetensors import Header
from kohaku_wrap.merging.formula.tree import format_formula
from kohaku_wrap.merging.hashes import FileHashes
from kohaku_wrap.merging.plan import DEFAULT_FACTOR, DEFAULT_RANK, MergeOptions, MergePlan
from kohaku_wrap.merging.recipes import Recipe
from kohaku_wrap.merging.replays import RECIPE_TYPE, as_table, dump_json, parse_json

NESTED_VALUE_LIMIT = 16_384
NESTED_PREFIXES = ("ss_", "sshs_", "modelspec.")

BASE_VERSIONS = {"stable-diffusion-xl-v1-base": "sdxl_base_v1-0", "stable-diffusion-v1": "sd_v1"}
"""ss_base_model_version, as sd-scripts writes it, by modelspec.architecture."""


def build_metadata(
    plan: MergePlan, hashes: Mapping[str, FileHashes], title: str = "", date: str = "", recipe: Recipe | None = None
) -> dict[str, str]:
    """The metadata of the file, in a fixed order and without the time unless `date` is given.

    Nothing in them is empty, or a path of this machine. `hashes`: of every file of the plan, by name. Source:
    Stability's model metadata standard 1.0.1 and the `sd_merge_recipe` and `sd_merge_models` that webui writes.
    """
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title or (recipe.title if recipe else "") or plan.formula.source,
        "modelspec.merged_from": ", ".join(name_of_file(header.path) for header in plan.headers.values()),
        "modelspec.prediction_type": plan.prediction,
        "modelspec.license": join_licenses(plan.headers).text,
        "modelspec.date": date,
        **(describe_network(plan) if plan.options.network else describe_checkpoint(plan)),
        **describe_making(plan, hashes, recipe),
    }
    return without_paths({key: text for key, text in metadata.items() if text})


def describe_checkpoint(plan: MergePlan) -> dict[str, str]:
    """What is true of a merged checkpoint alone: the anchor's own words, where it has them."""
    anchor = plan.files[plan.anchor]
    kept = ("modelspec.architecture", "modelspec.implementation", "modelspec.resolution")
    own = {"modelspec.architecture": read_layout(anchor).architecture}
    return own | {key: text for key in kept if (text := anchor.metadata.get(key))}


def describe_network(plan: MergePlan) -> dict[str, str]:
    """What is true of a change that is written as a network.

    `ss_network_*` as sd-scripts writes them, which calls ranks that differ `Dynamic`; what a training would say
    (steps, tags) has no meaning here.
    """
    kind, rank = plan.options.network, plan.options.rank or (DEFAULT_RANK if plan.files else 0)
    parents = [header.metadata for header in plan.headers.values()]
    architectures = {architecture_of_parent(header) for header in plan.headers.values()} - {""}
    architecture = architectures.pop() if len(architectures) == 1 else ""
    subtracted = {name for sums in plan.combinations for name, value in sums.shares().items() if value < 0}
    bases = {text for each in parents if (text := each.get("ss_sd_model_name"))}
    if plan.files:
        bases = {name_of_file(plan.files[name].path) for name in subtracted}
    dimension = "Dynamic" if plan.options.energy or not rank else str(rank)
    arguments = {"algo": kind, "factor": plan.options.factor or DEFAULT_FACTOR} if kind == "lokr" else {"algo": kind}
    if kind == "lora":
        arguments = {"conv_dim": dimension, "conv_alpha": dimension}
    return {
        "modelspec.architecture": f"{architecture}/lora" if architecture else "",
        "ss_network_module": KOHYA_LORA if kind == "lora" else LYCORIS,
        "ss_network_args": dump_json(arguments),
        "ss_network_dim": dimension if kind == "lora" else "",
        "ss_network_alpha": dimension if kind == "lora" else "",
        "ss_base_model_version": BASE_VERSIONS.get(architecture, ""),
        "ss_sd_model_name": bases.pop() if len(bases) == 1 else "",
    }


def architecture_of_parent(header: Header) -> str:
    """A checkpoint's or a network's architecture, as modelspec spells it without `/lora`; empty where unknown."""
    said = header.metadata.get("modelspec.architecture", "").removesuffix("/lora")
    by_version = {version: name for name, version in BASE_VERSIONS.items()}
    return said or by_version.get(header.metadata.get("ss_base_model_version", "")) or read_layout(header).architecture


def describe_making(plan: MergePlan, hashes: Mapping[str, FileHashes], recipe: Recipe | None) -> dict[str, str]:
    """`sd_merge_recipe` and `sd_merge_models`: how the file was made, and what is known of its parents."""
    rights = join_licenses(plan.headers)
    notes = recipe.models if recipe else {}
    merge_recipe = {
        "type": RECIPE_TYPE,
        "formula": plan.formula.source,
        "canonical_formula": format_formula(plan.formula.tree),
        "coefficients": describe_sums(plan),
        "models": {name: hashes[name].sha256 for name in plan.files},
        "networks": {name: hashes[name].sha256 for name in plan.networks},
        "descriptions": {name: text for name, text in notes.items() if text},
        "anchor": plan.anchor,
        "options": changed_options(plan.options),
        "decisions": [*plan.decisions, *([rights.conflict] if rights.conflict else [])],
        "versions": versions_used(plan),
        "primary_model_hash": hashes[plan.anchor].sha256 if plan.anchor in hashes else "",
    }
    parents: dict[str, Any] = {}
    for name, header in plan.headers.items():
        parents |= as_table(parse_json(header.metadata.get("sd_merge_models")))
        parents[hashes[name].sha256] = parent_entry(header)
    return {"sd_merge_recipe": dump_json(clean_value(merge_recipe)), "sd_merge_models": dump_json(clean_value(parents))}


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def versions_used(plan: MergePlan) -> dict[str, str]:
    """What computed the merge."""
    packages = ["numba", "numpy", *(["torch", "lycoris-lora"] if plan.networks else [])]
    return {"kwrap": kohaku_wrap.__version__, **{package: installed_version(package) for package in packages}}


def describe_sums(plan: MergePlan) -> list[dict[str, Any]]:
    """Each sum that the merge computes, as text and as exact coefficients, with how many tensors it is for."""
    return [
        {
            "sum": str(combination),
            "models": {name: str(value) for name, value in combination.models},
            "networks": {name: str(value) for name, value in combination.networks},
            "functions": {str(call): str(value) for call, value in combination.calls},
            "tensors": count,
        }
        for combination, count in plan.combinations.items()
    ]


@dataclass(frozen=True)
class License:
    """What the parents say of their licenses."""

    text: str
    """The license that the merge carries; empty if none is known or they differ."""

    conflict: str = ""
    """One line where parents differ."""


def join_licenses(headers: Mapping[str, Header]) -> License:
    """The license of the merge: the one that all parents name, or a note that they differ."""
    found = {name: header.metadata.get("modelspec.license", "") for name, header in headers.items()}
    named = {name: text for name, text in found.items() if text}
    if len(set(named.values())) == 1:
        silent = [name for name in found if name not in named]
        note = f"{', '.join(silent)} names no license" if silent else ""
        return License(next(iter(named.values())), note)
    if not named:
        return License("", "no parent names a license (modelspec.license)")
    listed = "; ".join(f"{name}: {text}" for name, text in named.items())
    return License("", f"the parents' licenses differ ({listed}); the merge names none")


def name_of_file(path: Path) -> str:
    """The file's name, as text that can be written: a name may hold bytes that are not UTF-8."""
    return os.fsencode(path.name).decode("utf-8", "replace")


def parent_entry(header: Header) -> dict[str, Any]:
    """What the merged file keeps of one parent: its name, its recipe, and its own metadata."""
    nested = {key: value for key, value in sorted(header.metadata.items()) if key.startswith(NESTED_PREFIXES)}
    kept = {key: value for key, value in nested.items() if len(value) <= NESTED_VALUE_LIMIT}
    left_out = [key for key in nested if key not in kept]
    recipe = header.metadata.get("sd_merge_recipe")
    entry: dict[str, Any] = {"name": name_of_file(header.path), "sd_merge_recipe": parse_json(recipe), "metadata": kept}
    return {**entry, "left_out": left_out} if left_out else entry


def changed_options(options: MergeOptions) -> dict[str, Any]:
    """The options that are not as usual; paths as file names, so that no machine shows."""
    changed = {each.name: value for each in fields(options) if (value := getattr(options, each.name)) != each.default}
    for name in ("like", "vae_from"):
        if name in changed:
            changed[name] = name_of_file(Path(str(changed[name])))
    return changed
