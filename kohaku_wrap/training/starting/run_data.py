"""What a run's data look like at a glance, kept with the run: the dataset's summary, its buckets, a few examples."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kohaku_wrap.config.effective import Effective
from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import write_json
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.data_summary import FORMAT, SUMMARY_FILE, read_summary
from kohaku_wrap.steps import StepPlan
from kohaku_wrap.streams import permutation, stream_key
from kohaku_wrap.training.data.images import UnreadableImage, crop_pixels, load_pixels, resize_pixels

EXAMPLES = 20
THUMB_PIXELS = 192
"""The longer side of an example's picture."""

QUALITY = 78


def keep_run_data(folder: Path, effective: Effective, images: Path, plan: StepPlan) -> None:
    """Write it into a new run's folder; where it cannot be made, the run is none the worse and has none."""
    with suppress(KwrapError, OSError, ImportError):
        columns = Columns.open(images)
        options = effective.subtable("dataset_options", with_defaults=True)
        document = {
            **read_summary(images, columns.digest),
            "format": FORMAT,
            "captions_digest": columns.digest,
            "batch_size": plan.batch_size,
            "buckets": [[each.width, each.height, each.images, each.batches] for each in plan.buckets],
            "examples": list(make_examples(columns, options)),
        }
        write_json(folder / SUMMARY_FILE, document, None)


def make_examples(columns: Columns, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows at random, the same for the same captions, each with its picture as it is trained, but small."""
    rows = np.sort(permutation(stream_key("examples", columns.digest), len(columns))[:EXAMPLES])
    sizes = np.array([columns.size_of(int(row)) for row in rows])
    buckets = assign_buckets(sizes[:, 0], sizes[:, 1], BucketOptions.from_dataset_options(options))
    for place, row in enumerate(rows.tolist()):
        width, height = (int(side) for side in buckets.resolutions[buckets.bucket_of_image[place]])
        resized = int(buckets.resized_sizes[place][0]), int(buckets.resized_sizes[place][1])
        caption = columns.caption_of(row)
        if not options.get("enable_wildcard"):
            caption = caption.partition("\n")[0]
        example = {"id": int(columns.ids[row]), "caption": caption, "width": width, "height": height}
        with suppress(UnreadableImage):
            pixels = load_pixels(columns.path_of(row), columns.size_of(row))
            pixels = resize_pixels(pixels, resized, options.get("resize_interpolation"))
            corner = max(0, (resized[0] - width) // 2), max(0, (resized[1] - height) // 2)
            example["picture"] = encode_small(Image.fromarray(crop_pixels(pixels, (width, height), corner)))
        yield example


def encode_small(picture: Image.Image) -> str:
    """A JPEG of at most THUMB_PIXELS a side, in base64."""
    picture.thumbnail((THUMB_PIXELS, THUMB_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()
