"""One training image: opened, resized and cropped to its bucket with the pixels that sd-scripts would make.

Source of the rules: `load_image`, `trim_and_resize_if_required` and `resize_image` of sd-scripts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from kohaku_wrap.dataset.images.appearance import OF_16_BITS
from kohaku_wrap.errors import KwrapError

Pixels = npt.NDArray[np.uint8]

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")
"""The names that sd-scripts takes for `resize_interpolation`."""


UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no whole image."""


class UnreadableImage(KwrapError):
    """An image of the dataset that cannot be opened, or is not what the dataset says it is."""

    kind = "bad-image"
    advice = (
        "Remove it and run `kwrap extract` again, which makes it anew; put one that `kwrap import` linked back where "
        "it lay; or resume with `--allow bad-images` to train a substitute."
    )

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}", self.advice)


def load_pixels(path: Path, expected_size: tuple[int, int]) -> Pixels:
    """The image as (height, width, 3) RGB; transparency and palettes are converted as Pillow and sd-scripts do it.

    `kwrap extract` writes files that need no more. 16-bit grey, which that would make white, is refused.
    Raises UnreadableImage where it cannot be read, or its (width, height) is not `expected_size`.
    """
    try:
        with Image.open(path) as image:
            if image.mode in OF_16_BITS:
                raise UnreadableImage(path, "16-bit grey, which sd-scripts trains as a white picture")
            size = image.size
            pixels = np.array(image.convert("RGB"), dtype=np.uint8)
    except UNREADABLE as error:
        raise UnreadableImage(path, f"the image cannot be read ({error})") from error
    if size != expected_size:
        raise UnreadableImage(
            path, f"the image is {size[0]}x{size[1]}, the captions say {expected_size[0]}x{expected_size[1]}"
        )
    return pixels


def resize_pixels(pixels: Pixels, size: tuple[int, int], interpolation: str | None) -> Pixels:
    """The image at `size` (width, height): areas when shrinking, Lanczos otherwise, or as `interpolation` names."""
    import cv2

    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if interpolation is None:
        interpolation = "area" if width >= size[0] and height >= size[1] else "lanczos"
    if interpolation in ("lanczos", "box"):
        resampling = Image.Resampling.LANCZOS if interpolation == "lanczos" else Image.Resampling.BOX
        return np.array(Image.fromarray(pixels).resize(size, resample=resampling), dtype=np.uint8)
    methods = {
        "nearest": cv2.INTER_NEAREST_EXACT,
        "bilinear": cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
        "cubic": cv2.INTER_CUBIC,
        "area": cv2.INTER_AREA,
    }
    resized: Pixels = cv2.resize(pixels, size, interpolation=methods[interpolation])
    return resized


def crop_pixels(pixels: Pixels, size: tuple[int, int], corner: tuple[int, int]) -> Pixels:
    """The part of `size` (width, height) whose left and top are `corner`."""
    left, top = corner
    return pixels[top : top + size[1], left : left + size[0]]
