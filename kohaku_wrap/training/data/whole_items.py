"""Posts as their loss is measured: the same each time, with whole captions, no flip and the middle of the picture."""

from __future__ import annotations

from typing import Any

import torch

from kohaku_wrap.dataset.captions.mixing import BOTH, put_text
from kohaku_wrap.streams import seed_of
from kohaku_wrap.training.data.captions import choose_sign, keep_whole
from kohaku_wrap.training.data.columns import ColumnsDataset
from kohaku_wrap.training.data.images import UnreadableImage
from kohaku_wrap.training.data.items import Item, Items

LATENT_STREAM, NOISE_STREAM = "held-out-latent", "held-out-noise"


def draw_whole(items: Items, row: int) -> Item:
    """A post with its whole caption, of its text too where it has one."""
    columns, options = items.columns, items.options_of(row).captions
    caption, text = columns.caption_of(row), columns.texts[row] if columns.texts else ""
    if text:
        sign = choose_sign(caption)
        with_sign = put_text(caption, sign, int(columns.text_places[row]), BOTH)
        caption = keep_whole(with_sign, options).replace(sign, text)
    else:
        caption = keep_whole(caption, options)
    left, top = (side // 2 for side in items.spare_of(row))
    return Item(row, int(columns.ids[row]), False, (left, top), caption)


def load_whole(dataset: ColumnsDataset, rows: list[int]) -> tuple[dict[str, Any], list[bool]]:
    """The example of some rows as `ColumnsDataset` gives it, and which pictures cannot be read; these are grey."""
    items, images, unreadable = [draw_whole(dataset, row) for row in rows], [], []
    for item in items:
        try:
            images.append(dataset.load_image(item))
            unreadable.append(False)
        except UnreadableImage:
            width, height = dataset.resolution_of(item.row)
            images.append(torch.zeros(3, height, width))
            unreadable.append(True)
    return dataset.make_example(items, torch.stack(images), None), unreadable


def draw_normals(stream: str, ids: list[int], place: int, like: torch.Tensor) -> torch.Tensor:
    """Normal numbers shaped as `like`, for each post from a stream of its own, drawn on the CPU."""
    rows = []
    for post in ids:
        generator = torch.Generator().manual_seed(seed_of(stream, post, place))
        rows.append(torch.randn(like.shape[1:], generator=generator))
    return torch.stack(rows).to(like.device, like.dtype)
