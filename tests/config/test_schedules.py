"""Which schedules depend on the length of a run: the table against what the packages really do."""

from __future__ import annotations

from typing import Any

import pytest

from kohaku_wrap.config.optimizers import SCHEDULERS
from kohaku_wrap.config.schedules import (
    DEPENDS_ON_LENGTH,
    TORCH_DEPENDS_ON_LENGTH,
    UnknownSchedule,
    find_schedule,
    list_dependent,
)

LENGTHS = (12, 20)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "inverse_sqrt": {"timescale": 10},
    "piecewise_constant": {"step_rules": "1:4,0.1:8,0.01"},
    "warmup_stable_decay": {"num_decay_steps": 3, "min_lr_ratio": 0.0},
}


def list_rates(name: str, steps: int) -> list[float]:
    """The rates of the first updates of a run of so many steps, made as sd-scripts makes them."""
    import torch
    from diffusers.optimization import get_piecewise_constant_schedule
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    arguments = dict(ARGUMENTS.get(name, {}))
    if name == "piecewise_constant":
        schedule: Any = get_piecewise_constant_schedule(optimizer, **arguments)
    else:
        if name != "constant":
            arguments["num_warmup_steps"] = 2
        if name == "warmup_stable_decay":
            arguments["num_stable_steps"] = steps - 2 - 3
        elif DEPENDS_ON_LENGTH[name]:
            arguments["num_training_steps"] = steps
        schedule = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)](optimizer, **arguments)
    rates = []
    for _ in range(min(LENGTHS)):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.torch
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_table_says_what_the_schedules_do(name: str) -> None:
    shorter, longer = (list_rates(name, steps) for steps in LENGTHS)
    assert (shorter != longer) == DEPENDS_ON_LENGTH[name]


@pytest.mark.torch
def test_every_schedule_of_torch_in_the_table_exists() -> None:
    from torch.optim import lr_scheduler

    assert all(hasattr(lr_scheduler, name) for name in TORCH_DEPENDS_ON_LENGTH)


@pytest.mark.parametrize(
    ("values", "dataset", "found"),
    [
        ({}, {}, []),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 100}, {}, []),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0.1}, {}, ["lr_warmup_steps = 0.1"]),
        ({"lr_scheduler": "cosine"}, {}, ['lr_scheduler = "cosine"']),
        ({"lr_scheduler": "adafactor:1e-3"}, {}, []),
        ({"lr_scheduler": "cosine", "lr_scheduler_type": "StepLR"}, {}, []),
        ({"lr_scheduler_type": "torch.optim.lr_scheduler.CosineAnnealingLR"}, {}, []),
        ({}, {"datasets.0.subsets.1.token_warmup_step": 0.5}, ["datasets.0.subsets.1.token_warmup_step = 0.5"]),
        ({}, {"token_warmup_step": 20}, []),
        ({}, {"token_warmup_step": 1.0}, []),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 5, "lr_decay_steps": 0.25},
            {},
            ['lr_scheduler = "warmup_stable_decay"', "lr_decay_steps = 0.25"],
        ),
    ],
)
def test_what_depends_is_named_as_it_is_written(
    values: dict[str, Any], dataset: dict[str, Any], found: list[str]
) -> None:
    assert list(list_dependent(values, dataset)) == found


def test_an_optimizer_with_its_own_rates_has_no_schedule() -> None:
    assert list(list_dependent({"lr_scheduler": "cosine"}, {}, own_rates=True)) == []


@pytest.mark.parametrize(
    "values",
    [{"lr_scheduler": "sawtooth"}, {"lr_scheduler_type": "OneCycleLR"}, {"lr_scheduler_type": "my.module.Own"}],
)
def test_an_unknown_schedule_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UnknownSchedule, match="does not know what a longer run does"):
        find_schedule(values)
