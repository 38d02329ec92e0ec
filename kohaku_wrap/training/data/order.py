"""Which images each global batch position of an epoch holds: a function of the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kohaku_wrap.steps import BadOrder, StepCount
from kohaku_wrap.streams import draws, permutation, stream_key

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
UInt64Array = npt.NDArray[np.uint64]
T = TypeVar("T", bound=np.generic)

EPOCHS_KEPT = 2
"""Orders held in memory: an epoch's last batches are still loading when the next one's are dealt."""

NO_IMAGE = -1
"""Fills the rows of short batches in tables of images."""


class Entries:
    """What an epoch trains: each image as often as its subset is repeated.

    First every image, then in the same order those that are trained a second time, and so on.
    """

    def __init__(
        self,
        subset_of_image: npt.NDArray[np.integer],
        repeats_of_subset: Sequence[int],
        left_out: BoolArray | None = None,
    ) -> None:
        """`subset_of_image`: (images,) places in `repeats_of_subset`. `left_out`: (images,) those of no epoch."""
        self.images = len(subset_of_image)
        repeats = np.asarray(repeats_of_subset)
        self._rows = None
        if len(set(repeats_of_subset)) == 1 and left_out is None:
            self._counts = np.full(int(repeats[0]), self.images)
        else:
            of_image = repeats[subset_of_image]
            if left_out is not None:
                of_image = np.where(left_out, 0, of_image)
            rows = [np.flatnonzero(of_image > repeat).astype(np.int32) for repeat in range(int(repeats.max()))]
            self._counts = np.array([len(each) for each in rows])
            self._rows = np.concatenate(rows)
        self._starts = np.cumsum(self._counts) - self._counts

    def __len__(self) -> int:
        return int(self._counts.sum())

    def of_rows(self, column: npt.NDArray[T]) -> npt.NDArray[T]:
        """(entries,) the values of a column of (images,)."""
        return np.tile(column, len(self._counts)) if self._rows is None else column[self._rows]

    def by_repeat(self, column: npt.NDArray[T]) -> list[npt.NDArray[T]]:
        """(images,) for each repeat the values of a column of (entries,); 0 for images that it leaves out."""
        parts = [column[start : start + size] for start, size in zip(self._starts, self._counts, strict=True)]
        if self._rows is None:
            return parts
        whole = [np.zeros(self.images, dtype=column.dtype) for _ in parts]
        for values, part, start in zip(whole, parts, self._starts, strict=True):
            values[self._rows[start : start + len(part)]] = part
        return whole

    def place_of(self, entry: int) -> tuple[int, int]:
        """Which repeat an entry is, from 0, and its image."""
        repeat = int(np.searchsorted(self._starts, entry, side="right")) - 1
        return repeat, entry - int(self._starts[repeat]) if self._rows is None else int(self._rows[entry])


@dataclass(frozen=True)
class EpochOrder:
    """One epoch, laid out: entries in batches, batches at positions."""

    epoch: int
    """Counted from 0."""

    entries: Int32Array
    """(entries,) indices into the dataset, batch after batch."""

    batch_starts: Int64Array
    """(batches + 1,) where each batch begins in `entries`."""

    batch_of_position: Int32Array
    """(positions,) the batch at each global position; fills last."""

    def __len__(self) -> int:
        return len(self.batch_of_position)

    @property
    def batches(self) -> int:
        return len(self.batch_starts) - 1

    def is_fill(self, position: int) -> bool:
        """Whether the position repeats a batch only to complete the epoch's last optimizer step."""
        return position >= self.batches

    def images_of_batch(self, batch: int) -> Int32Array:
        """(n,) the dataset indices of a batch; all of one bucket."""
        return self.entries[self.batch_starts[batch] : self.batch_starts[batch + 1]]

    def images_at(self, position: int) -> Int32Array:
        """(n,) the dataset indices at a global position."""
        return self.images_of_batch(int(self.batch_of_position[position]))

    def image_table(self, positions: Int64Array, batch_size: int) -> Int64Array:
        """(positions, batch_size) the dataset indices at many positions, short batches filled with NO_IMAGE."""
        batches = self.batch_of_position[positions]
        starts = self.batch_starts[batches]
        sizes = self.batch_starts[batches + 1] - starts
        slots = np.arange(batch_size)
        inside = slots < sizes[:, None]
        index = np.where(inside, starts[:, None] + slots, 0)
        return np.where(inside, self.entries[index], NO_IMAGE).astype(np.int64)


class BatchOrder:
    """The order of all epochs of a run.

    In each epoch the images are permuted inside their buckets and cut into batches (the last of a bucket may be
    short, as in sd-scripts), and the batches are permuted. The positions up to a multiple of `group` are filled
    from a second permutation, so that every optimizer step is whole on any number of processes.
    """

    def __init__(self, bucket_of_image: npt.ArrayLike, batch_size: int, seed: int, group: int) -> None:
        """`bucket_of_image`: (entries,) integers from 0; an image repeated n times stands there n times."""
        buckets = np.asarray(bucket_of_image, dtype=np.int32)
        if buckets.ndim != 1 or not len(buckets) or batch_size < 1:
            raise BadOrder(
                f"{buckets.size} images in batches of {batch_size} cannot be ordered",
                "Check that the dataset holds images and that batch_per_gpu is at least 1.",
            )
        sizes = np.bincount(buckets)
        # Numpy sorts 16-bit integers by radix, which is ten times faster than its sort of wider ones.
        narrow = buckets.astype(np.uint16) if len(sizes) <= 1 << 16 else buckets
        self._by_bucket = np.argsort(narrow, kind="stable").astype(np.int32)
        self._bucket_edges = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.batch_size = batch_size
        self.seed = seed
        starts = [
            np.arange(begin, end, batch_size, dtype=np.int64)
            for begin, end in zip(self._bucket_edges[:-1], self._bucket_edges[1:], strict=True)
            if end > begin
        ]
        self._batch_starts = np.concatenate([*starts, self._bucket_edges[-1:]])
        self.count = StepCount(batches=len(self._batch_starts) - 1, group=group)
        self._keep_epoch = lru_cache(maxsize=EPOCHS_KEPT)(self._lay_out_epoch)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_keep_epoch"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._keep_epoch = lru_cache(maxsize=EPOCHS_KEPT)(self._lay_out_epoch)

    @property
    def batches(self) -> int:
        return self.count.batches

    @property
    def positions_per_epoch(self) -> int:
        return self.count.positions_per_epoch

    def epoch(self, epoch: int) -> EpochOrder:
        """The order of one epoch, kept while it is in use."""
        return self._keep_epoch(epoch)

    def _lay_out_epoch(self, epoch: int) -> EpochOrder:
        entries = np.empty_like(self._by_bucket)
        key = stream_key("images", self.seed, epoch)
        for begin, end in zip(self._bucket_edges[:-1], self._bucket_edges[1:], strict=True):
            inside = self._by_bucket[begin:end]
            entries[begin:end] = inside[np.argsort(draws(key, inside), kind="stable")]
        order = np.empty(self.positions_per_epoch, dtype=np.int32)
        order[: self.batches] = permutation(stream_key("batches", self.seed, epoch), self.batches)
        fills = len(order) - self.batches
        if fills:
            order[self.batches :] = np.resize(permutation(stream_key("pad", self.seed, epoch), self.batches), fills)
        return EpochOrder(epoch=epoch, entries=entries, batch_starts=self._batch_starts, batch_of_position=order)


ORDER_DIGEST_KEY = stream_key("order-digest")


def order_digests(image_ids: npt.NDArray[np.integer]) -> UInt64Array:
    """(n,) one 64-bit digest a row of `image_ids`, (n, batch) with NO_IMAGE in unused slots; order matters."""
    table = np.atleast_2d(np.asarray(image_ids)).astype(np.int64)
    digest = np.zeros(len(table), dtype=np.uint64)
    for slot in range(table.shape[1]):
        used = table[:, slot] != NO_IMAGE
        mixed = draws(ORDER_DIGEST_KEY, digest ^ table[:, slot].astype(np.uint64))
        digest = np.where(used, mixed, digest)
    return digest


def order_digest(image_ids: npt.ArrayLike) -> int:
    """The digest of one batch, as the ledger records it; `image_ids` in the order of the batch."""
    return int(order_digests(np.atleast_2d(np.asarray(image_ids, dtype=np.int64)))[0])
