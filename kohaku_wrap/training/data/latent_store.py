"""Cached latents of an image folder: which images lie in which shard, found by id in memory-mapped columns.

One folder a rule: the VAE, its precision, sizes, crop, and what is kept. The index is also the list of shards to make:
it is written before they are, under a lock, so that every process takes its shards from the same one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kohaku_wrap.errors import KwrapError, reason_of
from kohaku_wrap.files import atomic_write, open_regular, write_text
from kohaku_wrap.training.data.latent_shards import (
    CHANNELS,
    DTYPES,
    PIXELS_A_CELL,
    DamagedLatents,
    Latents,
    Shard,
    ShardShape,
    check_shard,
    read_record,
)

INDEX_FILE = "index.arrow"
RULE_FILE = "rule.json"
FORMAT = 1
METADATA_KEY = b"kwrap"
SHARD_IMAGES = 1000
SHARDS_OPEN = 64
"""At once by a process; the page cache keeps what was read of the others."""

MOMENTS, SAMPLE = "moments", "sample"

FIELDS = (
    pa.field("id", pa.int64(), nullable=False),
    pa.field("shard", pa.int32(), nullable=False),
    pa.field("slot", pa.int16(), nullable=False),
    pa.field("bytes", pa.int64(), nullable=False),
)
"""An image: its id, ascending, the number of its shard, its place there, and the length of its file."""


class NoLatents(KwrapError):
    """What a training needs is not cached."""


class BadIndex(KwrapError):
    """The index of cached latents cannot be read."""


@dataclass(frozen=True)
class StoreRule:
    """What decides the bits of what is stored for each image, besides the images."""

    precision: str
    """What is stored: fp16, fp32 or bf16."""

    constants: ClassVar[Mapping[str, Any]] = {}
    """What of the fingerprint every rule of its kind has."""

    cell: ClassVar[int] = 1
    """Pixels of a side behind one number."""

    what: ClassVar[str] = "outputs"
    """What is stored, in words."""

    @property
    def channels(self) -> int:
        return 1

    @property
    def variants(self) -> int:
        """Records an image."""
        return 1

    @property
    def fingerprint(self) -> str:
        """The sha256 over all of it."""
        text = json.dumps({"format": FORMAT, **self.constants, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def folder_in(self, root: Path) -> Path:
        return root / self.fingerprint[:16]

    def shape_of(self, number: int, width: int, height: int, count: int) -> ShardShape:
        """That of one shard of so many images of one size."""
        return ShardShape(number, width, height, count, self.variants, self.channels, self.precision, self.cell)


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
    cell = PIXELS_A_CELL
    what = "latents"

    @property
    def channels(self) -> int:
        return CHANNELS * (2 if self.keep == MOMENTS else 1)

    @property
    def variants(self) -> int:
        return 2 if self.flips else 1


@dataclass(frozen=True)
class Index:
    """Which image lies where; the columns are mapped, not read."""

    ids: npt.NDArray[np.int64]
    """(images,) ascending."""

    shards: npt.NDArray[np.int32]
    """(images,) the number of each image's shard."""

    slots: npt.NDArray[np.int16]
    """(images,) its place in the shard."""

    lengths: npt.NDArray[np.int64]
    """(images,) bytes of its file."""

    shapes: tuple[ShardShape, ...]
    """Every shard that is there or to be made."""

    @classmethod
    def of(cls, columns: Sequence[npt.NDArray[Any]], shapes: tuple[ShardShape, ...]) -> Self:
        """Of the columns in the order of FIELDS."""
        ids, shards, slots, lengths = columns
        return cls(ids, shards, slots, lengths, shapes)

    @classmethod
    def open(cls, folder: Path, rule: StoreRule) -> Self:
        """The index of a folder; one without images where there is none. Raises BadIndex."""
        path = folder / INDEX_FILE
        try:
            open_regular(path).close()
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            about = json.loads(table.schema.metadata[METADATA_KEY])
            if about["format"] != FORMAT or about["fingerprint"] != rule.fingerprint:
                raise ValueError(f"format {about['format']}, fingerprint {about['fingerprint'][:16]}")
            shapes = tuple(rule.shape_of(number, *row) for number, row in enumerate(about["shards"]))
            return cls.of([table[each.name].combine_chunks().to_numpy(zero_copy_only=False) for each in FIELDS], shapes)
        except FileNotFoundError:
            return cls.of([np.empty(0, each.type.to_pandas_dtype()) for each in FIELDS], ())
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise BadIndex(
                f"{path}: not an index of cached latents ({reason_of(error)})",
                f"Remove {folder} and make it again with `kwrap cache TEMPLATE --site SITE`.",
            ) from None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def columns(self) -> tuple[npt.NDArray[Any], ...]:
        """Those of FIELDS."""
        return self.ids, self.shards, self.slots, self.lengths

    def find(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(n,) the place of each image in the index; -1 for one that it lacks."""
        if not len(self):
            return np.full(len(ids), -1)
        at = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        return np.where(self.ids[at] == ids, at, -1)

    def write(self, folder: Path, rule: StoreRule) -> None:
        """Write it, whole or not at all."""
        about = {
            "format": FORMAT,
            "fingerprint": rule.fingerprint,
            "shards": [[each.width, each.height, each.count] for each in self.shapes],
        }
        schema = pa.schema(FIELDS, metadata={METADATA_KEY: json.dumps(about).encode()})
        with atomic_write(folder / INDEX_FILE, "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
            arrays = [pa.array(column, each.type) for column, each in zip(self.columns, FIELDS, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, waiting for it; free again when the process ends."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Wanted:
    """The images whose latents are wanted."""

    ids: npt.NDArray[np.int64]
    """(images,) ascending."""

    sizes: npt.NDArray[np.int32]
    """(images, 2) width and height that each is trained in."""

    lengths: npt.NDArray[np.int64]
    """(images,) bytes of each file."""

    def find_lacking(self, index: Index) -> npt.NDArray[np.int64]:
        """(n,) those that are in no shard of the index: new, of another size, or of another file by now."""
        at = index.find(self.ids)
        if not len(index):
            return np.arange(len(at))
        sizes = np.array([(each.width, each.height) for each in index.shapes])
        is_same = (index.lengths[at] == self.lengths) & (sizes[index.shards[at]] == self.sizes).all(axis=1)
        return np.flatnonzero((at < 0) | ~is_same)


def extend_index(folder: Path, rule: StoreRule, wanted: Wanted) -> Index:
    """Give every image its place in a shard: those that lack one are cut into new shards, by size and ascending id.

    What is in a shard already stays there; an image whose file changed gets a place in a new one. Several processes may
    call it at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "index.lock"):
        index = Index.open(folder, rule)
        extended = lay_out(index, rule, wanted)
        if len(extended.shapes) > len(index.shapes):
            write_text(folder / RULE_FILE, json.dumps(asdict(rule), indent=1) + "\n")
            extended.write(folder, rule)
        return extended


def lay_out(index: Index, rule: StoreRule, wanted: Wanted) -> Index:
    """The index with new shards for what it lacks; nothing is written."""
    rows = wanted.find_lacking(index)
    if not len(rows):
        return index
    shapes = list(index.shapes)
    shards, slots = np.empty(len(rows), np.int32), np.empty(len(rows), np.int16)
    sizes, own = np.unique(wanted.sizes[rows], axis=0, return_inverse=True)
    for size, (width, height) in enumerate(sizes.tolist()):
        inside = np.flatnonzero(own.ravel() == size)
        for begin in range(0, len(inside), SHARD_IMAGES):
            chosen = inside[begin : begin + SHARD_IMAGES]
            shards[chosen], slots[chosen] = len(shapes), np.arange(len(chosen))
            shapes.append(rule.shape_of(len(shapes), width, height, len(chosen)))
    ids = wanted.ids[rows]
    stays = ~np.isin(index.ids, ids)
    added = zip(index.columns, (ids, shards, slots, wanted.lengths[rows]), strict=True)
    columns = [np.concatenate([old[stays], new]) for old, new in added]
    order = np.argsort(columns[0], kind="stable")
    return Index.of([column[order] for column in columns], tuple(shapes))


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
        at = self.index.find(np.array([image_id for image_id, _ in images], dtype=np.int64))
        if (at < 0).any():
            raise no_latents(self.folder, f"image {images[int((at < 0).argmax())][0]} has no {self.rule.what} there")
        shapes = [self.index.shapes[int(self.index.shards[place])] for place in at]
        batch = np.empty((len(images), *shapes[0].record_shape), DTYPES[self.rule.precision][1])
        for out, (image_id, is_flipped), shape, place in zip(batch, images, shapes, at, strict=True):
            self.shard(shape).read_into(out, int(self.index.slots[place]), image_id, int(is_flipped))
        return batch

    def shard(self, shape: ShardShape) -> Shard:
        """The shard, open; those used last stay so."""
        if shape.number not in self._open:
            if len(self._open) >= SHARDS_OPEN:
                self._open.popitem(last=False)
            self._open[shape.number] = Shard(self.folder, shape)
        self._open.move_to_end(shape.number)
        return self._open[shape.number]


class LatentStore(RecordStore):
    """Cached latents."""

    rule: Rule


def no_latents(folder: Path, what: str) -> NoLatents:
    return NoLatents(f"{folder}: {what}", "Make them first: kwrap cache TEMPLATE --site SITE")
