"""The network and its optimizer, made as sd-scripts makes them."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import atomic_write
from kohaku_wrap.formats.machine_paths import without_paths
from kohaku_wrap.trainer.builtin_options import BuiltinOptions
from kohaku_wrap.training.engines.builtin.models import BaseModel

SAVED_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

OPTIMIZER_CLASSES = {
    "adamw": ("torch.optim", "AdamW"),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "lion": ("lion_pytorch", "Lion"),
    "lion8bit": ("bitsandbytes.optim", "Lion8bit"),
}

MINIMUM_METADATA = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
"""What sd-scripts keeps under `no_metadata`."""


class NoNetwork(KwrapError):
    """LyCORIS cannot make a network of these options."""


def create_network(model: BaseModel, options: BuiltinOptions) -> Any:
    """The LyCORIS network on the model, applied, in fp32; its names are those of sd-scripts.

    Raises NoNetwork when the preset cannot be read or matches nothing.
    """
    from lycoris import kohya

    arguments: dict[str, Any] = dict(text.split("=", 1) for text in options.network_args)
    preset = arguments.get("preset")
    if preset and preset not in kohya.PRESET and not Path(preset).is_file():
        raise NoNetwork(f"network_args: no preset {preset}", "Give a preset of LyCORIS or the path of a TOML file.")
    arguments.setdefault("dropout", options.network_dropout)
    if options.dim_from_weights:
        network, _ = kohya.create_network_from_weights(
            1.0, options.network_weights, model.vae, list(model.text_encoders), model.named_unet, **arguments
        )
    else:
        network = kohya.create_network(
            1.0,
            options.network_dim,
            options.network_alpha,
            model.vae,
            list(model.text_encoders),
            model.named_unet,
            neuron_dropout=options.network_dropout,
            **arguments,
        )
    network.apply_to(
        list(model.text_encoders),
        model.named_unet,
        not options.network_train_unet_only,
        not options.network_train_text_encoder_only,
    )
    if not network.loras:
        raise NoNetwork("the network has no modules", "Check the preset's targets in network_args.")
    if options.network_weights and (left := network.load_weights(options.network_weights)):
        told = "; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in left.items())
        raise NoNetwork(
            f"{options.network_weights}: does not fit the network ({told})", "Name another one to begin with."
        )
    return network


def create_optimizer(network: Any, options: BuiltinOptions) -> torch.optim.Optimizer:
    """The optimizer over the text encoders' modules (where trained) and the UNet's, in this order of groups."""
    groups, _ = network.prepare_optimizer_params(options.rate_of_text_encoders, options.unet_lr, options.learning_rate)
    groups = [{**group, "params": list(group["params"])} for group in groups]
    if not groups:
        raise NoNetwork("every learning rate is 0 or unset", "Set unet_lr and text_encoder_lr, or learning_rate.")
    arguments = {name: ast.literal_eval(value) for name, _, value in (a.partition("=") for a in options.optimizer_args)}
    optimizer: torch.optim.Optimizer = optimizer_class(options.optimizer_type)(
        groups, lr=options.learning_rate, **arguments
    )
    return optimizer


def optimizer_class(name: str) -> Any:
    """The class behind sd-scripts' name of an optimizer."""
    module, class_name = OPTIMIZER_CLASSES[name.lower()]
    return getattr(importlib.import_module(module), class_name)


def describe_groups(network: Any, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The optimizer group behind `lr_unet` and `lr_text_encoder`, where there is one."""
    unet = {id(parameter) for lora in network.unet_loras for parameter in lora.parameters()}
    names: dict[str, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        of_unet = id(group["params"][0]) in unet
        names.setdefault("lr_unet" if of_unet else "lr_text_encoder", index)
    return names


def network_tensors(network: nn.Module, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The network's tensors by their names in files, on the CPU, in `dtype` or their own."""
    return {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in network.state_dict().items()
    }


def save_network(network: nn.Module, path: Path, options: BuiltinOptions, metadata: Mapping[str, str]) -> None:
    """Write a checkpoint as sd-scripts does, whole or not at all."""
    from lycoris.utils import precalculate_safetensors_hashes

    tensors = network_tensors(network, SAVED_DTYPES[options.save_precision] if options.save_precision else None)
    kept = {name: text for name, text in metadata.items() if not options.no_metadata or name in MINIMUM_METADATA}
    kept["sshs_model_hash"] = precalculate_safetensors_hashes(tensors)
    with atomic_write(path, "wb") as stream:
        stream.write(save(tensors, kept))


def describe_training(options: BuiltinOptions, facts: Mapping[str, Any]) -> dict[str, str]:
    """The metadata that goes with every checkpoint, under sd-scripts' names; `facts` are added as they are.

    There is no `ss_tag_frequency`: for millions of captions it would outweigh the network's header many times.
    """
    arguments = dict(text.split("=", 1) for text in options.network_args)
    described = {
        "ss_output_name": options.output_name,
        "ss_learning_rate": options.learning_rate,
        "ss_text_encoder_lr": options.rate_of_text_encoders,
        "ss_unet_lr": options.unet_lr,
        "ss_gradient_checkpointing": options.gradient_checkpointing,
        "ss_lr_warmup_steps": options.lr_warmup_steps,
        "ss_lr_scheduler": options.lr_scheduler,
        "ss_network_module": options.network_module,
        "ss_network_dim": options.network_dim,
        "ss_network_alpha": options.network_alpha,
        "ss_network_dropout": options.network_dropout,
        "ss_network_args": json.dumps(arguments),
        "ss_mixed_precision": options.mixed_precision,
        "ss_v2": False,
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_max_token_length": options.max_token_length,
        "ss_seed": options.seed,
        "ss_noise_offset": options.noise_offset,
        "ss_min_snr_gamma": options.min_snr_gamma,
        "ss_max_grad_norm": options.max_grad_norm,
        "ss_optimizer": f"{options.optimizer_type}({','.join(options.optimizer_args)})",
        "ss_sd_model_name": Path(options.pretrained_model_name_or_path).name,
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": options.output_name,
        **facts,
    }
    return without_paths({name: str(value) for name, value in described.items()})
