"""The block that a tensor of an SDXL or SD checkpoint belongs to.

The names are those of block-weighted merges in the webui world: IN00 to IN11, MID, OUT00 to OUT11
for the UNet, BASE for all that is in no other named block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from kohaku_wrap.files import shipped_folder
from kohaku_wrap.formats.layouts import part_of_key
from kohaku_wrap.formats.sdxl import UNET_PREFIX
from kohaku_wrap.toml_files import load_toml

PRESETS_FILE = "blocks.toml"

UNET_BLOCK = re.compile(r"model\.diffusion_model\.(input_blocks|middle_block|output_blocks)\.(?:([0-9]+)\.)?")
OUTPUT_BLOCK_BEFORE_OUT = 8

NAMED_BLOCKS = ("MID", "BASE", "TE", "TE1", "TE2", "VAE")
BLOCK_NAME = re.compile(r"(?:IN|OUT)(?:0[0-9]|1[01])")


def number_blocks(way: str, numbers: range) -> tuple[str, ...]:
    return tuple(f"{way}{number:02d}" for number in numbers)


EVERY_BLOCK = (*number_blocks("IN", range(12)), "MID", *number_blocks("OUT", range(12)))
BLOCKS_OF_SDXL = (*number_blocks("IN", range(9)), "MID", *number_blocks("OUT", range(9)))
BLOCKS_OF_NUMBERS = {
    "sdxl": (
        ("BASE", "IN04", "IN05", "IN07", "IN08", "MID", *number_blocks("OUT", range(6))),
        BLOCKS_OF_SDXL,
        ("BASE", *BLOCKS_OF_SDXL),
    ),
    "sd15": (
        ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *number_blocks("OUT", range(3, 12))),
        EVERY_BLOCK,
        ("BASE", *EVERY_BLOCK),
    ),
}
"""What a list of so many numbers is for, by --layout: 12, 19 or 20 numbers of SDXL, 17, 25 or 26 of SD 1.5.

Source: sd-webui-lora-block-weight and sd-webui-supermerger.
"""


def name_numbers(values: Sequence[Fraction], layout: str) -> list[tuple[str, Fraction]]:
    """The block of each number of a list, and 0 for the other blocks of the UNet, as in the webui's extension.

    Raises ValueError, with what to type, for a list of another length.
    """
    for kind, lists in BLOCKS_OF_NUMBERS.items():
        for names in lists:
            if len(names) != len(values):
                continue
            if kind != layout:
                raise ValueError(f"{len(values)} numbers are those of {kind}; add --layout {kind} if they are meant")
            others = [name for name in EVERY_BLOCK if name not in names and (kind == "sd15" or name in BLOCKS_OF_SDXL)]
            return [*zip(names, values, strict=True), *((name, Fraction(0)) for name in others)]
    known = ", ".join(str(len(names)) for lists in BLOCKS_OF_NUMBERS.values() for names in lists)
    raise ValueError(f"{len(values)} numbers are of no known list; there are lists of {known}")


def load_presets() -> dict[str, list[Fraction]]:
    """The numbers of the shipped presets by name."""
    path = shipped_folder("templates") / "merges" / PRESETS_FILE
    return {name: [Fraction(part) for part in text.split(",")] for name, text in load_toml(path)["sdxl"].items()}


PARTS = {"unet": ("unet",), "te": ("te1", "te2"), "te1": ("te1",), "te2": ("te2",), "vae": ("vae",)}
"""What unet(…), te(…) and the like, and --parts, take, by the names of formats."""


def is_in_part(key: str, part: str) -> bool:
    """Whether a checkpoint's key belongs to a part of PARTS."""
    return part_of_key(key) in PARTS[part]


def is_block(name: str) -> bool:
    """Whether blocks(…) takes this name."""
    return name in NAMED_BLOCKS or BLOCK_NAME.fullmatch(name) is not None


def blocks_of_key(key: str) -> tuple[str, ...]:
    """The blocks that cover a checkpoint's key, the nearest first; the last is always BASE.

    As in sd-webui-supermerger, `out.` goes with the last output block of SDXL, and the embeddings of time
    and label with BASE. The text encoders are TE1 and TE2, both TE; the VAE is VAE.
    """
    part = part_of_key(key)
    if part == "unet":
        found = UNET_BLOCK.match(key)
        if found and found.group(1) == "middle_block":
            return "MID", "BASE"
        if found and found.group(2):
            kind = "IN" if found.group(1) == "input_blocks" else "OUT"
            return f"{kind}{int(found.group(2)):02d}", "BASE"
        if key.startswith(f"{UNET_PREFIX}out."):
            return f"OUT{OUTPUT_BLOCK_BEFORE_OUT:02d}", "BASE"
        return ("BASE",)
    return {"vae": ("VAE", "BASE"), "te1": ("TE1", "TE", "BASE"), "te2": ("TE2", "TE", "BASE")}.get(part, ("BASE",))
