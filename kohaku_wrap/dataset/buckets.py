"""Which bucket each image trains in, its size after the resize, and how many batches that makes.

Source of the rules: sd-scripts' BucketManager (library/train_util.py) and make_bucket_resolutions
(library/model_util.py) at 48d368f. All arithmetic is in float64 in the same order as there, so the
results are equal to the last pixel; tests compare the two where a checkout is installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.arrays import Float64Array, Int32Array, Int64Array
from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound

SIZES_A_BLOCK = 1 << 16
"""Distinct sizes compared with all resolutions at once: 64 MiB a block at 128 resolutions."""


class BucketError(KwrapError):
    """An image that no bucket can hold under these options."""


@dataclass(frozen=True)
class BucketOptions:
    """The dataset options of sd-scripts that decide the buckets, with its defaults."""

    resolution: tuple[int, int]
    """Width and height; their product is the area of every bucket."""

    enable_bucket: bool = False
    """Without it all images go to one bucket of `resolution`."""

    min_bucket_reso: int = 256
    """The shortest side of a bucket; rounded down to `bucket_reso_steps`."""

    max_bucket_reso: int = 1024
    """The longest side of a bucket; rounded up to `bucket_reso_steps`."""

    bucket_reso_steps: int = 64
    """All sides are multiples of it."""

    bucket_no_upscale: bool = False
    """Never enlarge: buckets then follow the images' own sizes, and the two limits are ignored."""

    def __post_init__(self) -> None:
        problems = []
        if min(self.resolution) < 1:
            problems.append(Problem("resolution", f"{self.resolution} has a side below 1"))
        if self.bucket_reso_steps < 1:
            problems.append(Problem("bucket_reso_steps", f"{self.bucket_reso_steps} is below 1"))
        if self.enable_bucket and not problems:
            shortest, longest = self.side_limits
            if min(self.resolution) < shortest:
                short = min(self.resolution)
                words = f"{shortest} is above the resolution's short side {short}: set {short} or less"
                problems.append(Problem("min_bucket_reso", words))
            if max(self.resolution) > longest:
                long = max(self.resolution)
                words = f"{longest} is below the resolution's long side {long}: set {long} or more"
                problems.append(Problem("max_bucket_reso", words))
            if shortest < 1:
                problems.append(Problem("min_bucket_reso", f"{self.min_bucket_reso} is below bucket_reso_steps"))
        if problems:
            raise ProblemsFound("buckets", problems, "Change resolution or the bucket options of the template.")

    @classmethod
    def from_dataset_options(cls, options: Mapping[str, Any]) -> BucketOptions:
        """The bucket options among sd-scripts' dataset options; others are ignored.

        `resolution` may be 1024, [1024, 768] or "1024,768", as sd-scripts takes it.
        """
        names = ("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
        given = {name: options[name] for name in names if options.get(name) is not None}
        return cls(resolution=parse_resolution(options.get("resolution")), **given)

    @property
    def side_limits(self) -> tuple[int, int]:
        """The shortest and longest side of a bucket, as multiples of the step."""
        step = self.bucket_reso_steps
        return self.min_bucket_reso // step * step, -(-self.max_bucket_reso // step) * step


@dataclass(frozen=True)
class BucketAssignment:
    """Every image's bucket; only buckets that hold an image are listed."""

    resolutions: Int32Array
    """(buckets, 2): width and height, ascending."""

    bucket_of_image: Int32Array
    """(images,): index into `resolutions`."""

    resized_sizes: Int32Array
    """(images, 2): width and height to resize to before the crop to the bucket's resolution."""

    @property
    def images_of_bucket(self) -> Int64Array:
        """(buckets,): how many images each bucket holds."""
        return np.bincount(self.bucket_of_image, minlength=len(self.resolutions)).astype(np.int64)


def parse_resolution(value: Any) -> tuple[int, int]:
    """Width and height from sd-scripts' forms of `resolution`: 1024, [1024, 768], "1024" or "1024,768"."""
    sides = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        numbers = [int(side) for side in sides if not isinstance(side, bool)]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != len(sides) or len(numbers) not in (1, 2):
        problem = Problem("resolution", f'{value!r} is not a number, a pair or "width,height"')
        raise ProblemsFound("buckets", [problem], "Write for example resolution = 1024.")
    return numbers[0], numbers[-1]


def list_bucket_resolutions(options: BucketOptions) -> list[tuple[int, int]]:
    """The resolutions that images may be assigned to when upscaling is allowed, ascending."""
    if not options.enable_bucket:
        return [options.resolution]
    step = options.bucket_reso_steps
    shortest, longest = options.side_limits
    area = options.resolution[0] * options.resolution[1]
    square = int(math.sqrt(area) // step) * step
    found = {(square, square)}
    for width in range(shortest, longest + 1, step):
        height = min(longest, area // width // step * step)
        if height >= shortest:
            found |= {(width, height), (height, width)}
    return sorted(found)


def assign_buckets(widths: npt.ArrayLike, heights: npt.ArrayLike, options: BucketOptions) -> BucketAssignment:
    """The bucket and the resized size of every image.

    `widths`, `heights`: (images,), real sizes in pixels.
    Raises BucketError for an image without area, and for one that would make an empty bucket.
    """
    width = np.asarray(widths, dtype=np.int64)
    height = np.asarray(heights, dtype=np.int64)
    if len(width) and min(width.min(), height.min()) < 1:
        index = int(np.flatnonzero((width < 1) | (height < 1))[0])
        raise BucketError(f"image {index} has the size {width[index]}x{height[index]}", "Run `kwrap extract` again.")
    sizes, image_to_size = np.unique(width << 32 | height, return_inverse=True)
    width, height = sizes >> 32, sizes & 0xFFFF_FFFF
    fit = fit_without_upscale if options.enable_bucket and options.bucket_no_upscale else fit_to_predefined
    bucket_width, bucket_height, resized_width, resized_height = fit(width, height, options)

    keys, bucket_of_size = np.unique(bucket_width << 32 | bucket_height, return_inverse=True)
    return BucketAssignment(
        resolutions=np.stack([keys >> 32, keys & 0xFFFF_FFFF], axis=1).astype(np.int32),
        bucket_of_image=bucket_of_size[image_to_size].astype(np.int32),
        resized_sizes=np.stack([resized_width, resized_height], axis=1).astype(np.int32)[image_to_size],
    )


def fit_to_predefined(
    width: Int64Array, height: Int64Array, options: BucketOptions
) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """Bucket width and height, resized width and height: the listed resolution nearest in aspect, or the same size."""
    resolutions = np.array(list_bucket_resolutions(options), dtype=np.int64)
    aspects = resolutions[:, 0] / resolutions[:, 1]
    aspect = width / height
    nearest = np.empty(len(aspect), dtype=np.int64)
    for start in range(0, len(aspect), SIZES_A_BLOCK):
        block = slice(start, start + SIZES_A_BLOCK)
        nearest[block] = np.abs(aspects - aspect[block, None]).argmin(axis=1)
    chosen = resolutions[nearest]
    listed = np.isin(width << 32 | height, resolutions[:, 0] << 32 | resolutions[:, 1])
    bucket_width = np.where(listed, width, chosen[:, 0])
    bucket_height = np.where(listed, height, chosen[:, 1])
    wider = aspect > bucket_width / bucket_height
    scale: Float64Array = np.where(wider, bucket_height / height, bucket_width / width)
    return bucket_width, bucket_height, round_half_up(width * scale), round_half_up(height * scale)


def fit_without_upscale(
    width: Int64Array, height: Int64Array, options: BucketOptions
) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """Bucket width and height, resized width and height: larger images shrink to the area, others keep their size."""
    step = options.bucket_reso_steps
    area = options.resolution[0] * options.resolution[1]
    aspect = width / height
    ideal_width = np.sqrt(area * aspect)
    ideal_height = area / ideal_width

    by_width = round_to_steps(ideal_width, step)
    height_by_width = round_to_steps(by_width / aspect, step)
    by_height = round_to_steps(ideal_height, step)
    width_by_height = round_to_steps(by_height * aspect, step)
    with np.errstate(divide="ignore", invalid="ignore"):
        width_error = np.abs(by_width / height_by_width - aspect)
        height_error = np.abs(width_by_height / by_height - aspect)
    prefer_width = width_error < height_error
    shrunk_width = np.where(prefer_width, by_width, round_half_up(by_height * aspect))
    shrunk_height = np.where(prefer_width, round_half_up(by_width / aspect), by_height)

    large = width * height > area
    resized_width = np.where(large, shrunk_width, width)
    resized_height = np.where(large, shrunk_height, height)
    bucket_width = resized_width // step * step
    bucket_height = resized_height // step * step
    # sd-scripts divides by zero on the first two, and trains on images without pixels in the third case.
    empty = large & ((height_by_width == 0) | (by_height == 0)) | (bucket_width == 0) | (bucket_height == 0)
    if empty.any():
        first = int(np.flatnonzero(empty)[0])
        raise BucketError(
            f"{int(empty.sum())} image sizes, the first {width[first]}x{height[first]}, are too small or too long for "
            f"bucket_no_upscale with bucket_reso_steps = {step}",
            "Select images with a minimum size, or set bucket_no_upscale = false.",
        )
    return bucket_width, bucket_height, resized_width, resized_height


def round_half_up(values: Float64Array) -> Int64Array:
    """The nearest integers of positive numbers, halves upwards."""
    return (values + 0.5).astype(np.int64)


def round_to_steps(values: Float64Array, step: int) -> Int64Array:
    """The nearest integers, rounded down to a multiple of `step`."""
    return round_half_up(values) // step * step


def find_crop_corners(bucket_sizes: npt.ArrayLike, image_sizes: npt.ArrayLike) -> Float64Array:
    """(images, 4): left, top, right, bottom of the crop as SDXL's size conditioning states it.

    `bucket_sizes`, `image_sizes`: (images, 2), width and height of the bucket and of the original image.
    Source: BucketManager.get_crop_ltrb.
    """
    bucket = np.asarray(bucket_sizes, dtype=np.float64)
    image = np.asarray(image_sizes, dtype=np.float64)
    image_aspect = image[:, 0] / image[:, 1]
    wide_bucket = bucket[:, 0] / bucket[:, 1] > image_aspect
    resized_width = np.where(wide_bucket, bucket[:, 1] * image_aspect, bucket[:, 0])
    resized_height = np.where(wide_bucket, bucket[:, 1], bucket[:, 0] / image_aspect)
    left = (bucket[:, 0] - resized_width) // 2
    top = (bucket[:, 1] - resized_height) // 2
    return np.stack([left, top, left + resized_width, top + resized_height], axis=1)
