"""What `verify` asks of posts that are held out: that no batch of the ledger has one."""

from __future__ import annotations

import numpy as np

from kohaku_wrap.training.data.order import order_digests
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.verifying.ledger_checks import Checker, Int64Array
from kohaku_wrap.training.verifying.line_checks import Check
from kohaku_wrap.training.verifying.run_order import read_order

MOST_NAMED = 256
"""Batches with other images than they should have, in which a post that is held out is looked for."""


def check_held_out(run: Run, checker: Checker, order: Check) -> list[Check]:
    """That no post was trained whose loss is measured, nor one that is its like; nothing where none is held out.

    `order`: what the recomputed order came to. Where every batch is as it says, no such post can be in one.
    """
    held_out = run.lock.held_out
    if held_out is None:
        return []
    if not order.is_looked_at:
        return [Check("held out", False, f"not proved that none was trained: {order.detail}")]
    left_out = held_out.left_out
    if any(fault.kind == "order" for fault in checker.faults):
        before = len(checker.faults)
        checker.report(
            "held-out", find_trained(run, checker, left_out), "trained a post that is held out for validation"
        )
        some = "some were trained" if len(checker.faults) > before else "which posts some batches have is not known"
        return [Check("held out", True, some)]
    counts = f"{len(held_out.posts):,} measured, {len(held_out.relatives):,} that are their like"
    unknown = f"; of {held_out.unknown:,} posts it is not known which are their like" if held_out.unknown else ""
    return [Check("held out", True, f"none of {len(left_out):,} posts was trained: {counts}{unknown}")]


def find_trained(run: Run, checker: Checker, left_out: Int64Array) -> Int64Array:
    """The rows of records whose batch has a held-out post: in the place of one image, or as if none were held out.

    Of each epoch MOST_NAMED batches are looked at.
    """
    records = checker.records
    (order, ids), (whole, whole_ids) = read_order(run), read_order(run, with_held_out=True)
    trained = set[int]()
    for epoch in np.unique(records.epoch).tolist():
        for record in checker.match_order(order, ids, epoch)[1][:MOST_NAMED].tolist():
            batch = ids[order.epoch(epoch).images_at(int(records.position[record]))]
            if len(find_planted(batch, left_out, records.order_digest[record])):
                trained.add(record)
        for record in checker.match_order(whole, whole_ids, epoch)[0][:MOST_NAMED].tolist():
            batch = whole_ids[whole.epoch(epoch).images_at(int(records.position[record]))]
            if np.isin(batch, left_out).any():
                trained.add(record)
    return np.array(sorted(trained), dtype=np.int64)


def find_planted(batch: Int64Array, left_out: Int64Array, digest: np.uint64) -> Int64Array:
    """The posts of `left_out` that give the digest of a batch in which one of them took the place of an image."""
    found = [np.empty(0, dtype=np.int64)]
    for slot in range(len(batch)):
        table = np.tile(batch, (len(left_out), 1))
        table[:, slot] = left_out
        found.append(left_out[order_digests(table) == digest])
    return np.concatenate(found)
