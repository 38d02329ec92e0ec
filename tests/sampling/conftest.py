"""The embedded world's tiny SDXL, another one, a network, and how a cell is drawn in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kohaku_wrap.demo.base_model import write_base_model
from kohaku_wrap.demo.world import make_world
from kohaku_wrap.sampling.cells import Cell, Compute


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose `other/model.safetensors` is a second checkpoint."""
    folder = tmp_path_factory.mktemp("sampling") / "world"
    make_world(folder, posts=60)
    (folder / "other").mkdir()
    write_base_model(folder / "other", seed=7)
    return folder


@pytest.fixture(scope="session")
def network(world: Path) -> Path:
    """A LoKr and a LoRA module, a full difference, and one of each text encoder, all of visible size."""
    import torch
    from safetensors.torch import load_file, save_file

    shapes = {name: tensor.shape for name, tensor in load_file(world / "base" / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).mul(0.2).half()

    attention = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_v.weight"
    rows, columns = shapes[attention]
    convolution = shapes["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"]
    clip = "conditioner.embedders.0.transformer.text_model.encoder.layers.10.mlp.fc1.weight"
    tensors = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v.lokr_w1": draw(2, 2),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v.lokr_w2": draw(rows // 2, columns // 2),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v.alpha": torch.tensor(4.0),
        "lora_unet_input_blocks_1_0_in_layers_2.diff": draw(*convolution),
        "lora_te1_text_model_encoder_layers_10_mlp_fc1.lora_down.weight": draw(4, shapes[clip][1]),
        "lora_te1_text_model_encoder_layers_10_mlp_fc1.lora_up.weight": draw(shapes[clip][0], 4),
        "lora_te1_text_model_encoder_layers_10_mlp_fc1.alpha": torch.tensor(4.0),
    }
    path = world / "network.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def cell() -> Cell:
    """A small picture of the tiny model."""
    return Cell(
        "model", "1girl, (smile:1.3), solo", "lowres", 3, 64, 64, "tokenizers", steps=3, compute=Compute(batch=2)
    )
