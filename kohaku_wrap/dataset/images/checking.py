"""Is a file a whole still image, how large is it really, and does it have to be written anew for training."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, UnidentifiedImageError

from kohaku_wrap.dataset.images.appearance import encode, show_plainly, shrink
from kohaku_wrap.dataset.images.jpeg_rows import lacks_rows
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.disguises import START_BYTES, name_disguise

EXTENSIONS_OF_FORMAT = {
    "JPEG": ("jpg", "jpeg"),
    "MPO": ("jpg", "jpeg"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "AVIF": ("avif",),
    "BMP": ("bmp",),
}
"""Pillow's names of the formats that are taken."""

READ_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
"""What Pillow may try: few plugins, so that a hostile file cannot reach the rare ones. MPO comes through JPEG."""

LARGEST_IMAGE_PIXELS = 178_956_970
"""Pillow's own bound beyond which it calls an image a decompression bomb."""

LARGEST_FILE_BYTES = 1 << 29
"""No honest image of that many pixels is larger."""

PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Left, top and the steps across and down of each pass of an interlaced PNG."""

PNG_PIECE_BYTES = 1 << 22


class ImageRefused(KwrapError):
    """A file that is not a whole still image."""


@dataclass(frozen=True)
class CheckedImage:
    """An image that was decoded to its last pixel."""

    content: bytes
    """The file to write: as it came, or made anew."""

    extension: str
    """Of the name that it came by where that fits the format, otherwise the format's own."""

    width: int
    """Real width of `content` in pixels, as the trainer will see it."""

    height: int
    """Real height of `content` in pixels."""

    reduced: bool
    """True for a smaller copy."""

    rewritten: bool
    """True where the file as it came would have been trained turned, transparent or white; see `appearance`."""

    likeness: int = 0
    """Where asked for: 64 bits that hardly change when the picture is resized or compressed anew."""


def check_image(
    content: bytes,
    extension: str,
    max_pixels: int = 0,
    known_size: tuple[int, int] | None = None,
    with_likeness: bool = False,
) -> CheckedImage:
    """Decode `content` and say what it is; above `max_pixels` (0: no limit) a smaller copy takes its place.

    `extension`: of the name that it came by. `known_size`: width and height of the original, where the database
    says them; a JPEG of just that size is not asked whether it has all its rows.
    Raises ImageRefused with the reason.
    """
    if len(content) > LARGEST_FILE_BYTES:
        raise ImageRefused(f"{len(content):,} bytes are more than any image here")
    try:
        with warnings.catch_warnings():
            # Pillow's bound is checked below; its warnings about odd metadata change nothing.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=READ_FORMATS) as image:
                checked = check_opened(image, content, extension, max_pixels, known_size)
                return replace(checked, likeness=measure_likeness(image)) if with_likeness else checked
    except UnidentifiedImageError as error:
        # Pillow's own words hold an address, another one in each run.
        disguise = name_disguise(content[:START_BYTES]).partition(";")[0]
        raise ImageRefused(f"is {disguise or 'no image of a format that is read'}") from error
    except MemoryError as error:
        # Where there is room for the largest of images it is the file that asks for too much; else nothing can be said.
        bytearray(4 * LARGEST_IMAGE_PIXELS)
        raise ImageRefused("does not decode: asks for more memory than an image takes") from error
    except KwrapError:
        raise
    except Exception as error:  # Pillow's plugins raise classes of every kind on broken files
        raise ImageRefused(f"does not decode: {error or type(error).__name__}") from error


def check_opened(
    image: Image.Image, content: bytes, extension: str, max_pixels: int, known_size: tuple[int, int] | None
) -> CheckedImage:
    """Check an image whose header was read; raises ImageRefused, or whatever Pillow does."""
    if image.format not in EXTENSIONS_OF_FORMAT:
        raise ImageRefused(f"is a {image.format} under the name of a {extension}")
    width, height = image.size
    if width * height > LARGEST_IMAGE_PIXELS:
        raise ImageRefused(f"{width}x{height} is a decompression bomb or too large to train on")
    image.load()
    if (image.width, image.height) != (width, height):
        raise ImageRefused(f"says {width}x{height} and is {image.width}x{image.height}")
    if image.format == "PNG":
        check_png_rows(content)
    elif image.format in ("JPEG", "MPO") and known_size != (width, height) and lacks_rows(image, content):
        raise ImageRefused(f"says {width}x{height} and has fewer rows")
    plain = show_plainly(image, content)
    reduced = bool(max_pixels) and width * height > max_pixels
    if plain is None and not reduced:
        return CheckedImage(content, fit_extension(extension, image.format), width, height, False, False)
    shown = plain or image
    if reduced:
        scale = math.sqrt(max_pixels / (width * height))
        shown = shrink(shown, (max(int(shown.width * scale), 1), max(int(shown.height * scale), 1)))
    made, made_format = encode(shown, image.format, content, reduced)
    return CheckedImage(made, fit_extension(extension, made_format), *shown.size, reduced, rewritten=plain is not None)


def measure_likeness(image: Image.Image) -> int:
    """The 64 bits of the difference hash: is each of 8 x 8 cells darker than its right neighbour.

    A cell is the mean of 32 x 32 pixels spread over it: to read every pixel takes a third of the time of decoding.
    """
    # Converted to its own mode, an image is copied, which takes longer than decoding it.
    colour = image if image.mode == "RGB" else image.convert("RGB")
    spread = colour.resize((9 * 32, 8 * 32), Image.Resampling.NEAREST)
    cells = np.asarray(spread.resize((9, 8), Image.Resampling.BOX).convert("L"), dtype=np.int16)
    return int.from_bytes(np.packbits(cells[:, :-1] < cells[:, 1:]).tobytes(), "big")


def fit_extension(extension: str, image_format: str) -> str:
    """The extension itself where files of the format are called so, otherwise the format's own."""
    extensions = EXTENSIONS_OF_FORMAT[image_format]
    return extension if extension in extensions else extensions[0]


def check_png_rows(content: bytes) -> None:
    """Compare the pixel data of a PNG with the size in its header: Pillow takes too few and too many in silence.

    Raises ImageRefused, or zlib.error for broken data.
    Source: PNG specification, sections 7 to 10.
    """
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    bits = depth * PNG_CHANNELS[colour]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    expected = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            expected += rows * (1 + -(-columns * bits // 8))
    # libpng forgives a few bytes too many, as some old programs wrote them.
    too_many = expected + 1 + -(-width * bits // 8)
    inflater = zlib.decompressobj()
    found = 0
    position = 8
    while position + 12 <= len(content) and found < too_many:
        length, kind = struct.unpack_from(">I4s", content, position)
        if kind == b"IDAT":
            piece = content[position + 8 : position + 8 + length]
            more = True
            while more and found < too_many:
                inflated = inflater.decompress(piece, PNG_PIECE_BYTES)
                found += len(inflated)
                piece = inflater.unconsumed_tail
                more = bool(piece) or len(inflated) == PNG_PIECE_BYTES
        position += 12 + length
    if found < expected or found >= too_many:
        raise ImageRefused(f"says {width}x{height} and holds {'fewer' if found < expected else 'more'} pixels")
