"""The data that sd-scripts trains from under kwrap: columns through its `dataset_class`, or its own made repeatable."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from library.strategy_base import TokenizeStrategy
from torch.utils.data import Dataset, Sampler

from kohaku_wrap.formats.caption_rows import CAPTIONS_FILE
from kohaku_wrap.steps import StepCount
from kohaku_wrap.streams import seed_of
from kohaku_wrap.training.data.columns import ColumnsDataset
from kohaku_wrap.training.data.images import UNREADABLE, UnreadableImage
from kohaku_wrap.training.data.items import BatchKey
from kohaku_wrap.training.data.order import BatchOrder
from kohaku_wrap.training.data.run_dataset import open_run_dataset
from kohaku_wrap.training.data.run_items import DatasetChanged
from kohaku_wrap.training.data.sampler import PositionSampler
from kohaku_wrap.training.data.torch_streams import isolated_generators
from kohaku_wrap.training.engines.sd_scripts.objects import find_object, replace_object
from kohaku_wrap.training.records.attempts import Attempt

DATASET_CLASS = f"{__name__}.KwrapDataset"

SUBSET_DEFAULTS: dict[str, Any] = {
    "color_aug": False,
    "flip_aug": False,
    "random_crop": False,
    "shuffle_caption": False,
    "keep_tokens": 0,
    "keep_tokens_separator": None,
    "secondary_separator": None,
    "enable_wildcard": False,
    "caption_prefix": None,
    "caption_suffix": None,
    "resize_interpolation": None,
    "class_tokens": None,
}
"""What sd-scripts writes about a subset into each checkpoint."""

DATASET_DEFAULTS: dict[str, Any] = {
    "enable_bucket": False,
    "min_bucket_reso": None,
    "max_bucket_reso": None,
    "bucket_reso_steps": None,
    "bucket_no_upscale": False,
    "skip_image_resolution": None,
}
"""What sd-scripts writes about a dataset into each checkpoint."""


class UnreadableByTrainer(UnreadableImage):
    """An image that sd-scripts' own dataset cannot open."""

    advice = 'Fix the image; only kwrap\'s dataset (data = "kwrap") can train a substitute in its place.'


class KwrapDataset(find_object("MinimalDataset")):  # type: ignore[misc]  # sd-scripts has no type information
    """kwrap's columns behind sd-scripts' seam for datasets of one's own."""

    def __init__(self, tokenizer: Any, max_token_length: int | None, resolution: Any, debug_dataset: bool) -> None:
        """Called by sd-scripts; all that matters is read from the run's folder."""
        batches, options = open_run_dataset(Attempt.load(), tokenize_as_trainer)
        super().__init__(
            resolution=side_pair(options.get("resolution", resolution)),
            network_multiplier=1.0,
            debug_dataset=debug_dataset,
        )
        self.batches = batches
        columns = batches.columns
        self.batch_size = batches.order.batch_size
        self.num_train_images = len(batches.entries)
        self.img_count = len(columns)
        self.image_dir = str(columns.folder)
        self.metadata_file = CAPTIONS_FILE
        for name, default in {**SUBSET_DEFAULTS, **DATASET_DEFAULTS}.items():
            setattr(self, name, options.get(name, default))
        self.bucket_info = describe_buckets(self.batches)

    @property
    def order(self) -> BatchOrder:
        return self.batches.order

    @property
    def images_loaded_too_early(self) -> int:
        return self.batches.images_loaded_too_early

    @property
    def about_captions(self) -> dict[str, str]:
        """What checkpoints say of the captions, in place of a table of all tags."""
        return {"kwrap_captions": str(len(self.batches.columns)), "kwrap_captions_digest": self.batches.columns.digest}

    def __len__(self) -> int:
        return self.batches.order.batches

    def __getitem__(self, key: BatchKey) -> dict[str, Any]:
        return self.batches[key]


def tokenize_as_trainer(caption: str) -> list[torch.Tensor]:
    """The ids of both text encoders, by the trainer's own strategy."""
    return [ids[0] for ids in TokenizeStrategy.get_strategy().tokenize(caption)]


def side_pair(resolution: Any) -> tuple[int, int] | None:
    """sd-scripts' ways to write a resolution, as width and height."""
    if resolution is None:
        return None
    sides = [int(side) for side in str(resolution).split(",")] if isinstance(resolution, str) else resolution
    sides = [int(sides)] if isinstance(sides, int) else [int(side) for side in sides]
    return sides[0], sides[-1]


def describe_buckets(batches: ColumnsDataset) -> dict[str, Any]:
    """Sizes and counts of the buckets, as sd-scripts writes them."""
    buckets = batches.entries.of_rows(batches.buckets.bucket_of_image)
    counts = torch.bincount(torch.from_numpy(buckets).long()).tolist()
    sizes = batches.buckets.resolutions.tolist()
    return {
        "buckets": {
            str(bucket): {"resolution": size, "count": count}
            for bucket, (size, count) in enumerate(zip(sizes, counts, strict=False))
            if count
        }
    }


class TrainersOwnDataset(Dataset[dict[str, Any]]):
    """sd-scripts' own dataset with its epoch, step and randomness set by the key, not by the loader's history."""

    def __init__(self, dataset: Any, seed: int, count: StepCount, start: tuple[int, int]) -> None:
        if len(dataset) != count.batches:
            raise DatasetChanged(
                f"sd-scripts' own dataset has {len(dataset):,} batches, the run was planned for {count.batches:,}",
                "Restore the images and captions of the plan, or start a new run.",
            )
        self.dataset = dataset
        self.seed = seed
        self.count = count
        self.start = start
        # One entry a batch: which images a batch holds is the trainer's own business.
        self.order = BatchOrder([0] * count.batches, 1, seed, count.group)
        self._images_loaded_too_early = multiprocessing.Value("q", 0)
        load_image = find_object("load_image")
        replace_object(load_image, name_unreadable(load_image))
        self.about_captions = self.take_tag_tables()

    def take_tag_tables(self) -> dict[str, str]:
        """Count the captions' tags and take the table away, which every checkpoint would carry."""
        tables = [part.tag_frequency for part in self.dataset.datasets]
        digest = hashlib.sha256(repr(tables).encode())
        for part in self.dataset.datasets:
            # Lets the batch name its images.
            part.debug_dataset = True
            part.tag_frequency = {}
        tags = {tag for table in tables for counts in table.values() for tag in counts}
        return {"kwrap_tags": str(len(tags)), "kwrap_tags_digest": digest.hexdigest()}

    @property
    def images_loaded_too_early(self) -> int:
        return int(self._images_loaded_too_early.value)

    def __len__(self) -> int:
        return self.count.batches

    def __getitem__(self, key: BatchKey) -> dict[str, Any]:
        key = BatchKey(*key)
        index = int(self.order.epoch(key.epoch).images_of_batch(key.batch_index)[0])
        # The shuffle of an epoch seeds the global generators itself, so it comes first.
        with isolated_generators(0):
            self.dataset.set_current_epoch(key.epoch + 1)
        self.dataset.set_current_step(self.count.optimizer_step_of(key.epoch, key.position) - 1)
        with isolated_generators(seed_of("batch", self.seed, key.epoch, index)):
            example: dict[str, Any] = self.dataset[index]
        if (key.epoch, key.position) < self.start:
            with self._images_loaded_too_early.get_lock():
                self._images_loaded_too_early.value += len(example["captions"])
        content = repr((example["captions"], example["crop_top_lefts"].tolist(), example["flippeds"]))
        example["kwrap"] = {
            "epoch": key.epoch,
            "position": key.position,
            "is_fill": key.is_fill,
            "image_ids": [seed_of("image", Path(name).name) for name in example.pop("image_keys")],
            "content": content.encode().hex(),
            "substituted": [],
        }
        return example


def name_unreadable(load_image: Callable[..., Any]) -> Callable[..., Any]:
    """The trainer's `load_image` with failures that name the file."""

    def load(image_path: str, *arguments: Any) -> Any:
        try:
            return load_image(image_path, *arguments)
        except UNREADABLE as error:
            raise UnreadableByTrainer(Path(image_path), f"the image cannot be read ({error})") from error

    return load


class EpochSampler(Sampler[BatchKey]):
    """The positions of the epoch that the trainer has just announced; accelerate deals them to the ranks.

    It has no `set_epoch`: accelerate would call it with the epochs of this process, counted from 0.
    """

    def __init__(
        self,
        order: BatchOrder,
        start_epoch: int,
        start_position: int,
        epoch_from_one: Any,
        on_epoch: Callable[[], None] = lambda: None,
    ) -> None:
        """`epoch_from_one`: the trainer's shared counter. `on_epoch` is called as each epoch begins."""
        self.positions = PositionSampler(order, start_epoch, start_position)
        self.epoch_from_one = epoch_from_one
        self.on_epoch = on_epoch

    def __len__(self) -> int:
        """Of a whole epoch: the trainer plans its steps with it."""
        return self.positions.order.positions_per_epoch

    def __iter__(self) -> Any:
        self.on_epoch()
        self.positions.set_epoch(int(self.epoch_from_one.value) - 1)
        return iter(self.positions)
