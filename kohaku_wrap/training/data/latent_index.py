"""The index of what is cached for images: which image lies in which shard, found by id in memory-mapped columns.

It is also the list of shards to make: it is written before they are, under a lock, so that every process takes its
shards from the same one. It has a checksum, and a copy beside it for when it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kohaku_wrap.errors import KwrapError, reason_of
from kohaku_wrap.files import atomic_write, open_regular, write_json
from kohaku_wrap.formats.schema_notes import read_notes, write_notes
from kohaku_wrap.locks import locked
from kohaku_wrap.training.data.latent_shards import ShardShape

INDEX_FILE, COPY_FILE = "index.arrow", "index-copy.arrow"
RULE_FILE = "rule.json"
FORMAT = 1
SHARD_IMAGES = 1000

FIELDS = (
    pa.field("id", pa.int64(), nullable=False),
    pa.field("shard", pa.int32(), nullable=False),
    pa.field("slot", pa.int16(), nullable=False),
    pa.field("bytes", pa.int64(), nullable=False),
)
"""An image: its id, ascending, the number of its shard, its place there, and the length of its file."""


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
        """The index of a folder, or its copy where it is damaged; one without images where there is none.

        Raises BadIndex.
        """
        damage: BadIndex | None = None
        for name in (INDEX_FILE, COPY_FILE):
            try:
                return cls.read(folder / name, rule)
            except FileNotFoundError:
                continue
            except BadIndex as error:
                damage = damage or error
        if damage is not None:
            raise damage
        return cls.of([np.empty(0, each.type.to_pandas_dtype()) for each in FIELDS], ())

    @classmethod
    def read(cls, path: Path, rule: StoreRule) -> Self:
        """An index by its file. Raises FileNotFoundError, BadIndex."""
        try:
            open_regular(path).close()
            # A mapping of its own, so that what is only summed stays in no process.
            about, columns = map_columns(path)
            if "crc32" in about and about["crc32"] != checksum(columns, about):
                raise ValueError("its checksum does not fit")
            if about["format"] != FORMAT or about["fingerprint"] != rule.fingerprint:
                made = f"format {about['format']} and the fingerprint {about['fingerprint'][:16]}…"
                raise ValueError(f"it has {made}, not {FORMAT} and {rule.fingerprint[:16]}…")
            shapes = tuple(rule.shape_of(number, *row) for number, row in enumerate(about["shards"]))
            del columns
            return cls.of(map_columns(path)[1], shapes)
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise BadIndex(
                f"{path}: not an index of cached latents ({reason_of(error)})",
                f"Remove {path.parent} and make it again with `kwrap cache TEMPLATE --site SITE`.",
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
        """Write it and its copy, each whole or not at all; the copy first, so that it never has less."""
        about: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": rule.fingerprint,
            "shards": [[each.width, each.height, each.count] for each in self.shapes],
        }
        about["crc32"] = checksum(self.columns, about)
        schema = pa.schema(FIELDS, metadata=write_notes(about))
        arrays = [pa.array(column, each.type) for column, each in zip(self.columns, FIELDS, strict=True)]
        for name in (COPY_FILE, INDEX_FILE):
            with atomic_write(folder / name, "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def map_columns(path: Path) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
    """What an index says of itself, and its columns in the order of FIELDS, mapped."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    table.validate()
    # To combine chunks would copy them; there is one.
    return read_notes(table.schema), [table[each.name].chunk(0).to_numpy() for each in FIELDS]


def checksum(columns: Sequence[npt.NDArray[Any]], about: Mapping[str, Any]) -> int:
    """The CRC-32 over what an index says, without the checksum itself, and over its columns."""
    said = {name: value for name, value in about.items() if name != "crc32"}
    crc = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for column, each in zip(columns, FIELDS, strict=True):
        crc = zlib.crc32(np.ascontiguousarray(column, each.type.to_pandas_dtype()).data, crc)
    return crc


def is_whole(folder: Path, rule: StoreRule) -> bool:
    """Whether the index itself is, not only its copy; one that is not there yet is."""
    try:
        Index.read(folder / INDEX_FILE, rule)
    except FileNotFoundError:
        return not (folder / COPY_FILE).exists()
    except BadIndex:
        return False
    return True


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
        for left in folder.glob(".index*.part"):
            left.unlink(missing_ok=True)
        index = Index.open(folder, rule)
        extended = lay_out(index, rule, wanted)
        if len(extended.shapes) > len(index.shapes) or not is_whole(folder, rule):
            write_json(folder / RULE_FILE, asdict(rule), 1)
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
