"""The step plan: buckets, batches, micro-batches and optimizer steps, as the trainer will count them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from kohaku_wrap.config.effective import Effective, shape_batch
from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.formats.caption_rows import OWN_STYLE, ImageSizes, NoImages, read_captions_metadata
from kohaku_wrap.steps import Bucket, StepPlan


def count_steps(
    widths: npt.ArrayLike,
    heights: npt.ArrayLike,
    bucket_options: BucketOptions,
    batch_size: int,
    processes: int,
    accumulation: int,
    epochs: int | None = None,
    max_steps: int | None = None,
    repeats: npt.NDArray[np.int64] | int = 1,
) -> StepPlan:
    """Count one training. `widths`, `heights`: (images,) real sizes; one of `epochs` and `max_steps`.

    An epoch trains each image `repeats` times, which may differ between images.

    A bucket of n images makes ceil(n / batch_size) batches; a process gets ceil(batches / processes) of them;
    an epoch has ceil(that / accumulation) optimizer steps. Raises NoImages.
    Source: sd-scripts' BucketManager and train_network.py at 48d368f.
    """
    assignment = assign_buckets(widths, heights, bucket_options)
    size = len(assignment.resolutions)
    weights = np.broadcast_to(repeats, assignment.bucket_of_image.shape)
    images_of_bucket = np.bincount(assignment.bucket_of_image, weights, size).astype(np.int64)
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
        repeats=sizes.repeats * int(effective.get("dataset_options.num_repeats")),
    )


def note_other_dataset(effective: Effective, images: Path) -> list[str]:
    """A sentence where the images were captioned for another dataset than the template's."""
    named = effective.get("kwrap.dataset", "")
    if effective.get("kwrap.data") != "kwrap" or not named:
        return []
    try:
        about = read_captions_metadata(images)
    except NoImages:
        return []
    captioned, is_own = about.get("dataset", ""), about.get("style") == OWN_STYLE
    if not captioned or Path(captioned).stem == Path(named).stem:
        return []
    return [
        f"the captions are of the dataset {captioned}, the template names {named}: "
        f'write dataset = "{captioned}" under its [kwrap]{"" if is_own else f", or caption with --dataset {named}"}'
    ]


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
