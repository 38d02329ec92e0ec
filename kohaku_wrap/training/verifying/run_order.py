"""The order of a run's batches, from its lock and captions alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.formats.caption_columns import subset_column
from kohaku_wrap.formats.caption_rows import open_captions
from kohaku_wrap.training.data.order import BatchOrder, Entries
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.verifying.ledger_checks import Int64Array


def read_order(run: Run, with_held_out: bool = False) -> tuple[BatchOrder, Int64Array]:
    """The order that the run's seed and dataset make, and the post id of each of its entries.

    `with_held_out`: as if no post were held out.
    """
    lock = run.lock
    options: Mapping[str, object] = lock.table("dataset")
    table = open_captions(run.find_images(), lock.dataset_digest).read_all()
    buckets = assign_buckets(
        table["width"].to_numpy(), table["height"].to_numpy(), BucketOptions.from_dataset_options(options)
    )
    subsets = lock.subsets or [dict(options)]
    ids = table["id"].to_numpy().astype(np.int64)
    left_out = lock.held_out.mark(ids) if lock.held_out and not with_held_out else None
    entries = Entries(subset_column(table), [int(each.get("num_repeats") or 1) for each in subsets], left_out)
    order = BatchOrder(entries.of_rows(buckets.bucket_of_image), lock.batch_per_gpu, lock.seed, lock.group)
    return order, entries.of_rows(ids)
