"""The single-file SDXL base model as diffusers' and transformers' modules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from kohaku_wrap.config.base_model import BadBaseModel, read_sizes
from kohaku_wrap.errors import reason_of
from kohaku_wrap.formats.sdxl import TEXT_ENCODER_2_PREFIX, TEXT_ENCODER_PREFIX, UNET_PREFIX
from kohaku_wrap.planning.workers.module_filling import Tensors, convert, fill_module, fill_vae
from kohaku_wrap.planning.workers.module_names import build_named_view, pair_names


@dataclass(frozen=True)
class BaseModel:
    """The four parts of SDXL, frozen, on the CPU, in the file's precision."""

    unet: UNet2DConditionModel
    """The noise predictor."""

    vae: AutoencoderKL
    """Images to latents."""

    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    """OpenAI's CLIP-L and OpenCLIP's bigG."""

    named_unet: nn.Module
    """The UNet's modules under the checkpoint's names, for creating the network."""


def load_base_model(path: Path, vae_path: Path | None, tensors: Tensors | None = None) -> BaseModel:
    """The model of a single file with sgm key names; sizes from `config.json` beside it, else those of SDXL.

    `vae_path` replaces the file's VAE, `tensors` what it holds. Raises BadBaseModel with the keys that are missing or
    too many.
    """
    tensors = read_tensors(path) if tensors is None else tensors
    sizes = read_sizes(path)
    unet_tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(UNET_PREFIX)}
    with init_empty_weights():
        unet = UNet2DConditionModel(**sizes["unet"])
    converted = convert(path, "the UNet", single_file_utils.convert_ldm_unet_checkpoint, unet_tensors, unet.config)
    fill_module(unet, converted, path, "the UNet")

    encoders = load_text_encoders(path, tensors)
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKL(**sizes["vae"])
    fill_vae(vae, read_tensors(vae_path) if vae_path else tensors, vae_path or path)

    for module in (unet, vae):
        module.requires_grad_(False)
        module.eval()
    view = build_named_view(unet, pair_names(unet_tensors, converted))
    return BaseModel(unet, vae, encoders, view)


def load_text_encoders(path: Path, tensors: Tensors) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both text encoders of a single file, frozen; `tensors`: theirs, or all of the file. Raises BadBaseModel."""
    sizes = read_sizes(path)
    with init_empty_weights(include_buffers=False):
        first = CLIPTextModel(CLIPTextConfig(**sizes["text_encoder"]))
        second = CLIPTextModelWithProjection(CLIPTextConfig(**sizes["text_encoder_2"]))
    first_tensors = {n: t for n, t in tensors.items() if n.startswith(TEXT_ENCODER_PREFIX)}
    fill_module(first, single_file_utils.convert_ldm_clip_checkpoint(first_tensors), path, "text encoder 1")
    fill_module(second, convert_second_encoder(second, tensors, path), path, "text encoder 2")
    for module in (first, second):
        module.requires_grad_(False)
        module.eval()
    return first, second


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file. Raises BadBaseModel."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadBaseModel(
            f"{path}: not a safetensors file that can be read ({reason_of(error)})", "Set `base_model` in site.toml."
        ) from error


def convert_second_encoder(encoder: CLIPTextModelWithProjection, tensors: Tensors, path: Path) -> Tensors:
    """OpenCLIP's tensors under transformers' names; queries, keys and values are cut apart.

    sd-scripts takes the projection as it stands in the file, where diffusers transposes it. Networks are trained here
    as sd-scripts trains them, so this does the same.
    """
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(TEXT_ENCODER_2_PREFIX)}
    converted: Tensors = convert(
        path,
        "text encoder 2",
        lambda part, _: single_file_utils.convert_open_clip_checkpoint(encoder, part, prefix=TEXT_ENCODER_2_PREFIX),
        own,
        {},
    )
    projection = own.get(f"{TEXT_ENCODER_2_PREFIX}text_projection")
    return converted if projection is None else converted | {"text_projection.weight": projection}
