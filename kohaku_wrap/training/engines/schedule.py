"""The schedule of a run that was made longer: which cycle it is in, and its rates before the first step."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.chapters import Cycle


def take_up_schedule(schedule: Any, fresh: dict[str, Any], attempt: Attempt) -> None:
    """Have a schedule that was just loaded from a state go on as the run's last chapter says.

    `fresh`: its own state from before it was loaded. Where a new cycle begins with this attempt, nothing of the old
    count is left. A state brings the rate that its shorter run ended with: it is computed anew, by the schedule's own
    count, before the first step.
    """
    lock = attempt.lock
    if len(lock.chapters) == 1:
        return
    cycle = lock.cycle
    if cycle.from_optimizer_step and attempt.start_optimizer_step == cycle.from_optimizer_step:
        schedule.load_state_dict(fresh)
    if isinstance(schedule, LambdaLR):
        write_rates(schedule)


def options_of_cycle(cycle: Cycle) -> dict[str, Any]:
    """The trainer's options that the schedule of a cycle is made with in place of the run's own."""
    return {"max_train_steps": cycle.optimizer_steps} | ({} if cycle.has_warmup else {"lr_warmup_steps": 0})


def write_rates(schedule: LambdaLR) -> None:
    """Give the optimizer's groups the rates at the schedule's own count."""
    rates = [
        base * function(schedule.last_epoch)
        for base, function in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
