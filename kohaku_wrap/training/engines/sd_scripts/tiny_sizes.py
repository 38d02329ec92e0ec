"""Train a base model of other sizes than SDXL's with sd-scripts, whose sizes are constants in its modules.

A base model with a `config.json` beside it (as `kwrap demo` writes it) says its sizes there; a model without one
is SDXL and nothing changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import KwrapError, refusing

CONFIG_FILE = "config.json"
SDXL_TEXT_WIDTHS = {768: "text_encoder", 1280: "text_encoder_2"}
"""How sd-scripts' own two text encoders are told apart: by their width."""

VAE_KEYS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "latent_channels",
    "layers_per_block",
)


class BadModelConfig(KwrapError):
    """The file beside the base model does not say its sizes."""


def read_sizes(base_model: Path) -> Mapping[str, Any] | None:
    """The sizes beside the base model; None for SDXL itself. Raises BadModelConfig."""
    path = base_model.with_name(CONFIG_FILE)
    if not path.is_file():
        return None
    with refusing(BadModelConfig, f"{path}:", "Make the demo again, or remove the file if the model is SDXL."):
        sizes = json.loads(path.read_text(encoding="utf-8"))
        if all(name in sizes for name in ("sgm", "text_encoder", "text_encoder_2", "vae")):
            return dict(sizes)
    # A diffusers folder has a config.json of its own.
    return None


def change_sizes(base_model: Path) -> None:
    """Put the sizes beside a model in place of SDXL's in the modules of sd-scripts, before any model is built."""
    sizes = read_sizes(base_model)
    if sizes is None:
        return
    from library import model_util, sdxl_model_util, sdxl_original_unet

    sgm = sizes["sgm"]
    sdxl_original_unet.MODEL_CHANNELS = sgm["model_channels"]
    sdxl_original_unet.TIME_EMBED_DIM = sgm["model_channels"] * 4
    sdxl_original_unet.ADM_IN_CHANNELS = sgm["adm_in_channels"]
    sdxl_original_unet.CONTEXT_DIM = sgm["context_dim"]
    # Changed in place: LyCORIS finds modules by the name of their class.
    transformer = sdxl_original_unet.Transformer2DModel
    transformer.__init__ = with_sizes(
        transformer.__init__,
        {"cross_attention_dim": sgm["context_dim"], "num_transformer_layers": sgm["transformer_depth"]},
    )
    make_config = sdxl_model_util.CLIPTextConfig

    def make_text_config(**keywords: Any) -> Any:
        name = SDXL_TEXT_WIDTHS[keywords["hidden_size"]]
        return make_config(**{**keywords, **sizes[name]})

    sdxl_model_util.CLIPTextConfig = make_text_config
    vae = {key: sizes["vae"][key] for key in VAE_KEYS}
    model_util.create_vae_diffusers_config = lambda: dict(vae)


def with_sizes(function: Callable[..., None], sizes: Mapping[str, Any]) -> Callable[..., None]:
    """The function with some keywords always at these values."""

    def sized(self: Any, *arguments: Any, **keywords: Any) -> None:
        function(self, *arguments, **{**keywords, **sizes})

    return sized
