"""Pictures of every odd form, as `extract` writes them, are the same pixels to kwrap and to sd-scripts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kohaku_wrap.dataset.images.checking import check_image
from kohaku_wrap.training.data.images import crop_pixels, load_pixels, resize_pixels

WIDTH, HEIGHT = 120, 90
BUCKET, RESIZED = (96, 64), (96, 72)


def odd_pictures() -> Iterator[tuple[str, str, bytes]]:
    """Name, extension and content."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    colours = np.stack([columns * 255 // (WIDTH - 1), rows * 255 // (HEIGHT - 1), (columns + rows) % 256], -1)
    plain = Image.fromarray(colours.astype(np.uint8))
    clear = plain.convert("RGBA")
    clear.putalpha(Image.fromarray((columns * 2 % 256).astype(np.uint8)))
    turned = Image.Exif()
    turned[0x0112] = 6
    tries: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "grey of 16 bits": (Image.fromarray((rows * 700).astype(np.uint16)), "PNG", {}),
        "one bit": (plain.convert("1"), "PNG", {}),
        "palette with a transparent colour": (plain.quantize(16), "PNG", {"transparency": 3}),
        "palette with alpha": (plain.quantize(8), "PNG", {"transparency": bytes(range(0, 256, 32))}),
        "grey with alpha": (clear.convert("LA"), "PNG", {}),
        "alpha": (clear, "WEBP", {"lossless": True}),
        "CMYK": (plain.convert("CMYK"), "JPEG", {}),
        "progressive grey": (plain.convert("L"), "JPEG", {"progressive": True}),
        "turned JPEG": (plain, "JPEG", {"exif": turned}),
        "turned palette": (plain.quantize(16), "PNG", {"exif": turned}),
        "animated PNG": (plain, "PNG", {"save_all": True, "append_images": [plain.rotate(180)]}),
        "animated WEBP": (plain, "WEBP", {"save_all": True, "append_images": [plain.rotate(180)]}),
    }
    for name, (image, kind, options) in tries.items():
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        yield name, kind.lower().replace("jpeg", "jpg"), stream.getvalue()


@pytest.mark.sd_scripts
@pytest.mark.parametrize(
    ("name", "extension", "content"), odd_pictures(), ids=lambda given: given if isinstance(given, str) else ""
)
def test_sd_scripts_reads_the_same_pixels(
    name: str, extension: str, content: bytes, sd_scripts: Any, tmp_path: Path
) -> None:
    checked = check_image(content, extension)
    path = tmp_path / f"1.{extension}"
    path.write_bytes(checked.content)
    theirs = sd_scripts.train_util.load_image(str(path))
    ours = load_pixels(path, (checked.width, checked.height))
    assert (ours == theirs).all() and ours.std() > 10, name
    # Once more as it is trained: a bucket that is smaller, one side of it cropped.
    bucket, resized = (BUCKET, RESIZED) if checked.width > checked.height else (BUCKET[::-1], RESIZED[::-1])
    theirs, _, _ = sd_scripts.train_util.trim_and_resize_if_required(False, theirs, bucket, resized)
    left, top = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
    assert (crop_pixels(resize_pixels(ours, resized, None), bucket, (left, top)) == theirs).all(), name
