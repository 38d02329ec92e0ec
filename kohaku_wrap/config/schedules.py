"""Which schedules of the learning rate depend on how long a run is, and so change when it is made longer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kohaku_wrap.errors import UsageError

DEPENDS_ON_LENGTH: Mapping[str, bool] = {
    "adafactor": False,
    "constant": False,
    "constant_with_warmup": False,
    "cosine": True,
    "cosine_with_min_lr": True,
    "cosine_with_restarts": True,
    "inverse_sqrt": False,
    "linear": True,
    "piecewise_constant": False,
    "polynomial": True,
    "warmup_stable_decay": True,
}
"""By `lr_scheduler`, apart from a warm-up that is given as a share. Source: sd-scripts' `get_scheduler_fix`."""

TORCH_DEPENDS_ON_LENGTH: Mapping[str, bool] = dict.fromkeys(
    (
        "ConstantLR",
        "CosineAnnealingLR",
        "CosineAnnealingWarmRestarts",
        "CyclicLR",
        "ExponentialLR",
        "LinearLR",
        "MultiStepLR",
        "PolynomialLR",
        "StepLR",
    ),
    False,
)
"""By `lr_scheduler_type`, of torch: their arguments count steps, and the trainer passes no length."""

SHARES = ("lr_warmup_steps", "lr_decay_steps")
"""Options that are a share of the run where they are written as a fraction."""

TORCH_SCHEDULERS = "torch.optim.lr_scheduler"


class UnknownSchedule(UsageError):
    """Nobody knows what a longer run would do to this schedule."""


def list_dependent(values: Mapping[str, Any], dataset: Mapping[str, Any], own_rates: bool = False) -> Iterator[str]:
    """What of a run's options would mean another rate, or another caption, in a longer run: `lr_scheduler = "cosine"`.

    `values`: the trainer's options; `dataset`: those of its dataset file; `own_rates`: the optimizer sets the rates.
    Raises UnknownSchedule for a schedule that stands in no table.
    """
    if not own_rates:
        kind, depends = find_schedule(values)
        if depends:
            yield kind
        shares = {name: values[name] for name in SHARES if isinstance(values.get(name), float) and values[name]}
        yield from (f"{name} = {value}" for name, value in shares.items())
    for name, value in dataset.items():
        if name.rpartition(".")[2] == "token_warmup_step" and isinstance(value, float) and 0 < value < 1:
            yield f"{name} = {value}"


def find_schedule(values: Mapping[str, Any]) -> tuple[str, bool]:
    """The schedule as it is written, and whether it depends on the length. Raises UnknownSchedule."""
    if chosen := str(values.get("lr_scheduler_type") or ""):
        module, _, name = chosen.rpartition(".")
        written, depends = f'lr_scheduler_type = "{chosen}"', TORCH_DEPENDS_ON_LENGTH.get(name)
        if module not in ("", TORCH_SCHEDULERS):
            depends = None
    else:
        chosen = str(values.get("lr_scheduler") or "constant")
        written, depends = f'lr_scheduler = "{chosen}"', DEPENDS_ON_LENGTH.get(chosen.partition(":")[0])
    if depends is None:
        raise UnknownSchedule(
            f"{written}: kwrap does not know what a longer run does to this schedule",
            "Start a new run of that length, or one from this run's network: kwrap train TEMPLATE --from NETWORK",
        )
    return written, depends
