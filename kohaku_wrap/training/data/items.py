"""What an image is in an epoch: its crop, flip and caption, a function of seed, epoch and image; no torch needed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import numpy as np

from kohaku_wrap.config.run_files import DATASET_FILE, find_image_folder, flatten_dataset, merge_subsets
from kohaku_wrap.dataset.buckets import BucketAssignment, BucketOptions, assign_buckets
from kohaku_wrap.dataset.captions.mixing import TAGS, TextMix, put_text
from kohaku_wrap.errors import Problem, ProblemsFound
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.held_out import HeldOut
from kohaku_wrap.streams import draws, seed_of, stream_key
from kohaku_wrap.training.data.captions import CaptionOptions, choose_sign, process_caption
from kohaku_wrap.training.data.images import (
    INTERPOLATIONS,
    Pixels,
    UnreadableImage,
    crop_pixels,
    load_pixels,
    resize_pixels,
)
from kohaku_wrap.training.data.order import BatchOrder, Entries

Loaded = TypeVar("Loaded")

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


def item_generator(seed: int, epoch: int, image_id: int, repeat: int = 0) -> random.Random:
    """The generator behind one image's flip, crop and caption in one epoch, and in each repeat of it there."""
    again = (repeat,) if repeat else ()
    return random.Random(seed_of("item", seed, epoch, image_id, *again))


class Items:
    """All that seed, epoch and image decide of a dataset's batches."""

    def __init__(
        self,
        columns: Columns,
        options: ItemOptions,
        batch_size: int,
        seed: int,
        group: int,
        held_out: HeldOut | None = None,
    ) -> None:
        """`group`: batches in one optimizer step. `held_out`: posts that no batch has, nor takes for a substitute."""
        self.columns = columns
        self.options = options
        self.seed = seed
        self.buckets: BucketAssignment = assign_buckets(columns.widths, columns.heights, options.buckets)
        self.left_out = held_out.mark(columns.ids) if held_out else None
        repeats = [each.num_repeats for each in (options, *options.later_subsets)]
        self.entries = Entries(columns.subsets, repeats, self.left_out)
        self.order = BatchOrder(self.entries.of_rows(self.buckets.bucket_of_image), batch_size, seed, group)
        self.text_mix = TextMix(**columns.text_shares)

    def options_of(self, row: int) -> ItemOptions:
        """The options of the row's subset."""
        return self.options.of_subset(int(self.columns.subsets[row]))

    def resolution_of(self, row: int) -> tuple[int, int]:
        """Width and height of the row's bucket."""
        width, height = self.buckets.resolutions[self.buckets.bucket_of_image[row]]
        return int(width), int(height)

    def draw_item(self, row: int, epoch: int, repeat: int = 0) -> Item:
        """What the seed decides about one image in one epoch, for each repeat anew; no file is opened."""
        draw, flipped, crop = self.begin_item(row, epoch, repeat)
        caption, sign, text = self.draw_tags(row, epoch, repeat, draw)
        whole = caption.replace(sign, text) if sign else caption
        return Item(row, int(self.columns.ids[row]), flipped, crop, whole)

    def begin_item(self, row: int, epoch: int, repeat: int) -> tuple[random.Random, bool, tuple[int, int]]:
        """Flip and crop of an image, and the generator as it stands before the caption's draws."""
        options = self.options_of(row)
        draw = item_generator(self.seed, epoch, int(self.columns.ids[row]), repeat)
        flipped = options.flip_aug and draw.random() < 0.5
        spare = self.spare_of(row)
        if options.random_crop:
            crop = tuple(draw.randint(0, side) if side else 0 for side in spare)
        else:
            crop = tuple(side // 2 for side in spare)
        return draw, flipped, (crop[0], crop[1])

    def spare_of(self, row: int) -> tuple[int, int]:
        """Width and height that the row's resized image has beyond its bucket."""
        bucket, resized = self.resolution_of(row), self.buckets.resized_sizes[row]
        return max(int(resized[0]) - bucket[0], 0), max(int(resized[1]) - bucket[1], 0)

    def draw_tags(self, row: int, epoch: int, repeat: int, draw: random.Random) -> tuple[str, str, str]:
        """What is trained of the tags, of the image's text, or of both; a text is one piece that nothing changes.

        The caption with a sign in the place of the text, the sign, and the text; both are empty for tags alone.
        """
        options = self.options_of(row).captions
        tags, text = self.columns.caption_of(row), self.columns.texts[row] if self.columns.texts else ""
        if not text:
            return process_caption(tags, options, epoch, draw), "", ""
        form = int(self.text_mix.choose(self.seed, epoch, self.columns.ids[row : row + 1], repeat)[0])
        sign = choose_sign(tags)
        whole = put_text(tags, sign, int(self.columns.text_places[row]), form)
        caption = process_caption(whole, options, epoch, draw)
        return (caption, "", "") if form == TAGS else (caption, sign, text)

    def draw_batch(self, key: BatchKey) -> list[Item]:
        """The items of a batch as far as they are known without opening an image."""
        entries = self.order.epoch(key.epoch).images_of_batch(key.batch_index)
        places = [self.entries.place_of(int(entry)) for entry in entries]
        return [self.draw_item(row, key.epoch, repeat) for repeat, row in places]

    def make_pixels(self, item: Item) -> Pixels:
        """The item's pixels as they are trained: (height, width, 3) uint8. Raises UnreadableImage."""
        pixels = load_pixels(self.columns.path_of(item.row), self.columns.size_of(item.row))
        width, height = self.buckets.resized_sizes[item.row]
        options = self.options_of(item.row)
        pixels = resize_pixels(pixels, (int(width), int(height)), options.resize_interpolation)
        pixels = crop_pixels(pixels, self.resolution_of(item.row), item.crop)
        return pixels[:, ::-1] if item.flipped else pixels

    def find_substitute(
        self, item: Item, key: BatchKey, slot: int, load: Callable[[Item], Loaded]
    ) -> tuple[Item, Loaded]:
        """An item of the same bucket in place of an unreadable one, and what `load` makes of it.

        A substitute depends on (seed, epoch, position, slot) alone, so every attempt takes the same one.
        """
        alike = self.buckets.bucket_of_image == self.buckets.bucket_of_image[item.row]
        rows = np.flatnonzero(alike if self.left_out is None else alike & ~self.left_out)
        stream = stream_key("substitute", self.seed, key.epoch, key.position, slot)
        for draw in draws(stream, np.arange(SUBSTITUTES_TRIED)):
            candidate = self.draw_item(int(rows[int(draw) % len(rows)]), key.epoch)
            try:
                return candidate, load(candidate)
            except UnreadableImage as error:
                last = error
        raise last


def read_dataset_options(document: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a dataset TOML with one dataset, flattened; those of subsets after the first in `later_subsets`.

    Raises ProblemsFound for several datasets, and for none.
    """
    datasets = document.get("datasets", [])
    subsets = merge_subsets(document) if len(datasets) == 1 else []
    if not subsets:
        problem = Problem("datasets", f"{len(datasets)} datasets and {len(subsets)} subsets; kwrap's dataset is one")
        raise ProblemsFound(DATASET_FILE, [problem], 'Use data = "sd-scripts" with the sd-scripts engine.')
    if len(subsets) == 1:
        return subsets[0]
    folder = find_image_folder(flatten_dataset(document))
    return {**subsets[0], "image_dir": folder, "later_subsets": subsets[1:]}
