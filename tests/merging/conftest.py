"""Small checkpoints with SDXL's key names, and random numbers for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

UNET = "model.diffusion_model."
TE1 = "conditioner.embedders.0.transformer.text_model."
TE2 = "conditioner.embedders.1.model.transformer.resblocks."

SHAPES: dict[str, tuple[int, ...]] = {
    f"{UNET}time_embed.0.weight": (64, 32),
    f"{UNET}input_blocks.0.0.weight": (32, 4, 3, 3),
    f"{UNET}input_blocks.0.0.bias": (32,),
    f"{UNET}input_blocks.4.1.proj_in.weight": (64, 32),
    f"{UNET}input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (64, 64),
    f"{UNET}input_blocks.4.0.in_layers.2.weight": (64, 32, 3, 3),
    f"{UNET}middle_block.0.in_layers.0.weight": (32,),
    f"{UNET}middle_block.0.in_layers.0.bias": (32,),
    f"{UNET}output_blocks.2.0.in_layers.2.weight": (32, 64, 3, 3),
    f"{UNET}out.2.weight": (4, 32, 3, 3),
    f"{TE1}encoder.layers.0.mlp.fc1.weight": (64, 32),
    f"{TE2}0.attn.in_proj_weight": (96, 32),
    f"{TE2}0.attn.in_proj_bias": (96,),
    f"{TE2}0.attn.out_proj.weight": (32, 32),
    f"{TE2}1.attn.in_proj_weight": (96, 32),
    f"{TE2}1.attn.in_proj_bias": (96,),
    f"{TE2}1.mlp.c_fc.weight": (64, 32),
    "first_stage_model.encoder.conv_in.weight": (16, 3, 3, 3),
}

Tensors = dict[str, torch.Tensor]
WriteModel = Callable[..., Path]


def make_tensors(seed: int, dtype: torch.dtype = torch.float16, scale: float = 0.05) -> Tensors:
    """Every tensor of SHAPES, with position ids and an empty marker as real checkpoints have them."""
    generator = np.random.default_rng(seed)
    tensors = {
        key: torch.from_numpy(generator.standard_normal(shape).astype(np.float32) * scale).to(dtype)
        for key, shape in SHAPES.items()
    }
    tensors[f"{TE1}embeddings.position_ids"] = torch.arange(77).reshape(1, 77)
    tensors["v_pred"] = torch.zeros(0)
    return tensors


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """A function that writes a small checkpoint: `write_model(name, seed, dtype=…, change=…)`."""

    def write(
        name: str,
        seed: int = 0,
        dtype: torch.dtype = torch.float16,
        change: Callable[[Tensors], None] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        tensors = make_tensors(seed, dtype)
        if change:
            change(tensors)
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path, metadata=dict(metadata or {}))
        return path

    return write


@pytest.fixture
def write_network(tmp_path: Path) -> Callable[[str, Tensors], Path]:
    """A function that writes tensors as a file."""

    def write(name: str, tensors: Tensors) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        return path

    return write


@pytest.fixture
def four_models(write_model: WriteModel) -> dict[str, Path]:
    """Checkpoints for the formula of gamma rev1."""
    return {name: write_model(name, seed) for seed, name in enumerate(("beta7", "anxl3", "anxl2", "base7"))}
