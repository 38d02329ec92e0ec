"""diffusers' UNet under the names that sd-scripts, LyCORIS presets and network files use.

The table between the two is taken from diffusers' own conversion of single-file checkpoints: it moves tensors
without copying them, so a tensor found under both names pairs them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.sdxl import UNET_PREFIX

CLASS_NAMES = {"Attention": "CrossAttention", "TimestepEmbedding": "Sequential"}
"""Where diffusers' class has another name in sd-scripts, which LyCORIS presets go by."""


class ConversionChanged(KwrapError):
    """diffusers' conversion did something else than moving tensors; its version is not one that was tested."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"diffusers' conversion of the UNet is not the one that kwrap knows: {what}",
            "Install the versions that `make setup` pins.",
        )


def pair_names(single_file: Mapping[str, torch.Tensor], converted: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """diffusers' parameter names to those of the checkpoint, without the UNet's prefix.

    `single_file`: the checkpoint's tensors before, `converted`: after diffusers' conversion. Raises ConversionChanged.
    """
    name_of_tensor = {id(tensor): name for name, tensor in single_file.items()}
    pairs = {}
    for name, tensor in converted.items():
        if id(tensor) not in name_of_tensor:
            raise ConversionChanged(f"{name} is a copy")
        pairs[name] = name_of_tensor[id(tensor)].removeprefix(UNET_PREFIX)
    if len(set(pairs.values())) != len(pairs):
        raise ConversionChanged("two names share a tensor")
    return pairs


def build_named_view(unet: nn.Module, parameter_names: Mapping[str, str]) -> nn.Module:
    """A tree of modules with the checkpoint's names whose leaves are `unet`'s own.

    Its containers carry the class names by which LyCORIS presets choose. The view is for creating networks, never
    for running. `parameter_names` comes from `pair_names`.
    """
    leaf_names = {own.rpartition(".")[0]: other.rpartition(".")[0] for own, other in parameter_names.items()}
    classes = name_containers(unet, leaf_names)
    modules = dict(unet.named_modules())
    view = make_container("Module")
    for own, other in sorted(leaf_names.items(), key=lambda pair: natural_order(pair[1])):
        parent, parts = view, other.split(".")
        for depth, part in enumerate(parts[:-1], start=1):
            if part not in parent._modules:
                parent.add_module(part, make_container(classes.get(".".join(parts[:depth]), "Sequential")))
            parent = parent.get_submodule(part)
        parent.add_module(parts[-1], modules[own])
    return view


def name_containers(unet: nn.Module, leaf_names: Mapping[str, str]) -> dict[str, str]:
    """The class name of each container, by the checkpoint's name, where a container of diffusers holds the same leaves.

    A container that keeps its children's names is found by them; one that renames them, by what they have in common.
    """
    classes: dict[str, str] = {}
    for own, module in unet.named_modules():
        leaves = {leaf: other for leaf, other in leaf_names.items() if leaf.startswith(f"{own}.")}
        if not own or not leaves or isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        inner = {leaf.removeprefix(f"{own}."): other for leaf, other in leaves.items()}
        if all(other.endswith(f".{leaf}") for leaf, other in inner.items()):
            found = {other.removesuffix(f".{leaf}") for leaf, other in inner.items()}
        else:
            found = {common_parent(list(leaves.values()))}
        if len(found) != 1:
            continue
        name = found.pop()
        inside = {other for other in leaf_names.values() if other.startswith(f"{name}.")}
        if name and inside == set(leaves.values()):
            class_name = type(module).__name__
            classes.setdefault(name, CLASS_NAMES.get(class_name, class_name))
    return classes


def common_parent(names: list[str]) -> str:
    """The longest dotted path that all `names` lie below."""
    return os.path.commonpath([name.rpartition(".")[0].replace(".", "/") for name in names]).replace("/", ".")


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """A sort key that counts numbers as numbers."""
    return [(0, int(part)) if part.isascii() and part.isdecimal() else (1, part) for part in re.split(r"\.", name)]


def make_container(class_name: str) -> nn.Module:
    """An empty module of a class with that name."""
    container: Any = type(class_name, (nn.Module,), {})
    module: nn.Module = container()
    return module
