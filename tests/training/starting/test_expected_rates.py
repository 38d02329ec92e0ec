"""Whose rates follow from the lock, and whose do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.lock import Lock
from kohaku_wrap.training.starting.expected_rates import NoExpectedRates, expect_rates, why_not


def lock_of(optimizer: str | None, arguments: dict[str, Any] | None = None, **values: Any) -> Lock:
    chosen = {} if optimizer is None else {"optimizer_type": optimizer}
    tables = {
        "values": {"network_module": "lycoris.kohya", **chosen, **values},
        "optimizer_args": arguments or {},
    }
    return Lock(tables, Path("run.lock.toml"))


@pytest.mark.parametrize(
    ("lock", "reason"),
    [
        (lock_of("Prodigy"), "Prodigy sets its own rate"),
        (lock_of("prodigyplus.ProdigyPlusScheduleFree"), "sets its own rate"),
        (lock_of("DAdaptLion"), "DAdaptLion sets its own rate"),
        (lock_of("DAdaptation"), "DAdaptation sets its own rate"),
        (lock_of("AdamWScheduleFree"), "AdamWScheduleFree sets its own rate"),
        (lock_of("schedulefree.RAdamScheduleFree"), "sets its own rate"),
        (lock_of("Adafactor"), "Adafactor with relative steps sets its own rate"),
        (lock_of("Adafactor", {"relative_step": True}), "with relative steps"),
        (lock_of("Adafactor", {"relative_step": False}), ""),
        (lock_of("Adafactor", {"relative_step": False, "warmup_init": True}), "with relative steps"),
        (lock_of(None), ""),
        (lock_of("Lion8bit"), ""),
        (lock_of("PagedAdamW8bit"), ""),
        (lock_of("SGDNesterov"), ""),
        (lock_of("torch.optim.AdamW"), ""),
        (lock_of("strange.Optimizer"), "strange.Optimizer may set its own rate"),
        (lock_of("Lion", lr_scheduler_type="CosineAnnealingLR"), ""),
        (lock_of("Lion", lr_scheduler_type="torch.optim.lr_scheduler.LinearLR"), ""),
        (lock_of("Lion", lr_scheduler_type="pydoc.pipepager"), "is not one of torch's"),
    ],
)
def test_where_the_optimizer_sets_its_rate_nothing_follows(lock: Lock, reason: str) -> None:
    said = why_not(lock)
    assert reason in said if reason else not said, said


def test_a_schedule_that_cannot_be_followed_says_why(new_run: Callable[..., Run]) -> None:
    run = new_run(values={"network_module": "networks.own", "optimizer_type": "Lion"})
    with pytest.raises(NoExpectedRates, match="the schedule cannot be followed here"):
        expect_rates(run, 2)
