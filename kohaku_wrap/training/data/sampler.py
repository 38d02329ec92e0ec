"""The order of batches for a loader: keys from the batch order, starting where an attempt resumes."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from kohaku_wrap.training.data.items import BatchKey
from kohaku_wrap.training.data.order import BatchOrder


class PositionSampler(Sampler[BatchKey]):
    """The keys of one process for one epoch after another; skipped positions are never yielded, so never loaded.

    With `processes` = 1 it yields every global position, for loaders that deal them to the ranks themselves, as
    accelerate does (rank r gets r, r + W, …). Otherwise it yields those of `rank`.
    """

    def __init__(
        self, order: BatchOrder, start_epoch: int = 0, start_position: int = 0, rank: int = 0, processes: int = 1
    ) -> None:
        """`start_position`: global batch positions already trained in `start_epoch`."""
        self.order = order
        self.start = start_epoch, start_position
        self.rank = rank
        self.processes = processes
        self.epoch = start_epoch

    def set_epoch(self, epoch: int) -> None:
        """The epoch, from 0, of the next iteration."""
        self.epoch = epoch

    @property
    def first_position(self) -> int:
        """The global position at which the epoch starts: 0 but for the epoch of the resume."""
        return self.start[1] if self.epoch == self.start[0] else 0

    def __len__(self) -> int:
        return len(range(self.first_position + self.rank, self.order.positions_per_epoch, self.processes))

    def __iter__(self) -> Iterator[BatchKey]:
        epoch, order = self.epoch, self.order.epoch(self.epoch)
        for position in range(self.first_position + self.rank, len(order), self.processes):
            batch = int(order.batch_of_position[position])
            yield BatchKey(epoch, position, batch, order.is_fill(position))
