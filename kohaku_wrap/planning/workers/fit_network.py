"""Whether a network's file fits the network that a template makes, by names, shapes and alphas, as one JSON document.

Reads a request as JSON from stdin: that of count_modules, and `network` (the file), `checkpoint_keys` (the base model's
tensors), `unet`, `text_encoders` and `from_weights` (whether each part is trained, and whether the file decides the
modules), `out` (where to write the file under the template's names, where its own are others).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.planning.workers.count_modules import (
    ValuesOnCpu,
    build_diffusers_unet,
    build_text_encoders,
    create_network,
    list_modules,
)
from kohaku_wrap.planning.workers.list_options import stand_in_for_torchvision

# After count_modules, which settles LyCORIS' variables.
import torch  # isort: skip
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kohaku_wrap.config.base_model import read_sizes
from kohaku_wrap.formats.network_keys import read_network_key
from kohaku_wrap.formats.network_names import find_targets, table_of_targets
from kohaku_wrap.formats.sdxl import SDXL_SIZES
from kohaku_wrap.processes import answer

ALPHA = "alpha"
DOWN = "lora_down.weight"

Tensors = dict[str, torch.Tensor]
Modules = dict[str, Tensors]


def group(tensors: Mapping[str, torch.Tensor]) -> Modules:
    """The tensors by module, in kohya's words; what stands a second time under another name keeps that."""
    modules: defaultdict[str, Tensors] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, suffix = read_network_key(key)
        modules[key if suffix in modules.get(name, ()) else name][suffix] = tensor
    for found in modules.values():
        if DOWN in found:
            # PEFT and diffusers write none, and mean a scale of 1.
            found.setdefault(ALPHA, torch.tensor(float(len(found[DOWN]))))
    return modules


def pair_names(names: list[str], own: list[str], checkpoint_keys: list[str]) -> dict[str, str]:
    """For each module of the file the one of the model that changes the same weight, where there is one left."""
    table = table_of_targets(checkpoint_keys)
    of_target = {}
    for name in own:
        if targets := find_targets(name, table):
            of_target[targets.get("weight") or targets["bias"]] = name
    pairs = {name: name for name in names if name in own}
    for name in names:
        targets = find_targets(name, table)
        if name in pairs or not targets:
            continue
        other = of_target.get(targets.get("weight") or targets["bias"])
        if other and other not in pairs.values():
            pairs[name] = other
    return pairs


def create_kohya_lora(request: Mapping[str, Any], unet: nn.Module, text_encoders: list[nn.Module], _: Path) -> Any:
    """sd-scripts' own LoRA network, by the checkout's code, on the meta device."""
    sys.path.insert(0, request["checkout"])
    stand_in_for_torchvision()
    from library.sdxl_original_unet import SdxlUNet2DConditionModel
    from networks import lora

    # By its class it knows SDXL, and then counts the blocks that have a rank of their own.
    unet.__class__ = type("NamedUNet", (SdxlUNet2DConditionModel,), {})
    arguments = dict(item.split("=", 1) for item in request["network_args"])
    with torch.device("meta"), ValuesOnCpu():
        return lora.create_network(
            1.0, request["network_dim"], request["network_alpha"], None, text_encoders, unet, **arguments
        )


def fit_network(request: Mapping[str, Any]) -> dict[str, Any]:
    """What fits and what does not."""
    path = Path(request["network"])
    found = load_file(path)
    modules = group(found)
    sizes = read_sizes(Path(request["base_model"])) if request["base_model"] else SDXL_SIZES
    _, unet = build_diffusers_unet(sizes["unet"])
    text_encoders = build_text_encoders(sizes)
    if request["from_weights"]:
        own = list_modules(unet, text_encoders)
    else:
        with tempfile.TemporaryDirectory() as folder:
            create = create_kohya_lora if request["checkout"] else create_network
            network = create(request, unet, text_encoders, Path(folder))
        loras = network.unet_loras * request["unet"] + network.text_encoder_loras * request["text_encoders"]
        wanted = {lora.lora_name: lora for lora in loras}
        own = list(wanted)
    pairs = pair_names(list(modules), own, request["checkpoint_keys"])
    answered: dict[str, Any] = {
        "extra": sorted(modules.keys() - pairs.keys()),
        "missing": [],
        "unlike": [],
    }
    if not request["from_weights"]:
        answered["missing"] = sorted(wanted.keys() - set(pairs.values()))
        answered["unlike"] = [
            f"{name}: {what}" for name, other in pairs.items() if (what := compare(modules[name], wanted[other]))
        ]
    written = {
        f"{pairs.get(name, name)}.{suffix}": tensor
        for name, tensors in modules.items()
        for suffix, tensor in tensors.items()
    }
    answered["renamed"] = written.keys() != found.keys()
    if request.get("out") and answered["renamed"]:
        with safe_open(path, "pt") as header:
            metadata = header.metadata()
        save_file(written, request["out"], metadata)
    return answered


def compare(found: Tensors, lora: Any) -> str:
    """How the file's module differs from the template's; empty where it does not."""
    own = lora.state_dict().items()
    wanted = {suffix: list(tensor.shape) for suffix, tensor in own if not suffix.startswith("org_module.")}
    shapes = {suffix: list(tensor.shape) for suffix, tensor in found.items()}
    lacking, more = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    if lacking or more:
        return f"has {', '.join(sorted(shapes))}; the template's has {', '.join(sorted(wanted))}"
    for suffix, shape in wanted.items():
        if math.prod(shape) != math.prod(shapes[suffix]) or (shape != shapes[suffix] and suffix != ALPHA):
            return f"{suffix} is {shapes[suffix]}; the template's is {shape}"
    if ALPHA in found and (scale := getattr(lora, "scale", None)) is not None:
        trained = float(found[ALPHA]) / lora.lora_dim
        if not math.isclose(trained, float(scale), rel_tol=1e-3):
            return f"was trained with alpha / dim = {trained:g}; the template's is {float(scale):g}"
    return ""


if __name__ == "__main__":
    answer(lambda: fit_network(json.load(sys.stdin)))
