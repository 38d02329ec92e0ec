"""What a network that was made of a formula says of itself."""

from __future__ import annotations

from collections.abc import Mapping

from kohaku_wrap.formats.layouts import read_layout
from kohaku_wrap.formats.safetensors import Header
from kohaku_wrap.merging.hashes import FileHashes
from kohaku_wrap.merging.plan import DEFAULT_FACTOR, DEFAULT_RANK, MergePlan
from kohaku_wrap.merging.recipes import Recipe, compose_metadata, dump_json, name_of_file

BASE_VERSIONS = {"stable-diffusion-xl-v1-base": "sdxl_base_v1-0", "stable-diffusion-v1": "sd_v1"}
"""ss_base_model_version, as sd-scripts writes it, by modelspec.architecture."""


def build_network_metadata(
    plan: MergePlan, hashes: Mapping[str, FileHashes], title: str = "", date: str = "", recipe: Recipe | None = None
) -> dict[str, str]:
    """The metadata of a change that is written as a network, as far as it is true of it.

    `ss_network_*` as sd-scripts writes them, which calls ranks that differ `Dynamic`; what a training would say
    (steps, tags) has no meaning here.
    """
    headers = {**plan.files, **plan.networks}
    kind, rank = plan.options.network, plan.options.rank or (DEFAULT_RANK if plan.files else 0)
    parents = [header.metadata for header in headers.values()]
    architectures = {architecture_of_parent(header) for header in headers.values()} - {""}
    architecture = architectures.pop() if len(architectures) == 1 else ""
    subtracted = {name for sums in plan.combinations for name, value in sums.shares().items() if value < 0}
    bases = {text for each in parents if (text := each.get("ss_sd_model_name"))}
    if plan.files:
        bases = {name_of_file(plan.files[name].path) for name in subtracted}
    dimension = "Dynamic" if plan.options.energy or not rank else str(rank)
    arguments = {"algo": kind, "factor": plan.options.factor or DEFAULT_FACTOR} if kind == "lokr" else {"algo": kind}
    if kind == "lora":
        arguments = {"conv_dim": dimension, "conv_alpha": dimension}
    own = {
        "modelspec.architecture": f"{architecture}/lora" if architecture else "",
        "ss_network_module": "networks.lora" if kind == "lora" else "lycoris.kohya",
        "ss_network_args": dump_json(arguments),
        "ss_network_dim": dimension if kind == "lora" else "",
        "ss_network_alpha": dimension if kind == "lora" else "",
        "ss_base_model_version": BASE_VERSIONS.get(architecture, ""),
        "ss_sd_model_name": bases.pop() if len(bases) == 1 else "",
    }
    return compose_metadata(plan, hashes, own, title, date, recipe)


def architecture_of_parent(header: Header) -> str:
    """A checkpoint's or a network's architecture, as modelspec spells it without `/lora`; empty where unknown."""
    said = header.metadata.get("modelspec.architecture", "").removesuffix("/lora")
    by_version = {version: name for name, version in BASE_VERSIONS.items()}
    return said or by_version.get(header.metadata.get("ss_base_model_version", "")) or read_layout(header).architecture
