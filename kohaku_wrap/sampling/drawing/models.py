"""A checkpoint, with networks added where some are named, as the modules that draw.

The second encoder's text projection is transposed from the file, as diffusers, the webui and ComfyUI do. The trainers'
loaders take it as it stands, which is right for training as sd-scripts trains, and wrong for pictures.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from kohaku_wrap.config.base_model import read_sizes
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.safetensors import read_header
from kohaku_wrap.formats.sdxl import TEXT_ENCODER_2_PREFIX, TEXT_ENCODER_PREFIX, UNET_PREFIX, VAE_SCALING
from kohaku_wrap.merging.plan import MergePlan
from kohaku_wrap.merging.running import merge_in_memory
from kohaku_wrap.planning.workers.module_filling import Tensors, convert, fill_module, fill_vae
from kohaku_wrap.sampling.cells import Compute
from kohaku_wrap.sampling.checkpoints import Model
from kohaku_wrap.sampling.sizes import find_sizes

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TORCH_OF_FILE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Drawer:
    """The four parts of SDXL, ready to draw."""

    unet: UNet2DConditionModel
    """Predicts."""

    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    """OpenAI's CLIP-L and OpenCLIP's bigG."""

    vae: AutoencoderKL
    """Latents to pictures."""

    scaling: float
    """Of the latents."""


def choose_device(kind: str, index: int) -> torch.device:
    """The CPU, or a GPU for the process with this index: each the next of those that it may use. Raises KwrapError."""
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise KwrapError("torch finds no GPU here", "Install torch for your GPU, or choose --device cpu.")
    return torch.device("cuda", index % torch.cuda.device_count())


def read_model(model: Model, threads: int) -> Tensors:
    """The checkpoint's tensors in the types of its file; the networks added as `kwrap merge` bakes them."""
    if not model.networks:
        return dict(load_file(model.path))
    plan = model.plan()
    return view_tensors(plan, torch.from_numpy(merge_in_memory(plan, threads)))


def view_tensors(plan: MergePlan, data: torch.Tensor) -> Tensors:
    """The tensors of a merge by name, as views of its bytes."""
    return {
        tensor.key: data[tensor.spot.begin : tensor.spot.end].view(TORCH_OF_FILE[tensor.spot.dtype])
        .reshape(tensor.spot.shape)
        for tensor in plan.tensors
        if tensor.spot.dtype in TORCH_OF_FILE
    }  # fmt: skip


def load_drawer(model: Model, compute: Compute) -> Drawer:
    """The model's parts in their types, on the CPU. Raises BadBaseModel, or what a merge raises."""
    with warnings.catch_warnings():
        # Bytes of a merge and of a mapped file are read only.
        warnings.simplefilter("ignore", UserWarning)
        tensors = read_model(model, compute.threads)
    sizes = read_sizes(find_sizes(read_header(model.path)))
    parts = make_parts(sizes)
    fill_parts(parts, tensors, model.path)
    fill_vae(parts["vae"], dict(load_file(model.vae)) if model.vae else tensors, model.vae or model.path)
    wanted = TORCH_DTYPES[compute.dtype]
    for name, module in parts.items():
        module.requires_grad_(False)
        module.eval()
        module.to(dtype=TORCH_DTYPES[compute.vae_dtype] if name == "vae" else wanted)
    scaling = float(sizes["vae"].get("scaling_factor", VAE_SCALING))
    return Drawer(parts["unet"], (parts["text_encoder"], parts["text_encoder_2"]), parts["vae"], scaling)


def make_parts(sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Empty modules of these sizes."""
    with init_empty_weights():
        unet = UNet2DConditionModel(**sizes["unet"])
    with init_empty_weights(include_buffers=False):
        return {
            "unet": unet,
            "text_encoder": CLIPTextModel(CLIPTextConfig(**sizes["text_encoder"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**sizes["text_encoder_2"])),
            "vae": AutoencoderKL(**sizes["vae"]),
        }


def fill_parts(parts: Mapping[str, Any], tensors: Tensors, path: Path) -> None:
    """Give the UNet and the encoders the tensors under diffusers' names."""

    def own(prefix: str) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    unet, second = parts["unet"], parts["text_encoder_2"]
    converted = convert(path, "the UNet", single_file_utils.convert_ldm_unet_checkpoint, own(UNET_PREFIX), unet.config)
    fill_module(unet, converted, path, "the UNet")
    first = single_file_utils.convert_ldm_clip_checkpoint(own(TEXT_ENCODER_PREFIX))
    fill_module(parts["text_encoder"], first, path, "text encoder 1")

    def convert_second(part: Tensors, _: Any) -> Tensors:
        renamed: Tensors = single_file_utils.convert_open_clip_checkpoint(second, part, prefix=TEXT_ENCODER_2_PREFIX)
        return renamed

    encoder = convert(path, "text encoder 2", convert_second, own(TEXT_ENCODER_2_PREFIX), {})
    fill_module(second, encoder, path, "text encoder 2")
