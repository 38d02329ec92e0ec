"""The parts of a single-file SDXL given to diffusers' and transformers' modules by name, and every misfit told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from torch import nn

from kohaku_wrap.config.base_model import BadBaseModel, read_sizes
from kohaku_wrap.errors import refusing
from kohaku_wrap.formats.sdxl import VAE_PREFIX

Tensors = dict[str, torch.Tensor]

KEYS_SHOWN = 5


def convert(path: Path, part: str, conversion: Any, tensors: Tensors, config: Any) -> Tensors:
    """diffusers' conversion of one part; it fails on absent keys with their name alone, which is told in full here."""
    with refusing(
        BadBaseModel, f"{path}: {part} is not there or incomplete", "Set `base_model` in site.toml to a whole SDXL."
    ):
        converted: Tensors = conversion(dict(tensors), dict(config))
    return converted


def load_vae(base_model: Path, path: Path | None) -> AutoencoderKL:
    """The VAE alone, of a file of its own or of the base model, frozen, on the CPU, in the file's precision.

    Raises BadBaseModel.
    """
    with torch.device("meta"):
        vae = AutoencoderKL(**read_sizes(base_model)["vae"])
    file = path or base_model
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
        own = [name for name in names if name.startswith(VAE_PREFIX)] or names
        fill_vae(vae, {name: opened.get_tensor(name) for name in own}, file)
    vae.requires_grad_(False)
    vae.eval()
    return vae


def fill_vae(vae: nn.Module, tensors: Tensors, path: Path) -> None:
    """Give a VAE its tensors from a checkpoint, or a file of its own with sgm's or diffusers' names."""
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(VAE_PREFIX)} or tensors
    if not any(name.startswith("encoder.down_blocks.") for name in tensors):
        tensors = convert(path, "the VAE", single_file_utils.convert_ldm_vae_checkpoint, tensors, vae.config)
    fill_module(vae, tensors, path, "the VAE")


def fill_module(module: nn.Module, tensors: Tensors, path: Path, part: str) -> None:
    """Give `module` the tensors by name, without copying. Raises BadBaseModel unless all fit."""
    # Older files carry a buffer that is no longer a parameter.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    faults = [f"{len(names)} keys {what} ({', '.join(names[:KEYS_SHOWN])}{', …' if len(names) > KEYS_SHOWN else ''})"
              for what, names in (("missing", missing), ("unexpected", unexpected), ("of another size", sorted(wrong)))
              if names]  # fmt: skip
    if faults:
        raise BadBaseModel(
            f"{path}: {part} does not fit: {'; '.join(faults)}", "Set `base_model` in site.toml to a whole SDXL."
        )
    module.load_state_dict(tensors, assign=True)
