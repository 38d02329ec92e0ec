"""Ledgers that no training wrote: what each rank must record, and what a test falsifies of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import toml

from kohaku_wrap.formats.held_out import HELD_OUT_FILE, HeldOut
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.training.records.attempts import Attempt, write_attempt
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import (
    FILL,
    RECORD,
    STEP,
    STEP_RECORD,
    LedgerHeader,
    Records,
    StepRecords,
    compute_checksums,
    ledger_file,
    pack_header,
)
from kohaku_wrap.training.verifying.ledger_checks import digest_blocks
from kohaku_wrap.training.verifying.run_order import read_order

Change = Callable[[Records], Records]


def expected_records(run: Run, attempt: int, rank: int, processes: int, first_step: int, last_step: int) -> Records:
    """What a rank must record for the steps from `first_step` to `last_step`, counted from 1."""
    order, ids = read_order(run)
    count, batch = run.lock.count, run.lock.batch_per_gpu
    group = count.group
    places = np.arange((first_step - 1) * group, last_step * group)
    places = places[places % count.positions_per_epoch % processes == rank]
    records = np.zeros(len(places), dtype=RECORD)
    records["attempt"], records["rank"] = attempt, rank
    records["epoch"], records["position"] = np.divmod(places, count.positions_per_epoch)
    records["optimizer_step"] = places // group + 1
    digests = [np.concatenate(list(digest_blocks(order.epoch(epoch), ids, batch))) for epoch in range(2)]
    records["order_digest"] = np.stack(digests)[records["epoch"], records["position"]]
    records["content_digest"] = places * 17
    records["learning_rate"] = 1e-4
    records["flags"] = np.where(records["position"] >= count.batches, FILL, 0)
    return records


def expected_steps(records: Records) -> StepRecords:
    """The steps that a rank must record with these micro-batches: one group, none skipped."""
    numbers, first = np.unique(records["optimizer_step"], return_index=True)
    steps = np.zeros(len(numbers), dtype=STEP_RECORD)
    for name in ("attempt", "rank", "epoch"):
        steps[name] = records[name][first]
    steps["optimizer_step"] = steps["updates"] = numbers
    steps["flags"], steps["groups"] = STEP, 1
    steps["rates"][:, 0] = 1e-4
    return steps


def write_ledger(
    run: Run,
    attempt: int,
    rank: int,
    processes: int,
    records: Records,
    change: Change | None = None,
    **header: Any,
) -> None:
    """A rank's file: each step's record, as `change` falsifies it, after the last micro-batch of the step."""
    named = {"run_id": run.lock.run_id, "options_digest": run.lock.options_digest, "is_deterministic": True, **header}
    lock = run.lock
    start = LedgerHeader(attempt, rank, processes, lock.group // processes, lock.batch_per_gpu, lock.seed, **named)
    records["checksum"] = compute_checksums(records)
    steps = expected_steps(records) if start.version > 2 else np.zeros(0, dtype=STEP_RECORD)
    steps = change(steps) if change else steps
    steps["checksum"] = compute_checksums(steps)
    last = {step: index + 1 for index, step in enumerate(records["optimizer_step"].tolist())}
    after = [last[step] for step in steps["optimizer_step"].tolist()]
    whole = np.insert(records, after, steps.view(RECORD)) if len(steps) else records
    ledger_file(run.ledger, attempt, rank).write_bytes(pack_header(start) + whole.tobytes())


def write_life(
    run: Run,
    number: int,
    processes: int,
    start: int,
    last_step: int,
    change: Change | None = None,
    change_steps: Change | None = None,
    differences: Mapping[str, str] | None = None,
    **header: Any,
) -> None:
    """One attempt from after step `start` to `last_step`.

    `change` and `change_steps` falsify rank 0's records of micro-batches and steps, `header` all ranks' headers.
    """
    shutil.rmtree(run.attempts / str(number), ignore_errors=True)
    attempt = Attempt(
        run, number, processes, run.lock.group // processes, 0, start, None, differences=differences or {}
    )
    write_attempt(attempt, {})
    for rank in range(processes):
        records = expected_records(run, number, rank, processes, start + 1, last_step)
        falsify = change_steps if rank == 0 else None
        write_ledger(
            run, number, rank, processes, change(records) if change and rank == 0 else records, falsify, **header
        )


def set_record(index: int, **values: Any) -> Change:
    def change(records: Records) -> Records:
        changed = records.copy()
        for name, value in values.items():
            changed[name][index] = value
        return changed

    return change


def set_losses(loss: float) -> Change:
    def change(records: Records) -> Records:
        records["loss"] = loss
        return records

    return change


def hold_out(run: Run, *posts: int) -> None:
    """Give a run's lock a list of held-out posts, and the plan that follows from it."""
    held_out = HeldOut(np.array(posts), np.empty(0, dtype=np.int64), {}, 0, run.lock.images)
    tables = parse_toml(run.lock_file.read_text(encoding="utf-8"))
    tables["files"] = {HELD_OUT_FILE: held_out.text()}
    tables["plan"]["batches"] = read_order(run.suppose(tables))[0].batches
    run.lock_file.write_text(toml.dumps(tables), encoding="utf-8")
    run.forget_lock()
