"""The dataset that both engines train from: columns of an Arrow file, no Python object an image.

A key names a batch, and everything random about it is a function of the seed, the epoch and the image, so the
number of loader workers, their prefetch and earlier attempts leave no trace. Items are those of sd-scripts'
own dataset: same sizes, crops, pixels and caption rules.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from kohaku_wrap.config.run_files import find_image_folder, flatten_dataset, merge_subsets
from kohaku_wrap.dataset.buckets import BucketAssignment, BucketOptions, assign_buckets, find_crop_corners
from kohaku_wrap.dataset.captions.mixing import TAGS, TextMix, put_text
from kohaku_wrap.errors import Problem, ProblemsFound
from kohaku_wrap.formats.caption_rows import Columns
from kohaku_wrap.streams import draws, stream_key
from kohaku_wrap.training.data.captions import CaptionOptions, choose_sign, process_caption
from kohaku_wrap.training.data.images import (
    INTERPOLATIONS,
    UnreadableImage,
    crop_pixels,
    load_pixels,
    resize_pixels,
)
from kohaku_wrap.training.data.order import BatchOrder, Entries
from kohaku_wrap.training.data.torch_streams import item_generator

SUBSTITUTES_TRIED = 64
"""Unreadable images in a row after which the dataset itself is at fault."""

UNUSED_BY_TRAINING = frozenset({"batch_size", "image_dir", "metadata_file", "caption_extension", "cache_info"})
"""Dataset options that say where things lie, not what an item is."""

ITEM_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "color_aug": (False,),
    "face_crop_aug_range": (None, ""),
    "alpha_mask": (False,),
    "token_warmup_step": (0,),
    "token_warmup_min": (0, 1),
    "validation_split": (0.0,),
    "is_reg": (False,),
    "class_tokens": (None, ""),
    "skip_image_resolution": (None,),
}
"""Options of sd-scripts' dataset that this one has only at these values."""

Tokenize = Callable[[str], Sequence[torch.Tensor]]
"""A caption's token ids, one tensor a text encoder."""


class BatchKey(NamedTuple):
    """Which batch to load; what the sampler yields."""

    epoch: int
    position: int
    batch_index: int
    is_fill: bool


@dataclass(frozen=True)
class ItemOptions:
    """The dataset options of sd-scripts that decide what an item is."""

    captions: CaptionOptions
    """How captions change each time."""

    buckets: BucketOptions
    """Which sizes images are resized and cropped to."""

    flip_aug: bool = False
    """Mirror half of the images."""

    random_crop: bool = False
    """Crop anywhere instead of the middle."""

    resize_interpolation: str | None = None
    """One of sd-scripts' names; None chooses by direction."""

    num_repeats: int = 1
    """How often an epoch trains each image, each time with draws of its own."""

    later_subsets: tuple[ItemOptions, ...] = ()
    """Those of the second subset and of further ones, where there are several."""

    @classmethod
    def from_dataset_options(cls, options: Mapping[str, Any], joins_by_separator: bool = False) -> ItemOptions:
        """From sd-scripts' dataset options and its commit's rule for captions.

        Under `later_subsets` a list of those of further subsets. Raises ProblemsFound that names each option this
        dataset does not have.
        """
        later = tuple(cls.from_dataset_options(each, joins_by_separator) for each in options.get("later_subsets", ()))
        caption_names = {field.name for field in fields(CaptionOptions)} - {"joins_by_separator"}
        bucket_names = {field.name for field in fields(BucketOptions)}
        own = {"flip_aug", "random_crop", "resize_interpolation", "num_repeats"}
        given = {name: value for name, value in options.items() if value is not None and name != "later_subsets"}
        problems = [
            Problem(name, f"{value!r} is not supported by kwrap's dataset; only {ITEM_DEFAULTS[name][0]!r} is")
            for name, value in given.items()
            if name in ITEM_DEFAULTS and value not in ITEM_DEFAULTS[name]
        ]
        known = caption_names | bucket_names | own | UNUSED_BY_TRAINING | set(ITEM_DEFAULTS)
        problems += [Problem(name, "unknown to kwrap's dataset") for name in given if name not in known]
        interpolation = given.get("resize_interpolation")
        if interpolation is not None and interpolation not in INTERPOLATIONS:
            problems.append(
                Problem("resize_interpolation", f"{interpolation!r} is not one of {', '.join(INTERPOLATIONS)}")
            )
        repeats = given.get("num_repeats", 1)
        if not isinstance(repeats, int) or repeats < 1:
            problems.append(Problem("num_repeats", f"{repeats!r} is not a whole number from 1"))
        if problems:
            next_step = 'Leave these options out, or use data = "sd-scripts" with the sd-scripts engine.'
            raise ProblemsFound("dataset options", problems, next_step)
        return cls(
            captions=CaptionOptions(
                **{name: value for name, value in given.items() if name in caption_names},
                joins_by_separator=joins_by_separator,
            ),
            buckets=BucketOptions.from_dataset_options(given),
            **{name: value for name, value in given.items() if name in own},
            later_subsets=later,
        )

    def of_subset(self, place: int) -> ItemOptions:
        """The options of the images of one subset."""
        return self.later_subsets[place - 1] if place else self


@dataclass(frozen=True)
class Item:
    """All that was drawn for one image in one epoch; known without opening the image."""

    row: int
    """In the columns."""

    image_id: int
    """The post's id."""

    flipped: bool
    """Whether the image is mirrored."""

    crop: tuple[int, int]
    """Left and top of the crop in the resized image."""

    caption: str
    """The text that is tokenised."""

    def content(self) -> bytes:
        """What the ledger's content digest is made of."""
        return f"{self.image_id}\x1f{int(self.flipped)}\x1f{self.crop[0]},{self.crop[1]}\x1f{self.caption}\x1e".encode()


class ColumnsDataset(Dataset[dict[str, Any]]):
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
    ) -> None:
        """`group`: batches in one optimizer step. `start`: epoch and global position of this attempt's first batch,
        before which no image should be loaded. Without `tokenize` the examples carry no token ids."""
        self.columns = columns
        self.options = options
        self.seed = seed
        self.tokenize = tokenize
        self.substitute_bad_images = substitute_bad_images
        self.start = start
        self.buckets: BucketAssignment = assign_buckets(columns.widths, columns.heights, options.buckets)
        self.entries = Entries(columns.subsets, [each.num_repeats for each in (options, *options.later_subsets)])
        self.order = BatchOrder(self.entries.of_rows(self.buckets.bucket_of_image), batch_size, seed, group)
        self.text_mix = TextMix(**columns.text_shares)
        # Shared with the loader workers, which only add to it.
        self._images_loaded_too_early = multiprocessing.Value("q", 0)

    def __len__(self) -> int:
        return self.order.batches

    @property
    def images_loaded_too_early(self) -> int:
        """Images opened for positions before `start`; 0 proves that a resume skips without loading."""
        return int(self._images_loaded_too_early.value)

    def resolution_of(self, row: int) -> tuple[int, int]:
        """Width and height of the row's bucket."""
        width, height = self.buckets.resolutions[self.buckets.bucket_of_image[row]]
        return int(width), int(height)

    def draw_item(self, row: int, epoch: int, repeat: int = 0) -> Item:
        """What the seed decides about one image in one epoch, for each repeat anew; no file is opened."""
        image_id = int(self.columns.ids[row])
        options = self.options.of_subset(int(self.columns.subsets[row]))
        draw = item_generator(self.seed, epoch, image_id, repeat)
        flipped = options.flip_aug and draw.random() < 0.5
        bucket, resized = self.resolution_of(row), self.buckets.resized_sizes[row]
        spare = max(int(resized[0]) - bucket[0], 0), max(int(resized[1]) - bucket[1], 0)
        if options.random_crop:
            crop = tuple(draw.randint(0, side) if side else 0 for side in spare)
        else:
            crop = tuple(side // 2 for side in spare)
        caption = self.draw_caption(row, options.captions, epoch, repeat, draw)
        return Item(row, image_id, flipped, (crop[0], crop[1]), caption)

    def draw_caption(self, row: int, options: CaptionOptions, epoch: int, repeat: int, draw: random.Random) -> str:
        """What is trained of the tags, of the image's text, or of both; a text is one piece that nothing changes."""
        tags, text = self.columns.caption_of(row), self.columns.texts[row] if self.columns.texts else ""
        if not text:
            return process_caption(tags, options, epoch, draw)
        form = int(self.text_mix.choose(self.seed, epoch, self.columns.ids[row : row + 1], repeat)[0])
        sign = choose_sign(tags)
        whole = put_text(tags, sign, int(self.columns.text_places[row]), form)
        caption = process_caption(whole, options, epoch, draw)
        return caption if form == TAGS else caption.replace(sign, text)

    def draw_batch(self, key: BatchKey) -> list[Item]:
        """The items of a batch as far as they are known without opening an image."""
        entries = self.order.epoch(key.epoch).images_of_batch(key.batch_index)
        places = [self.entries.place_of(int(entry)) for entry in entries]
        return [self.draw_item(row, key.epoch, repeat) for repeat, row in places]

    def load_image(self, item: Item) -> torch.Tensor:
        """The item's pixels: (3, height, width) float32 in -1 … 1. Raises UnreadableImage."""
        pixels = load_pixels(self.columns.path_of(item.row), self.columns.size_of(item.row))
        width, height = self.buckets.resized_sizes[item.row]
        options = self.options.of_subset(int(self.columns.subsets[item.row]))
        pixels = resize_pixels(pixels, (int(width), int(height)), options.resize_interpolation)
        pixels = crop_pixels(pixels, self.resolution_of(item.row), item.crop)
        if item.flipped:
            pixels = pixels[:, ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()
        return tensor.to(torch.float32).div(255).sub_(0.5).div_(0.5)

    def load_item(self, item: Item, key: BatchKey, slot: int) -> tuple[Item, torch.Tensor]:
        """The item and its pixels, or, where that is allowed, a substitute of the same bucket.

        A substitute depends on (seed, epoch, position, slot) alone, so every attempt takes the same one.
        """
        try:
            return item, self.load_image(item)
        except UnreadableImage:
            if not self.substitute_bad_images:
                raise
        rows = np.flatnonzero(self.buckets.bucket_of_image == self.buckets.bucket_of_image[item.row])
        stream = stream_key("substitute", self.seed, key.epoch, key.position, slot)
        for draw in draws(stream, np.arange(SUBSTITUTES_TRIED)):
            candidate = self.draw_item(int(rows[int(draw) % len(rows)]), key.epoch)
            try:
                return candidate, self.load_image(candidate)
            except UnreadableImage as error:
                last = error
        raise last

    def __getitem__(self, key: BatchKey) -> dict[str, Any]:
        """The batch of `key`, as sd-scripts' datasets give it.

        `images` (n, 3, height, width) float32; `input_ids_list` one (n, chunks, 77) int64 a text encoder;
        `original_sizes_hw`, `crop_top_lefts`, `target_sizes_hw` (n, 2) int64; `kwrap` the ledger's facts.
        """
        key = BatchKey(*key)
        drawn = self.draw_batch(key)
        loaded = [self.load_item(item, key, slot) for slot, item in enumerate(drawn)]
        if (key.epoch, key.position) < self.start:
            with self._images_loaded_too_early.get_lock():
                self._images_loaded_too_early.value += len(loaded)
        items = [item for item, _ in loaded]
        ids = [self.tokenize(item.caption) for item in items] if self.tokenize else []
        return {
            "custom_attributes": [{} for _ in items],
            "loss_weights": torch.ones(len(items)),
            "text_encoder_outputs_list": None,
            "input_ids_list": [torch.stack(list(each)) for each in zip(*ids, strict=True)] or None,
            "alpha_masks": None,
            "images": torch.stack([image for _, image in loaded]),
            "latents": None,
            "captions": [item.caption for item in items],
            **self.size_conditions(items),
            "flippeds": [item.flipped for item in items],
            "network_multipliers": torch.ones(len(items)),
            "kwrap": {
                "epoch": key.epoch,
                "position": key.position,
                "is_fill": key.is_fill,
                "image_ids": [item.image_id for item in drawn],
                "content": digest_content(items),
                "substituted": [old.image_id for old, new in zip(drawn, items, strict=True) if old.row != new.row],
            },
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


def digest_content(items: Sequence[Item]) -> str:
    """A hex digest of a batch's captions, crops and flips; what an example carries."""
    return hashlib.blake2b(b"".join(item.content() for item in items), digest_size=16).hexdigest()


def content_digest(content: str, timesteps: Sequence[int]) -> int:
    """The 64-bit digest that the ledger records: an example's `content` and the batch's time steps."""
    text = f"{content}:{','.join(str(int(step)) for step in timesteps)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def read_dataset_options(document: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a dataset TOML with one dataset, flattened; those of subsets after the first in `later_subsets`.

    Raises ProblemsFound for several datasets, and for none.
    """
    datasets = document.get("datasets", [])
    subsets = merge_subsets(document) if len(datasets) == 1 else []
    if not subsets:
        problem = Problem("datasets", f"{len(datasets)} datasets and {len(subsets)} subsets; kwrap's dataset is one")
        raise ProblemsFound("dataset.toml", [problem], 'Use data = "sd-scripts" with the sd-scripts engine.')
    if len(subsets) == 1:
        return subsets[0]
    folder = find_image_folder(flatten_dataset(document))
    return {**subsets[0], "image_dir": folder, "later_subsets": subsets[1:]}
