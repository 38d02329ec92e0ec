"""Names and shapes of an SDXL single-file checkpoint for given model sizes, after diffusers' own conversion.

Reads the config of the four models as JSON from stdin, prints {tensor name: shape} as JSON. Which sgm name
belongs to which diffusers parameter is not written down here: every name that an SDXL file could hold goes
through diffusers' converter, marked, and the marks that arrive at a parameter of the model are kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from kohaku_wrap.formats.sdxl import TEXT_ENCODER_2_PREFIX, TEXT_ENCODER_PREFIX, name_text_encoder, name_unet, name_vae
from kohaku_wrap.processes import answer

Shapes = dict[str, list[int]]
Converter = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def match_names(model: torch.nn.Module, candidates: Iterable[str], convert: Converter) -> Shapes:
    """The candidates that the converter turns into parameters of `model`, with their shapes in the file.

    Raises RuntimeError when a parameter is left without a name.
    """
    wanted = model.state_dict()
    names = list(candidates)
    # The VAE's attention is a 1x1 convolution in the file and a linear layer in diffusers.
    as_convolution = {name for name in names if ".attn_1." in name and name.endswith("weight") and ".norm." not in name}
    marked = {
        name: torch.full((1, 1, 1, 1) if name in as_convolution else (1,), float(index))
        for index, name in enumerate(names)
    }
    shapes: Shapes = {}
    found = set()
    for parameter, mark in convert(marked).items():
        if parameter in wanted:
            name = names[int(mark.flatten()[0])]
            shapes[name] = [*wanted[parameter].shape, *((1, 1) if name in as_convolution else ())]
            found.add(parameter)
    if found != wanted.keys() or len(shapes) != len(found):
        raise RuntimeError(f"{type(model).__name__}: no sgm name for {sorted(wanted.keys() - found)}")
    return shapes


def list_text_encoder_2_shapes(model: torch.nn.Module, config: Mapping[str, Any]) -> Shapes:
    """OpenCLIP's names: queries, keys and values lie in one tensor, the projection is transposed."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "positional_embedding": [config["max_position_embeddings"], width],
        "token_embedding.weight": [config["vocab_size"], width],
        "text_projection": [width, config["projection_dim"]],
        "logit_scale": [],
        "ln_final.weight": [width],
        "ln_final.bias": [width],
    }
    sizes = {"ln_1": [width], "ln_2": [width], "attn.out_proj": [width, width]}
    sizes |= {"mlp.c_fc": [inner, width], "mlp.c_proj": [width, inner]}
    for layer in range(config["num_hidden_layers"]):
        block = f"transformer.resblocks.{layer}"
        shapes |= {f"{block}.attn.in_proj_weight": [3 * width, width], f"{block}.attn.in_proj_bias": [3 * width]}
        for name, size in sizes.items():
            shapes |= {f"{block}.{name}.weight": size, f"{block}.{name}.bias": size[:1]}
    in_model = sum(parameter.numel() for parameter in model.parameters())
    in_file = sum(int(torch.Size(size).numel()) for size in shapes.values()) - 1
    if in_model != in_file:
        raise RuntimeError(f"text encoder 2: {in_file} values in the file, {in_model} in the model")
    return shapes


def list_sgm_tensors(config: Mapping[str, Mapping[str, Any]]) -> Shapes:
    """All tensors of the checkpoint, by ascending name."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config["unet"])
        vae = AutoencoderKL(**config["vae"])
        text_encoder = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"]))
    shapes = match_names(
        unet, name_unet(config["unet"]), lambda marked: convert_ldm_unet_checkpoint(marked, dict(unet.config))
    )
    shapes |= match_names(
        vae, name_vae(config["vae"]), lambda marked: convert_ldm_vae_checkpoint(marked, dict(vae.config))
    )
    shapes |= match_names(
        text_encoder,
        name_text_encoder(config["text_encoder"]),
        lambda marked: convert_ldm_clip_checkpoint(marked, TEXT_ENCODER_PREFIX),
    )
    second = list_text_encoder_2_shapes(text_encoder_2, config["text_encoder_2"])
    shapes |= {TEXT_ENCODER_2_PREFIX + name: shape for name, shape in second.items()}
    # Present in Stability's file, int64, and a buffer that newer transformers do not save.
    positions = TEXT_ENCODER_PREFIX + "text_model.embeddings.position_ids"
    shapes[positions] = [1, config["text_encoder"]["max_position_embeddings"]]
    return dict(sorted(shapes.items()))


if __name__ == "__main__":
    answer(lambda: list_sgm_tensors(json.load(sys.stdin)))
