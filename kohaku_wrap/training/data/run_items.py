"""What a run's epochs are made of, opened from its lock and captions without torch."""

from __future__ import annotations

import tomllib
from typing import Any

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.training.data.items import ItemOptions, Items, read_dataset_options
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.lock import Lock


class DatasetChanged(KwrapError):
    """The dataset on disk is not the one that the run was planned for."""


def check_batches(items: Items, lock: Lock) -> None:
    """Raise DatasetChanged unless an epoch has the batches of the plan."""
    if items.order.batches != lock.batches:
        raise DatasetChanged(
            f"{items.columns.folder}: {items.order.batches:,} batches, the run was planned for {lock.batches:,}",
            "Restore the images and captions of the plan, or start a new run.",
        )


def open_items(run: Run) -> Items:
    """The captions and draws that the run trained. Raises NoImages, ProblemsFound and DatasetChanged."""
    lock, images = run.lock, run.find_images()
    columns = Columns.open(images, lock.dataset_digest)
    if columns.digest != lock.dataset_digest:
        raise DatasetChanged(
            f"{images}: other captions than those that run {run.name} was made with",
            "Restore them, or make them again with `kwrap caption`: the same rows have the same digest.",
        )
    options = ItemOptions.from_dataset_options(read_dataset_options(read_locked_dataset(run)), lock.joins_by_separator)
    items = Items(columns, options, lock.batch_per_gpu, lock.seed, lock.group, lock.held_out)
    check_batches(items, lock)
    return items


def read_locked_dataset(run: Run) -> dict[str, Any]:
    """dataset.toml as the lock keeps it; the file itself for a run of kwrap 0.1, which kept none."""
    text = run.lock.files.get(run.dataset_config.name)
    return tomllib.loads(run.dataset_config.read_text(encoding="utf-8") if text is None else text)
