"""The base model in diffusers' modules under sd-scripts' names, and the same loss from both."""

from __future__ import annotations

import json
import logging
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_world import DATASET_OPTIONS, World
from safetensors.torch import load_file, save_file

from kohaku_wrap.config.base_model import BadBaseModel
from kohaku_wrap.files import shipped_folder
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.sdxl import SDXL_SIZES
from kohaku_wrap.trainer.builtin_options import BuiltinOptions
from kohaku_wrap.training.data.columns import ColumnsDataset
from kohaku_wrap.training.data.items import ItemOptions
from kohaku_wrap.training.data.sampler import PositionSampler
from kohaku_wrap.training.data.tokens import CaptionTokenizer
from kohaku_wrap.training.data.torch_streams import seed_generators
from kohaku_wrap.training.engines.builtin.loss import LossOfBatch
from kohaku_wrap.training.engines.builtin.models import BaseModel, load_base_model
from kohaku_wrap.training.engines.builtin.network import create_network

PRESET = shipped_folder("templates") / "presets" / "kohaku-lokr.toml"
NETWORK_ARGS = ("algo=lokr", "factor=8", "train_norm=True", "conv_dim=10000", "conv_alpha=10000")


def make_options(world: World, **changes: Any) -> BuiltinOptions:
    values = {
        "pretrained_model_name_or_path": str(world.base_model),
        "output_dir": "out",
        "output_name": "name",
        "tokenizer_cache_dir": str(world.tokenizers),
        "seed": 1,
        "network_dim": 10000,
        "network_alpha": 10000,
        "network_args": (f"preset={PRESET}", *NETWORK_ARGS),
        "max_token_length": 225,
        "noise_offset": 0.0357,
        "min_snr_gamma": 5.0,
        **changes,
    }
    return BuiltinOptions(**values)


@pytest.fixture(scope="module")
def model(world: World) -> BaseModel:
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    return load_base_model(world.base_model, None)


def test_names_are_those_of_the_file(world: World, model: BaseModel) -> None:
    prefix = "model.diffusion_model."
    file = {name.removeprefix(prefix) for name in load_file(world.base_model) if name.startswith(prefix)}
    assert {name for name, _ in model.named_unet.named_parameters()} == file


def test_the_network_has_kohyas_key_names(world: World, model: BaseModel) -> None:
    fresh = load_base_model(world.base_model, None)
    network = create_network(fresh, make_options(world))
    names = {lora.lora_name for lora in network.loras}
    assert len(network.text_encoder_loras) == 84
    assert len(network.unet_loras) == 283
    assert {
        "lora_unet_input_blocks_0_0",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "lora_unet_time_embed_0",
        "lora_unet_label_emb_0_2",
        "lora_unet_out_2",
        "lora_te1_text_model_encoder_layers_11_mlp_fc2",
        "lora_te2_text_model_encoder_layers_1_self_attn_q_proj",
    } <= names


@pytest.mark.parametrize(
    ("lost", "part"),
    [
        ("model.diffusion_model.out.2.bias", "the UNet"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "text encoder 1"),
        ("conditioner.embedders.1.model.ln_final.weight", "text encoder 2"),
        ("first_stage_model.encoder.conv_in.weight", "the VAE"),
    ],
)
def test_a_missing_key_is_named_with_its_part(world: World, tmp_path: Path, lost: str, part: str) -> None:
    tensors = load_file(world.base_model)
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(world.base_model.with_name("config.json"), tmp_path)
    with pytest.raises(BadBaseModel, match=part):
        load_base_model(tmp_path / "model.safetensors", None)


def test_what_is_not_a_model_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadBaseModel, match="not a safetensors file"):
        load_base_model(tmp_path / "model.safetensors", None)
    shutil.copy(world.base_model, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"unet": {}}))
    with pytest.raises(BadBaseModel, match="not the sizes of an SDXL"):
        load_base_model(tmp_path / "model.safetensors", None)


def test_a_model_without_sizes_beside_it_is_taken_for_sdxl(world: World, tmp_path: Path) -> None:
    shutil.copy(world.base_model, tmp_path / "model.safetensors")
    with pytest.raises(BadBaseModel, match="the UNet does not fit"):
        load_base_model(tmp_path / "model.safetensors", None)


def test_sdxls_own_sizes_make_its_parameter_count() -> None:
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        unet = UNet2DConditionModel(**SDXL_SIZES["unet"])
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684


@pytest.mark.sd_scripts
@pytest.mark.parametrize("preset", [str(PRESET), "full", "attn-mlp", "unet-convblock-only"])
def test_lycoris_makes_the_same_modules_on_both_unets(
    world: World, model: BaseModel, tiny_trainer: Any, preset: str
) -> None:
    from lycoris import kohya

    arguments = {"preset": preset, "algo": "lokr", "factor": 8, "train_norm": True}
    shapes = []
    for unet, encoders in ((tiny_trainer.unet, tiny_trainer.encoders), (model.named_unet, list(model.text_encoders))):
        network = kohya.create_network(1.0, 10000, 10000, None, encoders, unet, **arguments)
        shapes.append(
            {
                lora.lora_name: {name: tuple(each.shape) for name, each in lora.state_dict().items()}
                for lora in network.loras
            }
        )
    assert shapes[0] == shapes[1]


@pytest.fixture(scope="session")
def tiny_trainer(world: World, sd_scripts: Any) -> Any:
    """sd-scripts' own models from the world's file."""
    from kohaku_wrap.training.engines.sd_scripts.tiny_sizes import change_sizes

    change_sizes(world.base_model)
    loaded = sd_scripts.models.load_models_from_sdxl_checkpoint("sdxl_base_v1-0", str(world.base_model), "cpu")
    first, second, vae, unet = loaded[:4]
    for module in (first, second, vae, unet):
        module.requires_grad_(False).eval().float()
    return SimpleNamespace(encoders=[first, second], vae=vae, unet=unet)


@pytest.mark.sd_scripts
@pytest.mark.parametrize("length", [225, 75])
def test_the_same_batch_has_the_same_loss_in_sd_scripts(
    world: World, sd_scripts: Any, tiny_trainer: Any, length: int
) -> None:
    """Their process_batch and ours, same weights, same generators: draws, conditions and weights agree."""
    from accelerate import Accelerator

    options = make_options(world, max_token_length=length)
    tokenizer = CaptionTokenizer.load(world.tokenizers, length)
    dataset = ColumnsDataset(
        Columns.open(world.images), ItemOptions.from_dataset_options(DATASET_OPTIONS), 2, 5, 1, tokenizer
    )
    accelerator = Accelerator(cpu=True)
    loss_of_batch = LossOfBatch(load_base_model(world.base_model, None), options, accelerator, tokenizer.end_token_id)
    loss_of_batch.place_model()
    theirs = sd_scripts.trainer.SdxlNetworkTrainer()
    args = trainer_arguments(sd_scripts, options)
    noise = theirs.get_noise_scheduler(args, accelerator.device)
    strategy = sd_scripts.strategy.SdxlTokenizeStrategy(length, str(world.tokenizers))
    for key in list(PositionSampler(dataset.order))[:4]:
        batch = dataset[key]
        seed_generators(11)
        own = loss_of_batch(batch).loss
        seed_generators(11)
        other = theirs.process_batch(
            batch, tiny_trainer.encoders, tiny_trainer.unet, None, tiny_trainer.vae, noise, torch.float32,
            torch.float32, accelerator, args, sd_scripts.strategy.SdxlTextEncodingStrategy(), strategy,
            train_text_encoder=True, train_unet=True,
        )  # fmt: skip
        assert own.item() == pytest.approx(other.item(), rel=2e-6)


def trainer_arguments(sd_scripts: Any, options: BuiltinOptions) -> Namespace:
    args: Namespace = sd_scripts.trainer.setup_parser().parse_args([])
    args.noise_offset, args.min_snr_gamma = options.noise_offset, options.min_snr_gamma
    args.max_token_length = options.max_token_length
    return args
