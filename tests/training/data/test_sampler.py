"""The sampler: the keys of one process, in order, from where an attempt starts."""

from __future__ import annotations

import pytest

from kohaku_wrap.training.data.order import BatchOrder
from kohaku_wrap.training.data.sampler import PositionSampler

ORDER = BatchOrder([0] * 13 + [1] * 9, 2, 3, 4)
"""Twelve batches of two buckets, so twelve positions."""

FILLED = BatchOrder([0] * 13 + [1] * 10, 2, 3, 8)
"""Twelve batches, and four fills to 16 positions."""


def positions(sampler: PositionSampler) -> list[int]:
    return [key.position for key in sampler]


def test_one_process_gets_every_position() -> None:
    sampler = PositionSampler(ORDER)
    assert positions(sampler) == list(range(12)) and len(sampler) == 12
    assert (sampler.rank, sampler.processes, sampler.epoch) == (0, 1, 0)


@pytest.mark.parametrize(
    ("processes", "start"), [*((each, start) for each in (1, 2, 4) for start in (0, 4, 8)), (3, 3), (3, 9)]
)
def test_the_ranks_share_the_positions_in_turn(processes: int, start: int) -> None:
    samplers = [PositionSampler(FILLED, 1, start, rank, processes) for rank in range(processes)]
    for rank, sampler in enumerate(samplers):
        assert positions(sampler) == list(range(start + rank, 16, processes))
        assert len(sampler) == len(positions(sampler))


def test_keys_hold_epoch_batch_and_fill() -> None:
    sampler = PositionSampler(FILLED, 2)
    laid_out = FILLED.epoch(2)
    keys = list(sampler)
    assert [key.epoch for key in keys] == [2] * 16
    assert [key.batch_index for key in keys] == laid_out.batch_of_position.tolist()
    assert [key.is_fill for key in keys] == [False] * 12 + [True] * 4


def test_only_the_epoch_of_the_resume_starts_in_the_middle() -> None:
    sampler = PositionSampler(ORDER, 3, 5)
    assert sampler.epoch == 3
    late = PositionSampler(ORDER, 300, 5)
    late.set_epoch(int("300"))
    assert late.first_position == 5
    for epoch, first in ((3, 5), (4, 0), (2, 0), (300, 0), (3, 5)):
        sampler.set_epoch(epoch)
        assert sampler.first_position == first
        assert positions(sampler) == list(range(first, 12)) and len(sampler) == 12 - first
        assert [key.batch_index for key in sampler] == ORDER.epoch(epoch).batch_of_position[first:].tolist()
