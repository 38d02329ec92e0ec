"""How a worker saves: fingerprint from the run, room on the disk awaited, retention afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.manifest import Fingerprint
from kohaku_wrap.training.records.signs import Phase
from kohaku_wrap.training.records.states import DiskFull, is_disk_full, remove_old_states, write_state

Written = TypeVar("Written")

PAUSE_SECONDS = 10.0
"""Between two looks at a full disk."""

PATIENCE_SECONDS = 1500.0
"""How long a full disk is awaited; below the 30 minutes after which torch.distributed gives up on a rank."""


def fingerprint_of(run: Run, optimizer_step: int, processes: int) -> Fingerprint:
    """What a state of this run must say about itself after `optimizer_step` steps."""
    lock = run.lock
    position = lock.count.position_of(optimizer_step, processes)
    return Fingerprint(
        engine=lock.engine,
        data=lock.data,
        seed=lock.seed,
        group=lock.group,
        processes=processes,
        accumulation=lock.count.accumulation(processes),
        batch_size=lock.batch_per_gpu,
        batches=lock.batches,
        images=lock.images,
        dataset_digest=lock.dataset_digest,
        trainer_commit=lock.trainer_commit,
        epoch=position.epoch,
        position=position.global_position,
        micro_batch=position.micro_batch,
        run_id=lock.run_id,
        options_digest=lock.options_digest,
    )


def save_run_state(
    attempt: Attempt,
    optimizer_step: int,
    fill: Callable[[Path], None],
    *,
    scheduled: bool = True,
    extra: Mapping[str, Any] | None = None,
    expected_bytes: int = 0,
) -> Path:
    """Write a state of the attempt's run and apply retention; the state's path. Called on rank 0 alone.

    `fill` writes files into the empty folder it is given, and may be called again after a full disk. While the disk
    is full the worker pauses, says so in its heartbeat, and goes on when there is room; after PATIENCE_SECONDS, or
    when a stop is requested, DiskFull is raised. `scheduled` is False for a state that is saved because of a stop.
    """
    write = partial(
        write_state,
        attempt.run.states,
        optimizer_step,
        fill,
        fingerprint_of(attempt.run, optimizer_step, attempt.processes),
        attempt=attempt.number,
        scheduled=scheduled,
        extra=extra,
        expected_bytes=expected_bytes,
    )
    state = wait_for_room(attempt, write, optimizer_step)
    remove_old_states(attempt.run.states, attempt.lock.states_kept, attempt.lock.milestone_every)
    return state


def wait_for_room(
    attempt: Attempt,
    write: Callable[[], Written],
    optimizer_step: int,
    micro_batch: int = 0,
    phase: Phase = "saving",
    rank: int = 0,
) -> Written:
    """What `write` returns, which is called again while the disk is full; `phase` goes on after such a pause.

    Raises DiskFull after PATIENCE_SECONDS, or when a stop is requested; any other error at once.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return write()
        # torch and safetensors tell of a full disk by errors of several types.
        except Exception as error:
            if not is_disk_full(error):
                raise
            message = error.message if isinstance(error, DiskFull) else f"{attempt.run.folder}: the disk is full"
            if time.monotonic() + PAUSE_SECONDS > deadline or attempt.stop_requested():
                if isinstance(error, DiskFull):
                    raise
                raise DiskFull(message) from error
        print(f"{message}; waiting for room", flush=True)
        attempt.beat(rank, "paused", optimizer_step, micro_batch, message)
        time.sleep(PAUSE_SECONDS)
        attempt.beat(rank, phase, optimizer_step, micro_batch)
