"""Network names and the checkpoint keys that they stand for, as a table built from the checkpoint's own keys."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kohaku_wrap.formats.sdxl import TEXT_ENCODER_2_PREFIX, TEXT_ENCODER_PREFIX, UNET_PREFIX

LYCORIS = "lycoris.kohya"
KOHYA_LORA = "networks.lora"
"""What the trainer's `network_module` names: who makes the network, as its metadata say too."""

NETWORK_PREFIXES = {
    UNET_PREFIX: "lora_unet_",
    TEXT_ENCODER_PREFIX: "lora_te1_",
    "cond_stage_model.transformer.": "lora_te_",
}
"""How the names of a network begin for the parts that it names as the checkpoint does; the last is SD 1's."""

FUSED_PARTS = ("q_proj", "k_proj", "v_proj")

RESBLOCK = re.compile(r"transformer\.resblocks\.([0-9]+)\.(.+)")
MODULES_OF_RESBLOCK = {
    "attn.out_proj": "self_attn_out_proj",
    "mlp.c_fc": "mlp_fc1",
    "mlp.c_proj": "mlp_fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
MODULES_OF_TEXT_ENCODER_2 = {
    "token_embedding": "text_model_embeddings_token_embedding",
    "positional_embedding": "text_model_embeddings_position_embedding",
    "ln_final": "text_model_final_layer_norm",
}

DIFFUSERS_NAME = re.compile(
    r"lora_unet_(down_blocks|up_blocks|mid_block|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding)_?"
)
ADD_EMBEDDING = re.compile(r"lora_unet_add_embedding_linear_([0-9]+)$")


@dataclass(frozen=True)
class Target:
    """The tensor, or the rows of one, that a module of a network changes."""

    key: str
    """The checkpoint's key."""

    part: int = 0
    """Which of `parts` equal shares of the rows, from 0."""

    parts: int = 1
    """3 for a query, key or value inside a fused tensor, else 1."""

    is_transposed: bool = False
    """Whether the module's weight has rows and columns exchanged."""


def split_kind(path: str) -> tuple[str, str]:
    """`a.b.weight` as `a.b` and `weight`; a path without either ending is a weight itself."""
    for kind in ("weight", "bias"):
        if path.endswith(f".{kind}"):
            return path.removesuffix(f".{kind}"), kind
    return path, "weight"


def table_of_targets(keys: Iterable[str]) -> dict[str, dict[str, Target]]:
    """For each network name, the targets of its weight and its bias.

    The names are those of kohya's networks on an SDXL (or SD 1) checkpoint in single-file form.
    """
    table: defaultdict[str, dict[str, Target]] = defaultdict(dict)
    for key in keys:
        if key.startswith(TEXT_ENCODER_2_PREFIX):
            add_text_encoder_2(table, key)
        for prefix, network_prefix in NETWORK_PREFIXES.items():
            if key.startswith(prefix):
                path, kind = split_kind(key.removeprefix(prefix))
                table[f"{network_prefix}{path.replace('.', '_')}"][kind] = Target(key)
    return table


def add_text_encoder_2(table: defaultdict[str, dict[str, Target]], key: str) -> None:
    """The names of one key of the second text encoder, whose checkpoint has OpenCLIP's form."""
    path = key.removeprefix(TEXT_ENCODER_2_PREFIX)
    found = RESBLOCK.fullmatch(path)
    if not found:
        if path == "text_projection":  # OpenCLIP multiplies from the right; transformers has a linear layer
            table["lora_te2_text_projection"]["weight"] = Target(key, is_transposed=True)
        module, kind = split_kind(path)
        if module in MODULES_OF_TEXT_ENCODER_2:
            table[f"lora_te2_{MODULES_OF_TEXT_ENCODER_2[module]}"][kind] = Target(key)
        return
    layer, rest = found.groups()
    prefix = f"lora_te2_text_model_encoder_layers_{layer}_"
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.removeprefix("attn.in_proj_")
        for part, name in enumerate(FUSED_PARTS):
            table[f"{prefix}self_attn_{name}"][kind] = Target(key, part, len(FUSED_PARTS))
        return
    module, kind = split_kind(rest)
    if module in MODULES_OF_RESBLOCK:
        table[f"{prefix}{MODULES_OF_RESBLOCK[module]}"][kind] = Target(key)


def is_diffusers_name(name: str) -> bool:
    """Whether a UNet module is named as diffusers names it."""
    return DIFFUSERS_NAME.match(name) is not None


def checkpoint_name(name: str) -> str:
    """A diffusers-named module's name in the checkpoint's terms.

    Source: `lycoris.utils.convert_diffusers_name_to_compvis`, which leaves out the two names that SDXL adds.
    """
    if name == "lora_unet_conv_norm_out":
        return "lora_unet_out_0"
    if found := ADD_EMBEDDING.match(name):
        return f"lora_unet_label_emb_0_{int(found.group(1)) * 2 - 2}"
    from lycoris.utils import convert_diffusers_name_to_compvis

    return str(convert_diffusers_name_to_compvis(name))


def find_targets(name: str, table: Mapping[str, dict[str, Target]]) -> dict[str, Target] | None:
    """The targets of a module by its name, in sgm's or diffusers' naming; None if there are none."""
    if name in table:
        return table[name]
    if is_diffusers_name(name):
        return table.get(checkpoint_name(name))
    if name.startswith("lora_te1_"):  # of SD 1's one text encoder, in forms that number it
        return table.get(name.replace("lora_te1_", "lora_te_", 1))
    return None
