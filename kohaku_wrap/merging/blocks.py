"""The block that a tensor of an SDXL or SD checkpoint belongs to.

The names are those of block-weighted merges in the webui world: IN00 to IN11, MID, OUT00 to OUT11
for the UNet, BASE for all that is in no other named block.
"""

from __future__ import annotations

import re

from kohaku_wrap.formats.layouts import part_of_key
from kohaku_wrap.formats.sdxl import UNET_PREFIX, VAE_PREFIX

UNET_BLOCK = re.compile(r"model\.diffusion_model\.(input_blocks|middle_block|output_blocks)\.(?:([0-9]+)\.)?")
OUTPUT_BLOCK_BEFORE_OUT = 8

NAMED_BLOCKS = ("MID", "BASE", "TE", "TE1", "TE2", "VAE")
BLOCK_NAME = re.compile(r"(?:IN|OUT)(?:0[0-9]|1[01])")


PARTS = {"unet": ("unet",), "te": ("te1", "te2"), "te1": ("te1",), "te2": ("te2",), "vae": ("vae",)}
"""What unet(…), te(…) and the like, and --parts, take, by the names of formats."""


def is_in_part(key: str, part: str) -> bool:
    """Whether a checkpoint's key belongs to a part of PARTS."""
    return part_of_key(key) in PARTS[part]


def is_block(name: str) -> bool:
    """Whether blocks(…) takes this name."""
    return name in NAMED_BLOCKS or BLOCK_NAME.fullmatch(name) is not None


def is_vae(key: str) -> bool:
    """Whether a tensor belongs to the image encoder or decoder."""
    return key.startswith(VAE_PREFIX)


def blocks_of_key(key: str) -> tuple[str, ...]:
    """The blocks that cover a checkpoint's key, the nearest first; the last is always BASE.

    As in sd-webui-supermerger, `out.` goes with the last output block of SDXL, and the embeddings of time
    and label with BASE. The text encoders are TE1 and TE2, both TE; the VAE is VAE.
    """
    if key.startswith(UNET_PREFIX):
        found = UNET_BLOCK.match(key)
        if found and found.group(1) == "middle_block":
            return "MID", "BASE"
        if found and found.group(2):
            kind = "IN" if found.group(1) == "input_blocks" else "OUT"
            return f"{kind}{int(found.group(2)):02d}", "BASE"
        if key.startswith(f"{UNET_PREFIX}out."):
            return f"OUT{OUTPUT_BLOCK_BEFORE_OUT:02d}", "BASE"
        return ("BASE",)
    if is_vae(key):
        return "VAE", "BASE"
    if key.startswith(("conditioner.embedders.0.", "cond_stage_model.")):
        return "TE1", "TE", "BASE"
    if key.startswith("conditioner.embedders.1."):
        return "TE2", "TE", "BASE"
    return ("BASE",)
