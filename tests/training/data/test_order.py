"""The order: every image once an epoch, the same on any number of processes, cut off and resumed anywhere."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kohaku_wrap.steps import BadOrder, StepCount
from kohaku_wrap.streams import draws
from kohaku_wrap.training.data.order import NO_IMAGE, BatchOrder, Entries, order_digest, order_digests

buckets = st.lists(st.integers(0, 5), min_size=1, max_size=80)


@given(buckets, st.integers(1, 5), st.integers(0, 2**40), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_image_once(
    bucket_of_image: list[int], batch_size: int, seed: int, group: int, epoch: int
) -> None:
    order = BatchOrder(bucket_of_image, batch_size, seed, group)
    laid_out = order.epoch(epoch)
    assert len(laid_out) % group == 0 and 0 <= len(laid_out) - order.batches < group
    real = [laid_out.images_at(position) for position in range(len(laid_out)) if not laid_out.is_fill(position)]
    assert sorted(np.concatenate(real).tolist()) == list(range(len(bucket_of_image)))
    for batch in real:
        assert len(batch) <= batch_size
        assert len({bucket_of_image[image] for image in batch}) == 1
    sizes = np.bincount(bucket_of_image)
    assert order.batches == int((-(-sizes // batch_size)).sum())
    table = laid_out.image_table(np.arange(len(laid_out)), batch_size)
    for position in range(len(laid_out)):
        row = table[position]
        assert row[row != NO_IMAGE].tolist() == laid_out.images_at(position).tolist()
        assert order_digests(table)[position] == order_digest(laid_out.images_at(position))


@pytest.mark.parametrize("repeats", [[1], [3], [2, 2], [1, 3], [2, 1, 4]])
@pytest.mark.parametrize("holds_out", [False, True])
def test_entries_are_every_image_then_those_trained_again(repeats: list[int], holds_out: bool) -> None:
    generator = np.random.default_rng(len(repeats))
    subsets = generator.integers(0, len(repeats), 50)
    left_out = generator.random(50) < 0.3 if holds_out else None
    of_image = [0 if left_out is not None and left_out[row] else repeats[subsets[row]] for row in range(50)]
    wanted = [(again, row) for again in range(max(repeats)) for row in range(50) if of_image[row] > again]
    entries = Entries(subsets, repeats, left_out)
    assert [entries.place_of(entry) for entry in range(len(entries))] == wanted
    assert entries.of_rows(np.arange(50)).tolist() == [row for _, row in wanted]
    drawn = generator.integers(1, 99, len(entries))
    by_place = dict(zip(wanted, drawn.tolist(), strict=True))
    assert [each.tolist() for each in entries.by_repeat(drawn)] == [
        [by_place.get((again, row), 0) for row in range(50)] for again in range(max(repeats))
    ]


@given(st.integers(1, 60), st.integers(0, 200), st.sampled_from([(8, 1), (4, 2), (2, 4), (1, 8)]))
def test_positions_do_not_depend_on_the_processes(batches: int, done: int, shape: tuple[int, int]) -> None:
    processes, accumulation = shape
    count = StepCount(batches, 8)
    assert count.accumulation(processes) == accumulation
    position = count.position_of(done, processes)
    micro_batches = count.micro_batches_per_process(processes)
    # The rule of the trainer's facts: per = ceil(L / A), epoch = N // per, micro = (N % per) * A.
    per = -(-micro_batches // accumulation)
    assert (position.epoch, position.micro_batch) == (done // per, (done % per) * accumulation)
    assert position.global_position == count.position_of(done, 1).global_position
    assert count.optimizer_step_of(position.epoch, position.global_position) == done + 1
    dealt = [rank + micro * processes for micro in range(micro_batches) for rank in range(processes)]
    assert dealt == list(range(count.positions_per_epoch))


def test_seed_and_epoch_decide_the_order() -> None:
    bucket_of_image = [image % 3 for image in range(60)]
    order = BatchOrder(bucket_of_image, 4, 1, 4)
    same = pickle.loads(pickle.dumps(order))
    assert np.array_equal(order.epoch(0).entries, same.epoch(0).entries)
    other = [BatchOrder(bucket_of_image, 4, 2, 4).epoch(0), order.epoch(1)]
    assert all(not np.array_equal(order.epoch(0).entries, each.entries) for each in other)
    wider = BatchOrder(bucket_of_image, 4, 1, 8).epoch(0)
    assert np.array_equal(wider.batch_of_position[:15], order.epoch(0).batch_of_position[:15])


def test_the_order_is_pinned() -> None:
    """A change here would make every run that is on its way unverifiable."""
    laid_out = BatchOrder([0, 0, 0, 1, 1, 0, 1], 2, 31337, 4).epoch(0)
    assert [laid_out.images_at(position).tolist() for position in range(4)] == [[5, 1], [6, 3], [0, 2], [4]]


def test_the_fills_are_pinned() -> None:
    laid_out = BatchOrder([0, 1, 2, 0, 1, 0, 0, 2, 0, 1, 0], 2, 31337, 8).epoch(7)
    images = [laid_out.images_at(position).tolist() for position in range(8)]
    assert images == [[6, 8], [3, 10], [9, 4], [2, 7], [0, 5], [1], [0, 5], [1]]
    assert [laid_out.is_fill(position) for position in range(8)] == [False] * 6 + [True] * 2


def test_fills_are_drawn_apart_from_the_batches() -> None:
    """Were they the epoch's first batches again, the same few images would be seen twice in a row every time."""
    order = BatchOrder([0] * 22, 2, 5, 8)
    alike = 0
    fills = set()
    for epoch in range(40):
        dealt = order.epoch(epoch).batch_of_position
        assert len(set(dealt[11:].tolist())) == 5
        alike += dealt[11:].tolist() == dealt[:5].tolist()
        fills |= set(dealt[11:].tolist())
    assert alike == 0 and fills == set(range(11))


def test_more_fills_than_batches_repeat_them_in_turn() -> None:
    dealt = BatchOrder([0, 0, 0, 1, 1], 2, 9, 10).epoch(0).batch_of_position.tolist()
    assert sorted(dealt[:3]) == [0, 1, 2] and dealt[3:6] == dealt[6:9] and dealt[9] == dealt[3]


def test_two_epochs_are_kept_and_no_third() -> None:
    order = BatchOrder([0, 0, 0], 1, 1, 1)
    first, second = order.epoch(0), order.epoch(1)
    assert order.epoch(0) is first and order.epoch(1) is second
    order.epoch(2)
    assert order.epoch(1) is second and order.epoch(0) is not first


@pytest.mark.slow
@pytest.mark.parametrize("buckets", [1 << 16, (1 << 16) + 9])
def test_buckets_beyond_16_bits_are_kept_apart(buckets: int) -> None:
    laid_out = BatchOrder(np.append(np.arange(buckets), [0, buckets - 1]), 2, 1, 1).epoch(0)
    assert sorted(laid_out.images_of_batch(0).tolist()) == [0, buckets]
    assert sorted(laid_out.images_of_batch(buckets - 1).tolist()) == [buckets - 1, buckets + 1]
    assert laid_out.batches == buckets


def test_digests_are_pinned() -> None:
    """Ledgers of runs on their way hold them."""
    digests = [0x9736AB912FC929C, 0x0, 0xF000FD5A76F9009, 0x2549101F5CF7831E]
    assert [order_digest(images) for images in ([5, 1], [], [0], [4_000_000_000, 7, 0])] == digests
    table = np.array([[5, 1, NO_IMAGE], [0, NO_IMAGE, NO_IMAGE], [4_000_000_000, 7, 0], [NO_IMAGE] * 3])
    assert order_digests(table).tolist() == [digests[0], digests[2], digests[3], 0]


def test_a_table_of_some_positions_is_filled_with_no_image() -> None:
    laid_out = BatchOrder([0, 0, 0, 1, 1, 0, 1], 2, 31337, 4).epoch(0)
    table = laid_out.image_table(np.array([3, 0]), 3)
    assert table.tolist() == [[4, NO_IMAGE, NO_IMAGE], [5, 1, NO_IMAGE]] and table.dtype == np.int64


def test_counts_of_one() -> None:
    count = StepCount(1, 1)
    assert (count.optimizer_steps_per_epoch, count.positions_per_epoch, count.accumulation(1)) == (1, 1, 1)
    assert StepCount(1, 4).positions_per_epoch == 4
    for batches, group in ((0, 1), (1, 0), (-1, -1)):
        with pytest.raises(BadOrder, match=f"{batches} batches in groups of {group} cannot be trained"):
            StepCount(batches, group)
    for processes in (0, -4):
        with pytest.raises(BadOrder):
            StepCount(9, 8).accumulation(processes)
    with pytest.raises(BadOrder, match="2 images in batches of 1 cannot"):
        BatchOrder([[0, 1]], 1, 1, 1)


def test_a_digest_depends_on_images_and_their_order() -> None:
    assert len({order_digest(images) for images in ([1, 2], [2, 1], [1], [1, 2, 3], [12])}) == 5


@pytest.mark.parametrize("arguments", [([], 2, 1, 1), ([0], 0, 1, 1), ([0], 1, 1, 0)])
def test_refuses_what_makes_no_order(arguments: tuple[list[int], int, int, int]) -> None:
    with pytest.raises(BadOrder):
        BatchOrder(*arguments)
    with pytest.raises(BadOrder, match=r"3 processes do not divide the 8 batches(?s:.*)may be 1, 2, 4, 8\."):
        StepCount(9, 8).accumulation(3)
    with pytest.raises(BadOrder, match=r"may be 1, 3, 9\."):
        StepCount(9, 9).accumulation(2)


@pytest.mark.slow
def test_epsilon_is_laid_out_in_seconds() -> None:
    images = 5_210_319
    bucket_of_image = (draws(7, np.arange(images)) % np.uint64(40)).astype(np.int32)
    started = time.process_time()
    order = BatchOrder(bucket_of_image, 4, 31337, 64)
    assert len(order.epoch(0)) == order.positions_per_epoch
    assert time.process_time() - started < 10
    position = order.count.position_of(13600, 4)
    assert (position.epoch, position.micro_batch) == (0, 217_600)
