"""Draws the captions of a run anew, block by block, and counts their tags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.evaluation.caption_blocks import (
    Block,
    Int64Array,
    Names,
    Tally,
    count_block,
    count_odd,
    count_stock,
    split_block,
)
from kohaku_wrap.evaluation.trained_line import Line, TrainedBatches, find_line, read_batches_of
from kohaku_wrap.files import Progress
from kohaku_wrap.metadata.parallel import map_in_order
from kohaku_wrap.training.data.images import UnreadableImage, load_pixels
from kohaku_wrap.training.data.items import BatchKey, Item, Items
from kohaku_wrap.training.data.order import NO_IMAGE
from kohaku_wrap.training.data.run_items import open_items

ROWS_A_BLOCK = 1 << 14
COLUMNS = ("images", "trained", "next_epoch", "one_more_repeat")
IMAGES, TRAINED, NEXT_EPOCH, ONE_MORE_REPEAT = range(4)
NO_SUBSET = -1
"""Of posts that are held out: they are in no epoch, and their tags count nowhere."""


@dataclass(frozen=True)
class Pass:
    """One epoch and repeat over all images."""

    epoch: int
    """Counted from 0."""

    repeat: int
    """Of each image, counted from 0."""

    weights: npt.NDArray[np.uint8]
    """(images,) how often each is trained with these draws."""

    column: int
    """In COLUMNS: what it counts to."""


class Sums:
    """Counts by tag over all blocks."""

    def __init__(self) -> None:
        self.names = Names()
        self.counts = np.zeros((len(COLUMNS), 1 << 12), dtype=np.int64)
        self.bare = Counter[int]()
        self.texts = Counter[int]()

    def add(self, places: Int64Array, tallies: Sequence[tuple[Tally, int]]) -> None:
        """Add what the passes over one block came to, each with its column; `places`: of the block."""
        for tally, column in tallies:
            odd = self.names.place(tally.odd_counts)
            while len(self.names.places) > self.counts.shape[1]:
                self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)], axis=1)
            self.counts[column, places] += tally.counts
            if tally.odd_counts:
                self.counts[column, odd] += np.array(list(tally.odd_counts.values()), dtype=np.int64)
            self.bare[column] += tally.bare
            self.texts[column] += tally.texts

    def table(self) -> pa.Table:
        """`tag` and COLUMNS, by tag."""
        counts = self.counts[:, : len(self.names.places)]
        table = pa.table({"tag": list(self.names.places), **dict(zip(COLUMNS, counts, strict=True))})
        return table.sort_by("tag")


def count_line(line: Line, threads: int, on_progress: Progress | None) -> tuple[pa.Table, dict[str, Any]]:
    """Draw every caption of a line anew, and of what trained before it, and count their tags.

    The table of `Exposure.tags` and the facts beside it. Raises LedgerDiffers, DatasetChanged, NoImages.
    """
    sums = Sums()
    items = open_items(line.run)
    batches = read_batches_of(line, items)
    next_epoch = max([*batches.positions, *(epoch for epoch, _ in batches.substituted)], default=-1) + 1
    unknown = ("batches_with_a_substitute", "batches_without_a_record", "optimizer_steps_by_another_trainer")
    facts: dict[str, Any] = {
        "images_trained": 0,
        "captions_without_tags": 0,
        "captions_with_text": 0,
        "different_tags": 0,
        "next_epoch": next_epoch,
        "unknown": dict.fromkeys(unknown, 0),
        "before": [],
    }
    later = list_later_passes(items, next_epoch)
    count_trained(line, items, batches, sums, facts, threads, on_progress, later)
    add_parents(line, sums, facts, threads)
    table = sums.table()
    facts |= {"captions_without_tags": sums.bare[TRAINED], "captions_with_text": sums.texts[TRAINED]}
    return table, {**facts, "different_tags": len(table)}


def count_trained(
    line: Line, items: Items, batches: TrainedBatches, sums: Sums, facts: dict[str, Any], threads: int,
    on_progress: Progress | None = None, later: Iterable[Pass] = (),
) -> None:  # fmt: skip
    """Add what a line trained, with its `later` passes, to the sums and the facts."""
    trained = list(list_trained_passes(items, batches))
    count_passes(items, [*trained, *later], sums, threads, on_progress)
    facts["images_trained"] += sum(int(each.weights.sum(dtype=np.int64)) for each in trained)
    facts["images_trained"] += count_substitutes(items, batches, sums)
    found = (batches.unknown_batches, batches.missing_batches, line.foreign_steps)
    for name, count in zip(facts["unknown"], found, strict=True):
        facts["unknown"][name] += count


def add_parents(line: Line, sums: Sums, facts: dict[str, Any], threads: int) -> None:
    """Add what trained before a branch: its parents as far as they are at hand; what is not known is noted."""
    origin = line.run.lock.origin
    if origin is None:
        return
    before = {"run": origin.run, "optimizer_step": origin.optimizer_step, "counted": line.parent is not None}
    facts["before"].append(before)
    if line.parent is None:
        return
    run, until = line.parent
    try:
        parent = find_line(run, until=until)
        items = open_items(run)
        batches = read_batches_of(parent, items)
    except KwrapError as error:
        before |= {"counted": False, "why": error.message}
        return
    count_trained(parent, items, batches, sums, facts, threads)
    add_parents(parent, sums, facts, threads)


def list_trained_passes(items: Items, batches: TrainedBatches) -> Iterator[Pass]:
    """How often each image was trained in each epoch and repeat, but for batches with a substitute."""
    for epoch, positions in batches.positions.items():
        order, entries = items.order.epoch(epoch), items.entries
        table = order.image_table(positions, items.order.batch_size)
        trained = np.bincount(table[table != NO_IMAGE], minlength=len(entries)).astype(np.uint8)
        for repeat, weights in enumerate(entries.by_repeat(trained)):
            if weights.any():
                yield Pass(epoch, repeat, weights, TRAINED)


def list_later_passes(items: Items, epoch: int) -> Iterator[Pass]:
    """What a whole epoch trains, and what one repeat more of every image adds to it."""
    options = (items.options, *items.options.later_subsets)
    repeats = np.array([each.num_repeats for each in options])[items.columns.subsets]
    for repeat in range(int(repeats.max()) + 1):
        for column, is_trained in ((NEXT_EPOCH, repeats > repeat), (ONE_MORE_REPEAT, repeats == repeat)):
            if is_trained.any():
                yield Pass(epoch, repeat, is_trained.astype(np.uint8), column)


def count_passes(items: Items, passes: Sequence[Pass], sums: Sums, threads: int, on_progress: Progress | None) -> None:
    """Add the counts of all passes, and how many images have each tag where the line is the run's own."""
    is_own = any(each.column == NEXT_EPOCH for each in passes)

    def count(block: Block) -> list[tuple[Tally, int]]:
        place = int(items.columns.subsets[block.rows[0]])
        found = []
        if is_own:
            odd = [items.columns.caption_of(int(row)) for row in block.rows[block.odd]]
            found.append((count_stock(block, odd, items.options.of_subset(place).captions), IMAGES))
        for each in passes:
            weights = each.weights[block.rows].astype(np.int64)
            if weights.any():
                found.append((count_block(items, block, place, each.epoch, each.repeat, weights), each.column))
        return found

    columns = items.columns

    def split_and_count(first: int) -> tuple[int, list[tuple[Int64Array, list[tuple[Tally, int]]]]]:
        last = min(first + ROWS_A_BLOCK, len(columns))
        subsets = columns.subsets[first:last]
        if items.left_out is not None:
            subsets = np.where(items.left_out[first:last], NO_SUBSET, subsets)
        captions = columns.captions.read(first, last)
        texts = columns.texts.read(first, last) if columns.texts else None
        found: list[tuple[Int64Array, list[tuple[Tally, int]]]] = []
        for place in np.unique(subsets[subsets != NO_SUBSET]).tolist():
            inside = np.flatnonzero(subsets == place)
            chosen = pa.array(inside)
            block = split_block(
                first + inside,
                captions.take(chosen),
                None if texts is None else texts.take(chosen),
                items.options.of_subset(place).captions,
                sums.names,
            )
            found.append((block.places, count(block)))
        return last, found

    for done, found in map_in_order(split_and_count, range(0, len(columns), ROWS_A_BLOCK), threads):
        for each in found:
            sums.add(*each)
        if on_progress:
            on_progress(done, len(columns))


def count_substitutes(items: Items, batches: TrainedBatches, sums: Sums) -> int:
    """Add the batches with a substitute in them; how many images those are."""

    def look(item: Item) -> None:
        load_pixels(items.columns.path_of(item.row), items.columns.size_of(item.row))

    images = 0
    tally = Tally(np.zeros(0, dtype=np.int64), {})
    for epoch, position in batches.substituted:
        order = items.order.epoch(epoch)
        key = BatchKey(epoch, position, int(order.batch_of_position[position]), order.is_fill(position))
        for slot, entry in enumerate(order.images_of_batch(key.batch_index)):
            repeat, row = items.entries.place_of(int(entry))
            drawn = items.draw_item(row, epoch, repeat)
            try:
                look(drawn)
            except UnreadableImage:
                repeat, row = 0, items.find_substitute(drawn, key, slot, look)[0].row
            count_odd(items, tally, row, epoch, repeat, 1)
            images += 1
    sums.add(np.zeros(0, dtype=np.int64), [(tally, TRAINED)])
    return images
