"""The rates that a run's lock asks for, from the engine's own scheduler in a process of its own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kohaku_wrap.config.optimizers import sets_own_rates
from kohaku_wrap.config.schedules import TORCH_SCHEDULERS
from kohaku_wrap.errors import KwrapError, refusing
from kohaku_wrap.processes import NoAnswer, ask_python
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.lock import Lock
from kohaku_wrap.training.records.metrics import read_metrics

WORKER = "kohaku_wrap.training.engines.list_rates"

OWN_RATE = ("prodigy", "dadapt", "schedulefree")
"""In the name of an optimizer that finds its rate by itself."""

PLAIN = (
    "adamw",
    "adam",
    "adafactor",
    "lion",
    "sgd",
    "radam",
    "nadam",
    "adagrad",
    "rmsprop",
    "ademamix",
    "lamb",
    "lars",
)
"""How the names of optimizers begin, after `Paged`, that use the rate which the schedule gives them."""


class NoExpectedRates(KwrapError):
    """The schedule cannot be followed here; the message says why."""


def expect_rates(run: Run, groups: int) -> npt.NDArray[np.float64]:
    """(updates, groups) the rate of each group at each update, by the run's lock. Raises NoExpectedRates."""
    return np.array(ask_rates(run, groups), dtype=np.float64).reshape(-1, groups)


def preview_rates(run: Run, updates: int) -> dict[int, list[float]]:
    """The rates of some updates, counted from 1: the last one before `updates`, the next, one in the middle, the last.

    `run`: with the lock that is only supposed. Raises NoExpectedRates.
    """
    rates = ask_rates(run)
    last = len(rates)
    chosen = sorted({each for each in (updates, updates + 1, (updates + last + 1) // 2, last) if 1 <= each <= last})
    return {each: rates[each - 1] for each in chosen}


def ask_rates(run: Run, groups: int | None = None) -> list[list[float]]:
    """(updates, groups) from the worker; as many groups as the metrics name, unless told. Raises NoExpectedRates."""
    if reason := why_not(run.lock):
        raise NoExpectedRates(reason)
    names = [name for name in (read_metrics(run) or [{}])[-1] if name.startswith("lr_")]
    groups = max(len(names), 1) if groups is None else groups
    chapters = [chapter.document() for chapter in run.lock.chapters]
    with refusing(NoExpectedRates, "the schedule cannot be followed here:", "", NoAnswer):
        rates: list[list[float]] = ask_python(
            WORKER,
            run.folder,
            request={"groups": groups, "names": names, "chapters": chapters},
            added={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            folder=run.folder,
        )
    return rates


def why_not(lock: Lock) -> str:
    """Why the rates do not follow from the lock; empty where they do."""
    values = lock.values
    if not values.get("network_module"):
        return "the run's lock names no network"
    chosen = str(values.get("optimizer_type") or "AdamW")
    name = chosen.rpartition(".")[2].lower().removeprefix("paged")
    if any(word in name for word in OWN_RATE):
        return f"{chosen} sets its own rate"
    if sets_own_rates(name, lock.table("optimizer_args")):
        return f"{chosen} with relative steps sets its own rate"
    if not name.startswith(PLAIN):
        return f"{chosen} may set its own rate"
    scheduler = str(values.get("lr_scheduler_type") or "")
    if "." in scheduler and scheduler.rpartition(".")[0] != TORCH_SCHEDULERS:
        return f"the schedule {scheduler} is not one of torch's or the trainer's own"
    return ""
