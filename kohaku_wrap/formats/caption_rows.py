"""captions.arrow: the images of a folder with their sizes and captions, as `kwrap caption` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.errors import KwrapError

CAPTIONS_FILE = "captions.arrow"
"""The images and captions of a folder, written by `kwrap caption`."""


class NoImages(KwrapError):
    """There is nothing to count: no images, or no file that lists them."""


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


def read_captions_metadata(images: Path) -> Mapping[str, Any]:
    """What `kwrap caption` wrote about the folder: digest, count, dataset, style, selection. Raises NoImages."""
    return dict(json.loads((open_captions(images).schema.metadata or {}).get(b"kwrap", b"{}")))


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
