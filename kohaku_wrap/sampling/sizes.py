"""The sizes of a checkpoint's parts: SDXL's, or those of the `config.json` that fits, where a file is of other sizes.

Only shrunken models for trials are of other sizes. A merge of them lies where it was written, without a `config.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.config.base_model import BadBaseModel, read_sizes
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.file_hashes import find_by_hash
from kohaku_wrap.files import parse_json
from kohaku_wrap.formats.safetensors import Header
from kohaku_wrap.formats.sdxl import TEXT_ENCODER_2_PREFIX, TEXT_ENCODER_PREFIX, UNET_PREFIX

MERGE_PARENTS = "sd_merge_models"


def find_sizes(header: Header) -> Path:
    """A path beside whose `config.json`, or without one, the sizes stand that the checkpoint's tensors have.

    Looked for beside the file, beside those that it was merged from, and in the folders beside it. Raises KwrapError.
    """
    for place in list_places(header):
        try:
            if fits(header, read_sizes(place)):
                return place
        except BadBaseModel:
            continue
    raise KwrapError(
        f"{header.path}: its tensors have not the sizes of SDXL, and no config.json near it says which",
        "Put the config.json of the model that it was made from beside it.",
    )


def list_places(header: Header) -> Iterator[Path]:
    """Where to look, the nearest first."""
    yield header.path
    yield from find_parents(header)
    yield from (path.with_name("model.safetensors") for path in sorted(header.path.parent.glob("*/config.json")))


def find_parents(header: Header) -> list[Path]:
    """The checkpoints that a merge was made from, as far as their hashes are kept."""
    try:
        parents = parse_json(header.metadata.get(MERGE_PARENTS, "{}"))
    except ValueError:
        return []
    return [path for sha256 in parents if (path := find_by_hash(sha256))] if isinstance(parents, dict) else []


def fits(header: Header, sizes: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether some tensors of every part have these sizes; one that is not there is another check's finding."""
    wanted = {
        f"{UNET_PREFIX}input_blocks.0.0.weight": (0, sizes["unet"]["block_out_channels"][0]),
        f"{UNET_PREFIX}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (
            1,
            sizes["unet"]["cross_attention_dim"],
        ),
        f"{TEXT_ENCODER_PREFIX}text_model.embeddings.token_embedding.weight": (1, sizes["text_encoder"]["hidden_size"]),
        f"{TEXT_ENCODER_2_PREFIX}token_embedding.weight": (1, sizes["text_encoder_2"]["hidden_size"]),
    }
    for name, (axis, size) in wanted.items():
        spot = header.tensors.get(name)
        if spot is not None and (len(spot.shape) <= axis or spot.shape[axis] != size):
            return False
    return True
