"""The tiny SDXL loads wherever the real one does, and its table is what diffusers' conversion says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from kohaku_wrap.demo.base_model import draw, load_description
from kohaku_wrap.formats.untrained import untrained_tensor

LOAD = """
import json, sys, torch
torch.set_num_threads(1)
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as single_file
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
folder = sys.argv[1]
config = json.load(open(folder + "/config.json"))
tensors = load_file(folder + "/model.safetensors")
tensors.pop("conditioner.embedders.0.transformer.text_model.embeddings.position_ids")
unet, vae = UNet2DConditionModel(**config["unet"]), AutoencoderKL(**config["vae"])
first = CLIPTextModel(CLIPTextConfig(**config["text_encoder"]))
second = CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"]))
unet.load_state_dict(single_file.convert_ldm_unet_checkpoint(tensors, dict(unet.config)))
vae.load_state_dict(single_file.convert_ldm_vae_checkpoint(tensors, dict(vae.config)))
first.load_state_dict(single_file.convert_ldm_clip_checkpoint(tensors, "conditioner.embedders.0.transformer."))
second.load_state_dict(single_file.convert_open_clip_checkpoint(second, tensors, "conditioner.embedders.1.model."))
with torch.no_grad():
    latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
    ids = torch.arange(77)[None]
    encoded = second(ids, output_hidden_states=True)
    context = torch.cat([first(ids, output_hidden_states=True).hidden_states[11], encoded.hidden_states[-2]], dim=-1)
    extra = {"text_embeds": encoded.text_embeds, "time_ids": torch.zeros(1, 6)}
    noise = unet(latents, torch.tensor([500]), context, added_cond_kwargs=extra).sample
print(json.dumps([list(noise.shape), bool(noise.isfinite().all())]))
"""


def run(*arguments: str, text: str = "") -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_recorded_table_is_what_diffusers_says():
    described = load_description()
    listed = json.loads(
        run("-m", "kohaku_wrap.planning.workers.list_sgm_tensors", text=json.dumps(described["config"]))
    )
    assert listed == described["tensors"]


@pytest.mark.slow
def test_file_loads_and_runs_in_diffusers(world):
    shape, finite = json.loads(run("-c", LOAD, str(world.folder / "base")).splitlines()[-1])
    assert shape == [1, 4, 8, 8]
    assert finite


def test_file_is_what_safetensors_reads(world):
    from safetensors.numpy import load_file

    tensors = load_file(world.folder / "base" / "model.safetensors")
    expected = load_description()["tensors"]
    assert {name: list(array.shape) for name, array in tensors.items()} == expected
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert np.array_equal(tensors[name], untrained_tensor(name, expected[name], partial(draw, 0)))
    assert all(np.isfinite(array).all() for array in tensors.values())


def test_first_weights_are_pinned():
    first = untrained_tensor("model.diffusion_model.input_blocks.0.0.weight", [32, 4, 3, 3], partial(draw, 0)).ravel()[
        :4
    ]
    assert first.tolist() == PINNED


def test_structure_is_sdxls():
    config = load_description()["config"]
    assert len(config["unet"]["block_out_channels"]) == 3
    assert config["text_encoder"]["num_hidden_layers"] == 12
    hidden = config["text_encoder"]["hidden_size"] + config["text_encoder_2"]["hidden_size"]
    sgm = config["sgm"]
    assert config["unet"]["cross_attention_dim"] == sgm["context_dim"] == hidden
    assert config["unet"]["projection_class_embeddings_input_dim"] == sgm["adm_in_channels"]
    assert config["unet"]["block_out_channels"] == [sgm["model_channels"] * factor for factor in (1, 2, 4)]


PINNED = [0.08087158203125, 0.06427001953125, 0.1658935546875, 0.0960693359375]
