"""SDXL as a single file: the sizes of its parts, and the names of all tensors of one of any sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

UNET_PREFIX = "model.diffusion_model."
TEXT_ENCODER_PREFIX = "conditioner.embedders.0.transformer."
TEXT_ENCODER_2_PREFIX = "conditioner.embedders.1.model."
VAE_PREFIX = "first_stage_model."

TOKENIZERS = ("openai/clip-vit-large-patch14", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k")
"""Of the two text encoders, by their names on the hub."""

TOKENIZER_FOLDERS = tuple(name.replace("/", "_") for name in TOKENIZERS)
"""What sd-scripts calls them on the disk."""

CHUNK_TOKENS = 77
"""What both text encoders read at once: a start, 75 tokens of text, and an end."""

LATENT_CHANNELS = 4
LATENT_PIXELS = 8
"""Pixels of a picture along one side of a cell of its latents."""

VAE_SCALING = 0.13025
"""Latents are trained and drawn in this many of the VAE's own units."""

RESNET = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
TRANSFORMER_ENDS = ("norm", "proj_in", "proj_out")
TRANSFORMER_BLOCK = ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3", "attn1.to_out.0", "attn2.to_out.0")
WITHOUT_BIAS = tuple(f"{attention}.to_{part}.weight" for attention in ("attn1", "attn2") for part in "qkv")
CLIP_LAYER = (
    "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2",
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
)  # fmt: skip
OPEN_CLIP_LAYER = ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
VAE_RESNET = ("norm1", "conv1", "norm2", "conv2")
VAE_ATTENTION = ("norm", "q", "k", "v", "proj_out")

CLIP_SIZES = {
    "vocab_size": 49408,
    "max_position_embeddings": CHUNK_TOKENS,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

SDXL_SIZES: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 128,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "text_encoder": {
        **CLIP_SIZES,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    "text_encoder_2": {
        **CLIP_SIZES,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    "vae": {
        "sample_size": 256,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": LATENT_CHANNELS,
        "layers_per_block": 2,
    },
}
"""The sizes of SDXL 1.0, as diffusers' and transformers' configs name them."""


def list_tensor_names(sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The tensors of a single-file SDXL of these sizes, by part."""
    return {
        "the UNet": list(name_unet(sizes["unet"])),
        "text encoder 1": list(name_text_encoder(sizes["text_encoder"])),
        "text encoder 2": list(name_text_encoder_2(sizes["text_encoder_2"])),
        "the VAE": list(name_vae(sizes["vae"])),
    }


def name_unet(sizes: Mapping[str, Any]) -> Iterator[str]:
    """The UNet's tensors by their sgm names."""
    channels, layers = sizes["block_out_channels"], sizes["layers_per_block"]
    depths = sizes["transformer_layers_per_block"]
    depths = [depths] * len(channels) if isinstance(depths, int) else depths
    attends_down = ["CrossAttn" in kind for kind in sizes["down_block_types"]]
    attends_up = ["CrossAttn" in kind for kind in sizes["up_block_types"]]
    names = ["time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0", "out.0", "out.2"]
    transformers: list[tuple[str, int]] = [("middle_block.1", depths[-1])]
    names += [f"middle_block.{block}.{layer}" for block in (0, 2) for layer in RESNET]
    index, before = 1, channels[0]
    for level, width in enumerate(channels):
        for _ in range(layers):
            names += [f"input_blocks.{index}.0.{layer}" for layer in RESNET]
            names += [f"input_blocks.{index}.0.skip_connection"] if before != width else []
            transformers += [(f"input_blocks.{index}.1", depths[level])] if attends_down[level] else []
            index, before = index + 1, width
        if level < len(channels) - 1:
            names.append(f"input_blocks.{index}.0.op")
            index += 1
    index = 0
    for number, level in enumerate(reversed(range(len(channels)))):
        for layer_number in range(layers + 1):
            names += [f"output_blocks.{index}.0.{layer}" for layer in (*RESNET, "skip_connection")]
            transformers += [(f"output_blocks.{index}.1", depths[level])] if attends_up[number] else []
            if level and layer_number == layers:
                names.append(f"output_blocks.{index}.{2 if attends_up[number] else 1}.conv")
            index += 1
    for block, depth in transformers:
        names += [f"{block}.{end}" for end in TRANSFORMER_ENDS]
        for at in range(depth):
            names += [f"{block}.transformer_blocks.{at}.{layer}" for layer in TRANSFORMER_BLOCK]
            yield from (f"{UNET_PREFIX}{block}.transformer_blocks.{at}.{name}" for name in WITHOUT_BIAS)
    yield from with_bias(UNET_PREFIX, names)


def name_text_encoder(sizes: Mapping[str, Any]) -> Iterator[str]:
    """CLIP-L's tensors."""
    prefix = f"{TEXT_ENCODER_PREFIX}text_model."
    yield from (f"{prefix}embeddings.{kind}_embedding.weight" for kind in ("token", "position"))
    names = [f"encoder.layers.{at}.{layer}" for at in range(sizes["num_hidden_layers"]) for layer in CLIP_LAYER]
    yield from with_bias(prefix, [*names, "final_layer_norm"])


def name_text_encoder_2(sizes: Mapping[str, Any]) -> Iterator[str]:
    """OpenCLIP bigG's tensors; its temperature is not needed."""
    prefix = TEXT_ENCODER_2_PREFIX
    yield from (f"{prefix}{name}" for name in ("positional_embedding", "token_embedding.weight", "text_projection"))
    names = ["ln_final"]
    for at in range(sizes["num_hidden_layers"]):
        block = f"transformer.resblocks.{at}"
        yield from (f"{prefix}{block}.attn.in_proj_{kind}" for kind in ("weight", "bias"))
        names += [f"{block}.{layer}" for layer in OPEN_CLIP_LAYER]
    yield from with_bias(prefix, names)


def name_vae(sizes: Mapping[str, Any]) -> Iterator[str]:
    """The VAE's tensors by their sgm names."""
    channels, layers = sizes["block_out_channels"], sizes["layers_per_block"]
    names = ["quant_conv", "post_quant_conv"]
    for half in ("encoder", "decoder"):
        names += [f"{half}.{layer}" for layer in ("conv_in", "conv_out", "norm_out")]
        names += [f"{half}.mid.block_{block}.{layer}" for block in (1, 2) for layer in VAE_RESNET]
        names += [f"{half}.mid.attn_1.{layer}" for layer in VAE_ATTENTION]
        is_encoder = half == "encoder"
        way, resize = ("down", "downsample") if is_encoder else ("up", "upsample")
        levels = range(len(channels)) if is_encoder else reversed(range(len(channels)))
        before = channels[0] if is_encoder else channels[-1]
        for level in levels:
            for block in range(layers if is_encoder else layers + 1):
                names += [f"{half}.{way}.{level}.block.{block}.{layer}" for layer in VAE_RESNET]
                names += [f"{half}.{way}.{level}.block.{block}.nin_shortcut"] if before != channels[level] else []
                before = channels[level]
            if level != (len(channels) - 1 if is_encoder else 0):
                names.append(f"{half}.{way}.{level}.{resize}.conv")
    yield from with_bias(VAE_PREFIX, names)


def with_bias(prefix: str, layers: list[str]) -> Iterator[str]:
    """The weight and the bias of each layer."""
    return (f"{prefix}{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))
