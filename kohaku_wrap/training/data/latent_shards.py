"""A shard of cached latents: up to 1,000 images of one size in one safetensors file, with a CRC-32 a record.

The file is written whole or not at all; beside it lies a record of its sha256 and of how it was made. A shard without
that record is not made yet.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.file_hashes import sha256_of_file
from kohaku_wrap.files import atomic_write, open_regular, read_json, write_json
from kohaku_wrap.formats.safetensors import (
    MalformedFile,
    PickledFile,
    TensorSpot,
    encode_header,
    lay_out_tensors,
    read_header,
)
from kohaku_wrap.formats.sdxl import LATENT_PIXELS

DTYPES: Mapping[str, tuple[str, np.dtype[Any]]] = {
    "fp16": ("F16", np.dtype("<f2")),
    "fp32": ("F32", np.dtype("<f4")),
    "bf16": ("BF16", np.dtype("<u2")),
}
"""safetensors' and numpy's names of what may be stored; of bf16, which numpy lacks, the bits."""

Latents = npt.NDArray[Any]


class DamagedLatents(KwrapError):
    """A shard is not what was written."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(
            f"{path}: damaged: {what}",
            "`kwrap cache TEMPLATE --site SITE --check` makes such a shard again.",
        )
        self.what = what


@dataclass(frozen=True)
class ShardShape:
    """What follows from a shard's place in the index, so that its layout is known before it is opened."""

    number: int
    """Within its folder, from 0."""

    width: int
    """Of the images, in pixels."""

    height: int
    """Of the images, in pixels."""

    count: int
    """Images."""

    variants: int
    """Records an image: 2 where each is stored mirrored too."""

    channels: int
    """8 for mean and deviation, 4 for a sample."""

    precision: str
    """One of DTYPES."""

    cell: int = LATENT_PIXELS
    """Pixels of a side behind one number."""

    @property
    def name(self) -> str:
        return f"{self.number:06d}-{self.width}x{self.height}"

    @cached_property
    def record_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of one variant of an image."""
        return self.channels, self.height // self.cell, self.width // self.cell

    @cached_property
    def record_bytes(self) -> int:
        return math.prod(self.record_shape) * DTYPES[self.precision][1].itemsize

    @property
    def size_bytes(self) -> int:
        """The whole file, nearly: without its header."""
        return self.count * (self.variants * (self.record_bytes + 4) + 8)

    def lay_out(self) -> dict[str, TensorSpot]:
        """Where each tensor lies in the data."""
        dtype = DTYPES[self.precision][0]
        return lay_out_tensors(
            [
                ("ids", "I64", (self.count,)),
                ("latents", dtype, (self.count, self.variants, *self.record_shape)),
                ("crc32", "U32", (self.count, self.variants)),
            ]
        )

    def file_in(self, folder: Path) -> Path:
        return folder / f"{self.name}.safetensors"

    def record_in(self, folder: Path) -> Path:
        return folder / f"{self.name}.json"


def write_shard(
    folder: Path,
    shape: ShardShape,
    ids: npt.NDArray[np.int64],
    records: Iterable[Latents],
    fingerprint: str,
    about: dict[str, Any],
) -> None:
    """Write a shard, whole or not at all, then its record.

    `records`: (variants, channels, height / 8, width / 8) of each image, in the order of `ids`. `about`: how they
    were made.
    """
    checksums = np.zeros((shape.count, shape.variants), dtype="<u4")
    digest = hashlib.sha256()
    path = shape.file_in(folder)
    with atomic_write(path, "wb") as stream:

        def put(data: Any) -> None:
            digest.update(data)
            stream.write(data)

        put(encode_header(shape.lay_out(), {"format": "1", "fingerprint": fingerprint}))
        put(np.ascontiguousarray(ids, dtype="<i8").data)
        for slot, record in enumerate(records):
            stored = round_to(record, shape.precision)
            for variant in range(shape.variants):
                checksums[slot, variant] = zlib.crc32(stored[variant].data)
            put(stored.data)
        put(checksums.data)
    document = {"sha256": digest.hexdigest(), "checked": stamp_of(path), **about}
    write_json(shape.record_in(folder), document, 1)


def round_to(numbers: Latents, precision: str) -> Latents:
    """float32 numbers as they are stored; those for bf16 are such already, so that their lower half is empty."""
    if precision == "bf16":
        return (np.ascontiguousarray(numbers, "<f4").view("<u4") >> 16).astype("<u2")
    return np.ascontiguousarray(numbers, dtype=DTYPES[precision][1])


def stamp_of(path: Path) -> str:
    """What stays the same as long as nobody writes into a file or puts another one in its place."""
    status = path.stat()
    return f"{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}|{status.st_ino}"


def read_record(folder: Path, shape: ShardShape) -> dict[str, Any] | None:
    """How a shard was made, with its sha256; None where it is not made yet."""
    document = read_json(shape.record_in(folder))
    return document if isinstance(document.get("sha256"), str) and shape.file_in(folder).is_file() else None


def check_shard(folder: Path, shape: ShardShape, thorough: bool = False) -> str:
    """Why a shard that is made must be made again; empty where it is whole.

    By its sha256 where the file changed since it was last read in full, or where it is to be `thorough`.
    """
    record, path = read_record(folder, shape), shape.file_in(folder)
    if record is None:
        return "it is not there"
    key = stamp_of(path)
    if record.get("checked") == key and not thorough:
        return ""
    if (found := sha256_of_file(path)) != record["sha256"]:
        return f"its sha256 was {record['sha256'][:12]}…, is now {found[:12]}…"
    if record.get("checked") != key:
        write_json(shape.record_in(folder), {**record, "checked": key}, 1)
    return ""


class Shard:
    """A shard, open for reading."""

    def __init__(self, folder: Path, shape: ShardShape) -> None:
        """Raises DamagedLatents for a file of another layout, and for one that is not there."""
        self.path, self.shape = shape.file_in(folder), shape
        try:
            header = read_header(self.path)
            self._file = open_regular(self.path)
        except (OSError, ValueError, MalformedFile, PickledFile) as error:
            raise DamagedLatents(self.path, getattr(error, "message", str(error))) from None
        spots = shape.lay_out()
        if header.tensors != spots:
            raise DamagedLatents(self.path, "its header says another shape")

        place = {name: header.data_start + spot.begin for name, spot in spots.items()}
        self._latents, self._bytes, self._descriptor = place["latents"], shape.record_bytes, self._file.fileno()
        # Lists, which are looked up faster than arrays.
        self.ids = np.fromfile(self._file, "<i8", shape.count, offset=place["ids"]).tolist()
        self._file.seek(0)
        records = shape.count * shape.variants
        self._checksums = np.fromfile(self._file, "<u4", records, offset=place["crc32"]).tolist()

    def read_into(self, out: memoryview, slot: int, image_id: int, variant: int = 0) -> None:
        """Read the bytes of one record, verified by its checksum. Raises DamagedLatents."""
        at = slot * self.shape.variants + variant
        os.preadv(self._descriptor, (out,), self._latents + at * self._bytes)
        if zlib.crc32(out) != self._checksums[at] or self.ids[slot] != image_id:
            raise DamagedLatents(self.path, f"the checksum of image {image_id} does not fit its numbers")
