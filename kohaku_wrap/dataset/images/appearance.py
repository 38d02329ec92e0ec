"""The one rule of how a picture looks in training: upright, transparent parts on white, 16 bits scaled to 8.

sd-scripts opens files with Pillow and converts to RGB: it neither turns nor composites, and 16-bit grey becomes white.
So a picture that this concerns is written anew, and every reader of the file sees the same.
"""

from __future__ import annotations

import io
import struct
from contextlib import suppress

import numpy as np
from PIL import ExifTags, Image

from kohaku_wrap.arrays import UInt8Array

JPEG_QUALITY = 95

UPRIGHT = 1
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation; all other values mean upright. Source: EXIF 2.3, tag 0x0112."""

WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
OF_16_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def show_plainly(image: Image.Image, content: bytes) -> Image.Image | None:
    """The loaded picture as it should be trained; None where a plain conversion to RGB shows the same already.

    `content`: the file. 16-bit samples keep their high byte, as Pillow takes them for 16-bit colour.
    """
    turn = TURNS.get(read_orientation(image))
    alpha = find_alpha(image, content)
    plain = scale_to_8_bits(image) if image.mode in OF_16_BITS else image
    if alpha is not None:
        plain = lay_on_white(plain, alpha)
    if turn is not None:
        plain = plain.transpose(turn)
    if plain is image:
        return None
    plain.info = {name: image.info[name] for name in ("icc_profile",) if image.info.get(name)}
    return plain


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation, or that of XMP where EXIF has none; upright where neither can be read."""
    with suppress(SyntaxError, ValueError, LookupError, TypeError, OSError, struct.error):
        if isinstance(orientation := image.getexif().get(ExifTags.Base.Orientation), int):
            return orientation
    return UPRIGHT


def scale_to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey."""
    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


def find_alpha(image: Image.Image, content: bytes) -> Image.Image | None:
    """How opaque each pixel is, as a picture of mode L; None where all are fully so."""
    if image.mode in WITH_ALPHA or (image.mode == "P" and image.has_transparency_data):
        alpha = (image if image.mode in ("RGBA", "LA", "PA") else image.convert("RGBA")).getchannel("A")
    elif "transparency" in image.info:
        alpha = Image.fromarray(opaque_by_colour(image, content))
    else:
        return None
    return alpha if alpha.getextrema()[0] != 255 else None


def opaque_by_colour(image: Image.Image, content: bytes) -> UInt8Array:
    """(height, width) 0 where a pixel of a PNG has its one transparent colour, 255 elsewhere.

    The colour is given in samples of the file's own depth. Source: PNG specification, 11.3.2.1.
    """
    depth = content[24] if content.startswith(b"\x89PNG") else 8
    pixels = np.asarray(image)
    key = np.atleast_1d(np.asarray(image.info["transparency"], dtype=np.int64))
    if image.mode == "1":
        key = key & 1
    elif depth < 8:
        key = key * 255 // ((1 << depth) - 1)
    elif depth == 16 and image.mode not in OF_16_BITS:
        key = key >> 8
    same = pixels == key if pixels.ndim == 2 else (pixels == key).all(axis=2)
    return np.where(same, 0, 255).astype(np.uint8)


def lay_on_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    """The picture on white, grey where it was grey."""
    grey = image.mode in ("1", "L", "LA", "La")
    white = Image.new("RGB", image.size, "white")
    white.paste(image.convert("RGB"), mask=alpha)
    return white.convert("L") if grey else white


def shrink(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A smaller picture, with Lanczos also where Pillow would take the nearest pixel: palettes and single bits."""
    smooth = {"1": "L", "P": "RGB"}.get(image.mode)
    smaller = (image.convert(smooth) if smooth else image).resize(size, Image.Resampling.LANCZOS)
    smaller.info = {name: image.info[name] for name in ("icc_profile",) if image.info.get(name)}
    return smaller


def encode(image: Image.Image, source_format: str, content: bytes, reduced: bool) -> tuple[bytes, str]:
    """The picture as a file, and its format: that of its source `content`, lossless where that was.

    An AVIF does not say whether it is lossless: unless made smaller it becomes a PNG.
    """
    options = {"icc_profile": image.info["icc_profile"]} if image.info.get("icc_profile") else {}
    stream = io.BytesIO()
    kind = "JPEG" if source_format == "MPO" else "PNG" if source_format == "AVIF" and not reduced else source_format
    if kind == "PNG":
        image.save(stream, kind, **options)
    elif kind == "WEBP" and is_lossless_webp(content):
        image.save(stream, kind, lossless=True, **options)
    elif kind == "JPEG" and not reduced:
        image.save(stream, kind, quality=JPEG_QUALITY, subsampling="4:4:4", **options)
    else:
        image.save(stream, kind, quality=JPEG_QUALITY, **options)
    return stream.getvalue(), kind


def is_lossless_webp(content: bytes) -> bool:
    """Whether the first picture of a WebP is lossless. Source: the WebP container specification."""
    position = 12
    while position + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, position)
        if kind in (b"VP8L", b"VP8 "):
            return bool(kind == b"VP8L")
        # Frames of an animation hold chunks of their own after 16 bytes.
        position += 8 + (16 if kind == b"ANMF" else length + length % 2)
    return False
