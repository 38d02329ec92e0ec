"""Names and shapes of an SDXL single-file checkpoint for given model sizes, after diffusers' own conversion.

Reads the config of the four models as JSON from stdin, prints {tensor name: shape} as JSON. Which sgm name
belongs to which diffusers parameter is not written down here: every name that an SDXL file could hold goes
through diffusers' converter, marked, and the marks that arrive at a parameter of the model are kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from kohaku_wrap.config.base_model import TEXT_ENCODER_2_PREFIX, TEXT_ENCODER_PREFIX, UNET_PREFIX, VAE_PREFIX

Shapes = dict[str, list[int]]
Converter = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]

RESNET_LAYERS = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
VAE_RESNET_LAYERS = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
VAE_ATTENTION_LAYERS = ("norm", "q", "k", "v", "proj_out")


def list_unet_candidates(model: torch.nn.Module, levels: int, layers: int) -> Iterator[str]:
    """Every layer that an SDXL UNet of this depth could have, by its sgm name."""
    inside_attention = {
        name.split(".attentions.")[1].split(".", 1)[1].rsplit(".", 1)[0]
        for name in model.state_dict()
        if ".attentions." in name
    }
    yield from ("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0", "out.0", "out.2")
    blocks = [f"input_blocks.{index}" for index in range(1, levels * (layers + 1))]
    blocks += [f"output_blocks.{index}" for index in range(levels * (layers + 1))]
    for block in blocks:
        yield from (f"{block}.0.{layer}" for layer in RESNET_LAYERS)
        yield from (f"{block}.1.{layer}" for layer in inside_attention)
    yield from (f"middle_block.{index}.{layer}" for index in (0, 2) for layer in RESNET_LAYERS)
    yield from (f"middle_block.1.{layer}" for layer in inside_attention)
    for level in range(1, levels):
        yield f"input_blocks.{level * (layers + 1)}.0.op"
        yield f"output_blocks.{level * (layers + 1) - 1}.2.conv"


def list_vae_candidates(levels: int, layers: int) -> Iterator[str]:
    """Every layer that an SDXL VAE of this depth could have, by its sgm name."""
    yield from ("quant_conv", "post_quant_conv")
    for half, way, resize in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        yield from (f"{half}.{layer}" for layer in ("conv_in", "conv_out", "norm_out"))
        yield from (f"{half}.mid.block_{index}.{layer}" for index in (1, 2) for layer in VAE_RESNET_LAYERS)
        yield from (f"{half}.mid.attn_1.{layer}" for layer in VAE_ATTENTION_LAYERS)
        for level in range(levels):
            yield f"{half}.{way}.{level}.{resize}.conv"
            for block in range(layers + 1):
                yield from (f"{half}.{way}.{level}.block.{block}.{layer}" for layer in VAE_RESNET_LAYERS)


def match_names(model: torch.nn.Module, candidates: list[str], convert: Converter) -> Shapes:
    """The candidates that the converter turns into parameters of `model`, with their shapes in the file.

    Raises RuntimeError when a parameter is left without a name.
    """
    wanted = model.state_dict()
    names = [f"{layer}.{kind}" for layer in candidates for kind in ("weight", "bias")]
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
    levels, layers = len(config["unet"]["block_out_channels"]), config["unet"]["layers_per_block"]
    unet_names = [UNET_PREFIX + name for name in list_unet_candidates(unet, levels, layers)]
    vae_sizes = len(config["vae"]["block_out_channels"]), config["vae"]["layers_per_block"]
    vae_names = [VAE_PREFIX + name for name in list_vae_candidates(*vae_sizes)]
    clip_names = {TEXT_ENCODER_PREFIX + name.rsplit(".", 1)[0]: None for name in text_encoder.state_dict()}
    shapes = match_names(unet, unet_names, lambda marked: convert_ldm_unet_checkpoint(marked, dict(unet.config)))
    shapes |= match_names(vae, vae_names, lambda marked: convert_ldm_vae_checkpoint(marked, dict(vae.config)))
    shapes |= match_names(
        text_encoder, list(clip_names), lambda marked: convert_ldm_clip_checkpoint(marked, TEXT_ENCODER_PREFIX)
    )
    second = list_text_encoder_2_shapes(text_encoder_2, config["text_encoder_2"])
    shapes |= {TEXT_ENCODER_2_PREFIX + name: shape for name, shape in second.items()}
    # Present in Stability's file, int64, and a buffer that newer transformers do not save.
    positions = TEXT_ENCODER_PREFIX + "text_model.embeddings.position_ids"
    shapes[positions] = [1, config["text_encoder"]["max_position_embeddings"]]
    return dict(sorted(shapes.items()))


if __name__ == "__main__":
    json.dump(list_sgm_tensors(json.load(sys.stdin)), sys.stdout)
