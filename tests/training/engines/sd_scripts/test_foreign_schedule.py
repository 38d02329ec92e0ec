"""States of plain sd-scripts: their schedule counts processes times optimizer steps."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, StepLR
from transformers import get_constant_schedule_with_warmup

from kohaku_wrap.training.engines.sd_scripts.foreign import convert_schedule
from kohaku_wrap.training.records.manifest import UnfitState

WARMUP = 100


def make_schedule() -> LambdaLR:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 0.5}])
    return get_constant_schedule_with_warmup(optimizer, WARMUP)


def step_schedule(schedule: LambdaLR, count: int) -> None:
    for _ in range(count):
        schedule.optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("processes", "skipped"), [(1, 0), (4, 0), (4, 2)])
def test_a_schedule_of_several_processes_counts_optimizer_steps(processes: int, skipped: int) -> None:
    """A step that the GradScaler skipped was never counted, and stays so."""
    foreign, own = make_schedule(), make_schedule()
    step_schedule(foreign, processes * (30 - skipped))
    step_schedule(own, 30 - skipped)
    taken = make_schedule()
    taken.load_state_dict(foreign.state_dict())
    assert convert_schedule(taken, optimizer_steps=30) == 30 - skipped
    assert taken.get_last_lr() == own.get_last_lr()
    assert taken.optimizer.param_groups[0]["lr"] == own.optimizer.param_groups[0]["lr"]
    step_schedule(taken, 1)
    step_schedule(own, 1)
    assert taken.get_last_lr() == own.get_last_lr()


def test_a_schedule_with_a_history_is_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    with pytest.raises(UnfitState, match="StepLR"):
        convert_schedule(StepLR(optimizer, 10), optimizer_steps=3)


def test_a_count_that_is_not_whole_is_refused() -> None:
    schedule = make_schedule()
    step_schedule(schedule, 45)
    with pytest.raises(UnfitState, match="not whole"):
        convert_schedule(schedule, optimizer_steps=30)
