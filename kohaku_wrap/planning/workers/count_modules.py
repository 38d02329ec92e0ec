"""Modules and parameters that a LyCORIS preset makes, counted on the meta device and printed as one JSON document.

Reads a request as JSON from stdin: `preset`, `network_args`, `network_dim`, `network_alpha`, `base_model` (a path
whose `config.json` holds the sizes; else SDXL's), `checkout` (an sd-scripts folder whose own UNet is counted).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("LYCORIS_KERNEL_BACKEND", "torch")
os.environ.setdefault("LYCORIS_KERNEL_TUNE", "off")

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kohaku_wrap.config.base_model import read_sizes
from kohaku_wrap.formats.sdxl import SDXL_SIZES, name_unet
from kohaku_wrap.planning.workers.list_sgm_tensors import match_names
from kohaku_wrap.planning.workers.module_names import build_named_view, pair_names
from kohaku_wrap.processes import answer


def build_diffusers_unet(sizes: Mapping[str, Any]) -> tuple[nn.Module, nn.Module]:
    """diffusers' UNet on the meta device, and its modules under the checkpoint's names."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        unet = UNet2DConditionModel(**sizes)
    config = dict(unet.config)
    shapes = match_names(unet, name_unet(config), lambda marked: convert_ldm_unet_checkpoint(marked, config))
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    converted = convert_ldm_unet_checkpoint(dict(tensors), config)
    return unet, build_named_view(unet, pair_names(tensors, converted))


def build_trainer_unet(checkout: Path) -> nn.Module:
    """sd-scripts' own UNet at full size on the meta device."""
    from kohaku_wrap.planning.workers.list_options import stand_in_for_torchvision

    sys.path.insert(0, str(checkout))
    stand_in_for_torchvision()
    from library import sdxl_original_unet

    with torch.device("meta"):
        unet: nn.Module = sdxl_original_unet.SdxlUNet2DConditionModel()
    return unet


def build_text_encoders(sizes: Mapping[str, Mapping[str, Any]]) -> list[nn.Module]:
    """Both text encoders on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        first = CLIPTextModel(CLIPTextConfig(**sizes["text_encoder"]))
        second = CLIPTextModelWithProjection(CLIPTextConfig(**sizes["text_encoder_2"]))
    return [first, second]


def count_parameters(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


class ValuesOnCpu(TorchFunctionMode):
    """Within the meta device, keep what is made of numbers on the CPU: LyCORIS reads the size of a kernel from it.

    Where it copies a weight to the CPU (DoRA, full differences), that stays as it is: only its shape is of interest.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor:
            kwargs.setdefault("device", "cpu")
        if func is torch.Tensor.cpu and args[0].is_meta:
            return args[0]
        return func(*args, **kwargs)


def create_network(request: Mapping[str, Any], unet: nn.Module, text_encoders: list[nn.Module], folder: Path) -> Any:
    """The network as sd-scripts creates it, on the meta device."""
    from lycoris import kohya
    from lycoris.logging import logger

    from kohaku_wrap.formats.toml_text import toml_text

    logger.setLevel(logging.ERROR)
    arguments = dict(item.split("=", 1) for item in request["network_args"])
    if request["preset"]:
        preset = folder / "preset.toml"
        preset.write_text(toml_text(request["preset"]), encoding="utf-8")
        arguments["preset"] = str(preset)
    arguments.setdefault("dropout", None)
    with torch.device("meta"), ValuesOnCpu():
        return kohya.create_network(
            1.0, request["network_dim"], request["network_alpha"], None, text_encoders, unet, **arguments
        )


def list_modules(unet: nn.Module, text_encoders: list[nn.Module]) -> list[str]:
    """The names that a network has for all modules of a model, those that no preset trains too."""
    roots = {"lora_unet": unet} | {f"lora_te{number}": root for number, root in enumerate(text_encoders, 1)}
    named = ((prefix, name) for prefix, root in roots.items() for name, _ in root.named_modules() if name)
    return [f"{prefix}_{name}".replace(".", "_") for prefix, name in named]


def find_unmatched(
    preset: Mapping[str, Any], network: Any, unet: nn.Module, text_encoders: list[nn.Module]
) -> list[str]:
    """`key: pattern` for each target, factor or exclusion of the preset that fits no module."""
    parts = {"unet": [unet], "text_encoder": text_encoders}
    names = {part: [name for root in roots for name, _ in root.named_modules()] for part, roots in parts.items()}
    classes = {part: {type(m).__name__ for root in roots for m in root.modules()} for part, roots in parts.items()}
    every_name = names["unet"] + names["text_encoder"]
    every_class = classes["unet"] | classes["text_encoder"]
    unmatched = []

    def fits(patterns: Iterable[str], candidates: Iterable[str]) -> list[str]:
        return [name for name in candidates if any(name == each or network.match_fn(each, name) for each in patterns)]

    # LyCORIS looks into name_algo_map only for modules that it takes by their name.
    by_name = [name for part in parts for name in fits(preset.get(f"{part}_target_name", []), names[part])]
    looked_up = {"name_algo_map": by_name, "exclude_name": every_name}
    for part in parts:
        wanted = preset.get(f"{part}_target_module", [])
        unmatched += [f"{part}_target_module: {each}" for each in wanted if each not in classes[part]]
        wanted = preset.get(f"{part}_target_name", [])
        unmatched += [f"{part}_target_name: {each}" for each in wanted if not fits([each], names[part])]
    unmatched += [f"module_algo_map: {each}" for each in preset.get("module_algo_map", {}) if each not in every_class]
    for key, candidates in looked_up.items():
        unmatched += [f"{key}: {each}" for each in preset.get(key, []) if not fits([each], candidates)]
    return unmatched


def count_modules(request: Mapping[str, Any]) -> dict[str, Any]:
    """The counts of one request."""
    base_model = request.get("base_model")
    sizes = read_sizes(Path(base_model)) if base_model else SDXL_SIZES
    checkout = request.get("checkout")
    if checkout:
        model = unet = build_trainer_unet(Path(checkout))
    else:
        model, unet = build_diffusers_unet(sizes["unet"])
    text_encoders = build_text_encoders(sizes)
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**sizes["vae"])
    with tempfile.TemporaryDirectory() as folder:
        network = create_network(request, unet, text_encoders, Path(folder))
    with ValuesOnCpu():
        tensors = sum(len(module.state_dict()) for module in network.loras)
    return {
        "counted_on": "sd-scripts" if checkout else "diffusers",
        "unet_modules": len(network.unet_loras),
        "text_encoder_modules": len(network.text_encoder_loras),
        "unet_parameters": count_parameters(network.unet_loras),
        "text_encoder_parameters": count_parameters(network.text_encoder_loras),
        "module_kinds": Counter(type(module).__name__ for module in network.loras),
        "tensors": tensors,
        "unmatched": find_unmatched(request["preset"], network, unet, text_encoders),
        "base_unet_parameters": count_parameters([model]),
        "base_text_encoder_parameters": count_parameters(text_encoders),
        "base_vae_parameters": count_parameters([vae]),
    }


if __name__ == "__main__":
    answer(lambda: count_modules(json.load(sys.stdin)))
