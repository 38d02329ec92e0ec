"""States that plain sd-scripts wrote: their schedule counts processes times optimizer steps."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from kohaku_wrap.training.engines.schedule import write_rates
from kohaku_wrap.training.records.manifest import UnfitState


def convert_schedule(schedule: Any, optimizer_steps: int) -> int:
    """Make a schedule that counted for several processes count optimizer steps; that count.

    The optimizer's rates are set to those of the new count. Steps that a GradScaler skipped were not counted and
    stay so. Raises UnfitState for schedules that are not a function of their count.
    """
    if not isinstance(schedule, LambdaLR):
        raise UnfitState(
            f"{type(schedule).__name__}: the rates of this schedule depend on its history",
            "Only schedules of the constant, linear, cosine and polynomial kinds can be resumed with --foreign.",
        )
    counted = int(schedule.last_epoch)
    processes = max(1, -(-counted // max(optimizer_steps, 1)))
    if counted % processes:
        raise UnfitState(
            f"the schedule counted {counted:,} for {optimizer_steps:,} optimizer steps, which is not whole",
            "Check that the step given is the state's own.",
        )
    schedule.last_epoch = counted // processes
    schedule._step_count = schedule.last_epoch + 1
    write_rates(schedule)
    return int(schedule.last_epoch)
