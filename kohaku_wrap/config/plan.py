"""The step plan: buckets, batches, micro-batches and optimizer steps, as the trainer will count them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.config.layers import BatchShape, Effective
from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.errors import KwrapError

CAPTIONS_FILE = "captions.arrow"
"""The images and captions of a folder, written by `kwrap caption`."""


class NoImages(KwrapError):
    """There is nothing to count: no images, or no file that lists them."""


class BadBatch(KwrapError):
    """The effective batch cannot be made on this site."""


@dataclass(frozen=True)
class Bucket:
    """One bucket that holds images."""

    width: int
    """Pixels."""

    height: int
    """Pixels."""

    images: int
    """Images in it, repeats included."""

    batches: int
    """Batches in an epoch: images by batch, rounded up."""


@dataclass(frozen=True)
class StepPlan:
    """What one training will count."""

    images: int
    """Images in one epoch, repeats included."""

    buckets: tuple[Bucket, ...]
    """By width, then height."""

    batch_size: int
    """Images in a full micro-batch of one process."""

    processes: int
    """Training processes."""

    accumulation: int
    """Micro-batches of one process per optimizer step."""

    batches: int
    """Batches in one epoch, over all buckets and processes."""

    micro_batches_per_epoch: int
    """Micro-batches of one process in one epoch, as sd-scripts counts them: batches by processes, rounded up."""

    optimizer_steps_per_epoch: int
    """Weight updates in one epoch."""

    epochs: int
    """Epochs, the last one perhaps cut short."""

    total_optimizer_steps: int
    """Weight updates in all."""

    @property
    def group(self) -> int:
        """Micro-batches per optimizer step over all processes."""
        return self.processes * self.accumulation

    @property
    def effective_batch(self) -> int:
        """Images per optimizer step where all batches are full."""
        return self.group * self.batch_size

    @property
    def fills_per_epoch(self) -> int:
        """Batches that kwrap's order repeats so that the epoch's last optimizer step is whole."""
        return self.optimizer_steps_per_epoch * self.group - self.batches

    @property
    def bucket_fill(self) -> float:
        """Images by places in the batches: 1 where every batch is full."""
        return self.images / (self.batches * self.batch_size)

    @property
    def images_per_optimizer_step(self) -> float:
        """The mean of images in one weight update."""
        return self.images / self.optimizer_steps_per_epoch


@dataclass(frozen=True)
class ImageSizes:
    """Widths and heights of the images to train on."""

    widths: npt.NDArray[np.int64]
    """(images,) pixels."""

    heights: npt.NDArray[np.int64]
    """(images,) pixels."""

    source: str
    """Where they come from, in words."""

    exact: bool = True
    """Whether they were measured on the images themselves."""

    caption_bytes: int | None = None
    """Bytes of all captions, where known."""


def count_steps(
    widths: npt.ArrayLike,
    heights: npt.ArrayLike,
    bucket_options: BucketOptions,
    batch_size: int,
    processes: int,
    accumulation: int,
    epochs: int | None = None,
    max_steps: int | None = None,
    num_repeats: int = 1,
) -> StepPlan:
    """Count one training. `widths`, `heights`: (images,) real sizes; one of `epochs` and `max_steps`.

    A bucket of n images makes ceil(n / batch_size) batches; a process gets ceil(batches / processes) of them;
    an epoch has ceil(that / accumulation) optimizer steps. Raises NoImages.
    Source: sd-scripts' BucketManager and train_network.py at 48d368f.
    """
    assignment = assign_buckets(widths, heights, bucket_options)
    images_of_bucket = assignment.images_of_bucket * num_repeats
    images = int(images_of_bucket.sum())
    if not images:
        raise NoImages("there are no images to train on", "Run `kwrap extract` and `kwrap caption` first.")
    batches_of_bucket = -(-images_of_bucket // batch_size)
    batches = int(batches_of_bucket.sum())
    micro_batches = -(-batches // processes)
    steps_per_epoch = -(-micro_batches // accumulation)
    if epochs is not None:
        total = epochs * steps_per_epoch
    else:
        total = max_steps or 0
        epochs = -(-total // steps_per_epoch)
    return StepPlan(
        images=images,
        buckets=tuple(
            Bucket(int(size[0]), int(size[1]), int(count), int(batched))
            for size, count, batched in zip(assignment.resolutions, images_of_bucket, batches_of_bucket, strict=True)
        ),
        batch_size=batch_size,
        processes=processes,
        accumulation=accumulation,
        batches=batches,
        micro_batches_per_epoch=micro_batches,
        optimizer_steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        total_optimizer_steps=total,
    )


def shape_batch(effective: Effective) -> BatchShape:
    """The batch on the template's site. Raises BadBatch where it does not divide, and says what would."""
    if shape := effective.batch:
        return shape
    site = effective.site
    if site is None:
        raise BadBatch("the batch depends on the site", "Add --site site.toml.")
    wanted = effective.get("effective_batch")
    if not wanted:
        raise BadBatch(f"{effective.name} states no effective_batch", "Write for example effective_batch = 256.")
    machine = site.machine
    at_once = machine.processes * machine.batch_per_gpu
    fitting = [size for size in range(1, machine.batch_per_gpu * 4 + 1) if wanted % (machine.processes * size) == 0]
    advice = f"batch_per_gpu may be {', '.join(map(str, fitting))}" if fitting else "change gpus or effective_batch"
    raise BadBatch(
        f"effective_batch = {wanted} ({effective.origin('effective_batch')}) is no multiple of {at_once}: "
        f"{machine.processes} processes with {machine.batch_per_gpu} images each",
        f"In {site.path}, {advice}.",
    )


def plan_steps(effective: Effective, sizes: ImageSizes) -> StepPlan:
    """The plan of a template on its site over these images."""
    shape = shape_batch(effective)
    options = effective.subtable("dataset_options", with_defaults=True)
    return count_steps(
        sizes.widths,
        sizes.heights,
        BucketOptions.from_dataset_options(options),
        shape.batch_per_gpu,
        shape.processes,
        shape.accumulation,
        epochs=effective.get("max_train_epochs"),
        max_steps=effective.get("max_train_steps"),
        num_repeats=effective.get("dataset_options.num_repeats", 1),
    )


def read_captions_metadata(images: Path) -> Mapping[str, Any]:
    """What `kwrap caption` wrote about the folder: digest, count, dataset, style, selection. Raises NoImages."""
    return dict(json.loads((open_captions(images).schema.metadata or {}).get(b"kwrap", b"{}")))


def other_dataset(effective: Effective, images: Path) -> str:
    """A note where the images were captioned for another dataset than the template's; empty where not."""
    captioned, named = read_captions_metadata(images).get("dataset", ""), effective.get("kwrap.dataset", "")
    if not captioned or not named or Path(captioned).stem == Path(named).stem:
        return ""
    return f"The captions are of the dataset {captioned}; the template names {named} ([kwrap] dataset)."


def open_captions(images: Path) -> Any:
    """The memory-mapped reader of the folder's captions. Raises NoImages."""
    import pyarrow as pa

    path = images / CAPTIONS_FILE
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except FileNotFoundError:
        raise NoImages(
            f"{path}: not there, so the images' sizes are not known",
            "Run `kwrap extract` and `kwrap caption` first, or count with `kwrap plan --selection SEL.parquet`.",
        ) from None
    except pa.ArrowInvalid as error:
        raise NoImages(f"{path}: not a captions file ({error})", "Run `kwrap caption` again.") from None


def read_folder_sizes(images: Path) -> ImageSizes:
    """The measured sizes of the images that extract and caption made ready. Raises NoImages."""
    table = open_captions(images).read_all()
    if not len(table):
        raise NoImages(f"{images / CAPTIONS_FILE}: lists no image", "Run `kwrap extract` and `kwrap caption` again.")
    captions = table["caption"]
    return ImageSizes(
        widths=table["width"].to_numpy().astype(np.int64),
        heights=table["height"].to_numpy().astype(np.int64),
        source=f"the images in {images}",
        caption_bytes=sum(chunk.nbytes for chunk in captions.chunks),
    )


def read_selection_sizes(selection: Path) -> ImageSizes:
    """The sizes that the database gives for a selection, posts without one left out.

    Shards of shrunk images hold smaller ones. Raises BadSelection and NoImages.
    """
    from kohaku_wrap.dataset.selection_file import open_selection, take_numbers

    names = ["image_width", "image_height"]
    with open_selection(selection) as file:
        table = file.read(columns=names)
    widths, heights = (take_numbers(selection, name, table[name], least=0).astype(np.int64) for name in names)
    known = (widths > 0) & (heights > 0)
    if not known.any():
        raise NoImages(f"{selection}: the database gives no sizes", "Run `kwrap extract`, which measures the images.")
    unknown = len(known) - int(known.sum())
    left_out = f"; {unknown:,} without a size left out" if unknown else ""
    return ImageSizes(
        widths=widths[known],
        heights=heights[known],
        source=f"the database's sizes in {selection}; what is missing or was shrunk is not known yet{left_out}",
        exact=False,
    )


def suppose_sizes(images: int, effective: Effective) -> ImageSizes:
    """`images` of the template's own resolution: for numbers before there is any data."""
    width, height = BucketOptions.from_dataset_options(
        effective.subtable("dataset_options", with_defaults=True)
    ).resolution
    return ImageSizes(
        np.full(images, width, dtype=np.int64),
        np.full(images, height, dtype=np.int64),
        source=f"a supposition: all of {width}x{height}, in one bucket",
        exact=False,
    )
