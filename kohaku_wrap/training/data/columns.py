"""The dataset that both engines train from: columns of an Arrow file, no Python object an image.

A key names a batch, and everything random about it is a function of the seed, the epoch and the image, so the
number of loader workers, their prefetch and earlier attempts leave no trace. Items are those of sd-scripts'
own dataset: same sizes, crops, pixels and caption rules.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from kohaku_wrap.dataset.buckets import find_crop_corners
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.held_out import HeldOut
from kohaku_wrap.training.data.images import UnreadableImage
from kohaku_wrap.training.data.items import BatchKey, Item, ItemOptions, Items
from kohaku_wrap.training.data.latent_shards import Latents
from kohaku_wrap.training.data.latent_store import MOMENTS, LatentStore
from kohaku_wrap.training.data.text_store import TextStore

Tokenize = Callable[[str], Sequence[torch.Tensor]]
"""A caption's token ids, one tensor a text encoder."""


class ColumnsDataset(Items, Dataset[dict[str, Any]]):
    """Whole batches by key, in the form of sd-scripts' examples plus `kwrap`, what the ledger records."""

    def __init__(
        self,
        columns: Columns,
        options: ItemOptions,
        batch_size: int,
        seed: int,
        group: int,
        tokenize: Tokenize | None,
        substitute_bad_images: bool = False,
        start: tuple[int, int] = (0, 0),
        latents: LatentStore | None = None,
        held_out: HeldOut | None = None,
        texts: TextStore | None = None,
    ) -> None:
        """`group`: batches in one optimizer step. `start`: epoch and global position of this attempt's first batch,
        before which no image should be loaded. Without `tokenize` the examples carry no token ids. With `latents` no
        image is opened, with `texts` no caption is tokenised but of posts whose loss is measured."""
        super().__init__(columns, options, batch_size, seed, group, held_out)
        self.tokenize = tokenize
        self.substitute_bad_images = substitute_bad_images
        self.start = start
        self.latents, self.texts = latents, texts
        # Shared with the loader workers, which only add to it.
        self._images_loaded_too_early = multiprocessing.Value("q", 0)

    def __len__(self) -> int:
        return self.order.batches

    @property
    def images_loaded_too_early(self) -> int:
        """Images opened for positions before `start`; 0 proves that a resume skips without loading."""
        return int(self._images_loaded_too_early.value)

    def load_image(self, item: Item) -> torch.Tensor:
        """The item's pixels: (3, height, width) float32 in -1 … 1. Raises UnreadableImage."""
        tensor = torch.from_numpy(np.ascontiguousarray(self.make_pixels(item))).permute(2, 0, 1).contiguous()
        return tensor.to(torch.float32).div(255).sub_(0.5).div_(0.5)

    def load_item(self, item: Item, key: BatchKey, slot: int) -> tuple[Item, torch.Tensor]:
        """The item and its pixels, or, where that is allowed, a substitute of the same bucket."""
        try:
            return item, self.load_image(item)
        except UnreadableImage:
            if not self.substitute_bad_images:
                raise
        return self.find_substitute(item, key, slot, self.load_image)

    def load_batch(
        self, drawn: Sequence[Item], key: BatchKey
    ) -> tuple[list[Item], torch.Tensor | None, torch.Tensor | None]:
        """The items that are trained, their pixels or cached moments, and their cached samples."""
        if self.latents is None:
            loaded = [self.load_item(item, key, slot) for slot, item in enumerate(drawn)]
            return [item for item, _ in loaded], torch.stack([image for _, image in loaded]), None
        cached = torch.from_numpy(self.latents.read_batch([(item.image_id, item.flipped) for item in drawn]))
        return (list(drawn), cached, None) if self.latents.rule.keep == MOMENTS else (list(drawn), None, cached)

    def __getitem__(self, key: BatchKey) -> dict[str, Any]:
        """The batch of `key`, as sd-scripts' datasets give it.

        `images` (n, 3, height, width) float32, or cached mean and deviation of latents, (n, 8, height / 8, width / 8);
        `latents` (n, 4, height / 8, width / 8) where samples are cached, without images; `input_ids_list` one
        (n, chunks, 77) int64 a text encoder, or None beside `text_encoder_outputs_list`, what is cached of both: states
        (n, tokens, width) and pooled (n, width);
        `original_sizes_hw`, `crop_top_lefts`, `target_sizes_hw` (n, 2) int64; `kwrap` the ledger's facts.
        """
        key = BatchKey(*key)
        drawn = self.draw_batch(key)
        items, images, latents = self.load_batch(drawn, key)
        if (key.epoch, key.position) < self.start:
            with self._images_loaded_too_early.get_lock():
                self._images_loaded_too_early.value += len(items)
        return {
            **self.make_example(items, images, latents, self.texts),
            "kwrap": {
                "epoch": key.epoch,
                "position": key.position,
                "is_fill": key.is_fill,
                "image_ids": [item.image_id for item in drawn],
                "content": digest_content(items),
                "substituted": [old.image_id for old, new in zip(drawn, items, strict=True) if old.row != new.row],
            },
        }

    def make_example(
        self,
        items: Sequence[Item],
        images: torch.Tensor | None,
        latents: torch.Tensor | None,
        texts: TextStore | None = None,
    ) -> dict[str, Any]:
        """These items in the form of sd-scripts' examples, with their pixels or cached latents, and cached outputs."""
        ids = [self.tokenize(item.caption) for item in items] if self.tokenize and texts is None else []
        return {
            "custom_attributes": [{} for _ in items],
            "loss_weights": torch.ones(len(items)),
            "text_encoder_outputs_list": [as_tensor(each) for each in texts.read_captions(items)]
            if texts is not None
            else None,
            "input_ids_list": [torch.stack(list(each)) for each in zip(*ids, strict=True)] or None,
            "alpha_masks": None,
            "images": images,
            "latents": latents,
            "captions": [item.caption for item in items],
            **self.size_conditions(items),
            "flippeds": [item.flipped for item in items],
            "network_multipliers": torch.ones(len(items)),
        }

    def size_conditions(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """SDXL's three size conditions, each (n, 2) int64, heights first."""
        originals = np.array([self.columns.size_of(item.row) for item in items])
        targets = np.array([self.resolution_of(item.row) for item in items])
        corners = find_crop_corners(targets, originals)
        flipped = np.array([item.flipped for item in items])
        left = np.where(flipped, targets[:, 0] - corners[:, 2], corners[:, 0])
        crops = np.stack([corners[:, 1], left], axis=1).astype(np.int64)
        return {
            "original_sizes_hw": torch.from_numpy(originals[:, ::-1].astype(np.int64)),
            "crop_top_lefts": torch.from_numpy(crops),
            "target_sizes_hw": torch.from_numpy(targets[:, ::-1].astype(np.int64)),
        }


def as_tensor(stored: Latents) -> torch.Tensor:
    """A record as it was before it was stored; numpy has the bits of bf16 alone."""
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def digest_content(items: Sequence[Item]) -> str:
    """A hex digest of a batch's captions, crops and flips; what an example carries."""
    return hashlib.blake2b(b"".join(item.content() for item in items), digest_size=16).hexdigest()


def content_digest(content: str, timesteps: Sequence[int]) -> int:
    """The 64-bit digest that the ledger records: an example's `content` and the batch's time steps."""
    text = f"{content}:{','.join(str(int(step)) for step in timesteps)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
