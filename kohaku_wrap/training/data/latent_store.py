"""What is cached of an image folder, as a training reads it: each record found by the index, and verified.

One folder a rule: for latents the VAE, its precision, sizes, crop, and what is kept.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.sdxl import LATENT_CHANNELS, LATENT_PIXELS
from kohaku_wrap.training.data.latent_index import Index, StoreRule
from kohaku_wrap.training.data.latent_shards import (
    DTYPES,
    DamagedLatents,
    Latents,
    Shard,
    ShardShape,
    check_shard,
    read_record,
)

SHARDS_OPEN = 64
"""At once by a process; the page cache keeps what was read of the others."""

MOMENTS, SAMPLE = "moments", "sample"


class NoLatents(KwrapError):
    """What a training needs is not cached."""


@dataclass(frozen=True)
class Rule(StoreRule):
    """What decides the bits of cached latents, besides the images."""

    vae_sha256: str
    """Of the file that the VAE is read from: its own, or the base model's."""

    vae_precision: str
    """What the VAE computes in: fp32, fp16 or bf16."""

    keep: str
    """`moments`: mean and deviation, from which each step draws its own sample; `sample`: one sample an image."""

    seed: int
    """Of the samples; 0 with moments."""

    flips: bool
    """Whether each image is stored mirrored too."""

    sizes: Mapping[str, Any]
    """The options that decide buckets and sizes; the crop is always the middle."""

    interpolations: tuple[str, ...]
    """How images are resized, one a subset; empty where that follows from the direction."""

    constants: ClassVar[Mapping[str, Any]] = {"crop": "middle"}
    cell = LATENT_PIXELS
    what = "latents"

    @property
    def channels(self) -> int:
        return LATENT_CHANNELS * (2 if self.keep == MOMENTS else 1)

    @property
    def variants(self) -> int:
        return 2 if self.flips else 1


class RecordStore:
    """What is cached as a training reads it; opened anew in each loader worker."""

    def __init__(self, folder: Path, rule: StoreRule) -> None:
        """Raises BadIndex, and NoLatents where there is no index."""
        self.folder, self.rule = folder, rule
        self.index = Index.open(folder, rule)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        if not len(self.index):
            raise no_latents(folder, f"no {rule.what} are cached there")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "rule": self.rule}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # opened anew, since open files are not sent

    def require(self, ids: npt.NDArray[np.int64], check: bool = False) -> str:
        """A digest over the shards that hold these images, each by its sha256.

        With `check` a shard that changed since it was last read in full is read again. Raises NoLatents where an image
        has none or its shard is not made yet, DamagedLatents.
        """
        at = self.index.find(ids)
        if lacking := int((at < 0).sum()):
            raise no_latents(self.folder, f"{lacking:,} of {len(ids):,} images have no {self.rule.what} there")
        used = np.unique(self.index.shards[at])
        records = [(self.index.shapes[number], read_record(self.folder, self.index.shapes[number])) for number in used]
        if unmade := [shape.name for shape, record in records if record is None]:
            raise no_latents(self.folder, f"{len(unmade):,} of {len(used):,} shards are not made yet")
        for shape, _ in records if check else ():
            if fault := check_shard(self.folder, shape):
                raise DamagedLatents(shape.file_in(self.folder), fault)
        rows = [f"{shape.name} {record['sha256']}\n" for shape, record in records if record is not None]
        return hashlib.sha256("".join(rows).encode()).hexdigest()

    def read_batch(self, images: Sequence[tuple[int, bool]]) -> Latents:
        """(n, channels, height / 8, width / 8) of images of one size, each verified.

        `images`: the id of each, and whether it is mirrored. Raises NoLatents, DamagedLatents.
        """
        ids = [image_id for image_id, _ in images]
        # As `find` does; called for each batch, so that every call counts.
        at = self.index.ids.searchsorted(np.array(ids, dtype=np.int64))
        if self.index.ids.take(at, mode="clip").tolist() != ids:
            lacking = int((self.index.find(np.array(ids)) < 0).argmax())
            raise no_latents(self.folder, f"image {ids[lacking]} has no {self.rule.what} there")
        numbers, slots = self.index.shards[at].tolist(), self.index.slots[at].tolist()
        shape = self.index.shapes[numbers[0]]
        batch = np.empty((len(ids), *shape.record_shape), DTYPES[self.rule.precision][1])
        view, begin = batch.data.cast("B"), 0
        for (image_id, is_flipped), number, slot in zip(images, numbers, slots, strict=True):
            end = begin + shape.record_bytes
            self.shard(number).read_into(view[begin:end], slot, image_id, is_flipped)
            begin = end
        return batch

    def shard(self, number: int) -> Shard:
        """The shard of that number, open; those used last stay so."""
        shard = self._open.get(number)
        if shard is None:
            if len(self._open) >= SHARDS_OPEN:
                self._open.popitem(last=False)
            shard = self._open[number] = Shard(self.folder, self.index.shapes[number])
        self._open.move_to_end(number)
        return shard


class LatentStore(RecordStore):
    """Cached latents."""

    rule: Rule


def find_other_images(folder: Path, index: Index, shape: ShardShape) -> str:
    """Why a whole shard is not the one of the index, as where files of two folders were mixed; empty where it is."""
    try:
        held = np.array(Shard(folder, shape).ids)
    except DamagedLatents as damaged:
        return damaged.what
    inside = np.flatnonzero(index.shards == shape.number)
    is_same = np.array_equal(held[index.slots[inside]], index.ids[inside])
    return "" if is_same else "it holds other images than the index says"


def no_latents(folder: Path, what: str) -> NoLatents:
    return NoLatents(f"{folder}: {what}", "Make them first: kwrap cache TEMPLATE --site SITE")
