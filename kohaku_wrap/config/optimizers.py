"""Optimizers and schedules: names that the trainer knows, and arguments against the optimizer's real signature."""

from __future__ import annotations

from collections.abc import Callable

from kohaku_wrap.config.code_names import find_known, find_unknown, is_trusted, load_signatures
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.errors import Problem
from kohaku_wrap.trainer.options import suggest

SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "piecewise_constant",
    "polynomial",
    "warmup_stable_decay",
)
"""`lr_scheduler` values that sd-scripts at 48d368f can make; `adafactor:RATE` besides."""

Signatures = Callable[[str], list[str] | None]
"""Asks for the arguments of a class `module.Class`; None where they are not known."""


def check_code(effective: Effective) -> list[Problem]:
    """Optimizers, schedules and network modules that are neither known nor trusted; nothing is imported for it."""
    return [
        Problem(option, what, effective.origin(option))
        for option, what in find_unknown(effective.values, effective.trust)
    ]


def check_optimizer(effective: Effective, ask: Signatures) -> list[Problem]:
    """Faults of the optimizer, its arguments and the schedule. `ask` reads signatures that are not recorded."""
    problems = [*check_scheduler(effective)]
    chosen = effective.get("optimizer_type") or "AdamW"
    recorded = load_signatures().get(chosen.lower())
    arguments: list[str] | None = recorded["arguments"] if recorded else None
    if not arguments and (path := find_known("optimizer_type", chosen) or trusted_path(effective, chosen)):
        arguments = ask(path)
    if arguments is None:
        return problems
    allowed = [*arguments, *extra_arguments(chosen)]
    for name in effective.subtable("optimizer_args"):
        if name not in allowed:
            key = f"optimizer_args.{name}"
            what = f"{chosen} takes no such argument{suggest(name, allowed)}"
            problems.append(Problem(key, what, effective.origin(key)))
    return problems


def trusted_path(effective: Effective, chosen: str) -> str:
    """The class as it is written, where the person trusts its module; else nothing."""
    return chosen if "." in chosen and is_trusted(chosen, effective.trust) else ""


def extra_arguments(chosen: str) -> tuple[str, ...]:
    """Arguments that sd-scripts itself takes out before it makes the optimizer."""
    return ("relative_step", "scale_parameter", "warmup_init") if chosen.lower() == "adafactor" else ()


def check_scheduler(effective: Effective) -> list[Problem]:
    """Faults of the schedule and its warm-up."""
    if effective.get("lr_scheduler_type"):
        return []
    problems = []
    chosen = effective.get("lr_scheduler", "constant")
    if chosen not in SCHEDULERS and not chosen.startswith("adafactor"):
        what = f'"{chosen}" is not one of {", ".join(SCHEDULERS)}{suggest(chosen, SCHEDULERS)}'
        problems.append(Problem("lr_scheduler", what, effective.origin("lr_scheduler")))
    warmup = effective.get("lr_warmup_steps", 0)
    layer = effective.origin("lr_warmup_steps")
    if isinstance(warmup, float) and warmup >= 1:
        what = f"{warmup} with a decimal point is a share of the run, not steps: write {int(warmup)}"
        problems.append(Problem("lr_warmup_steps", what, layer))
    if warmup and chosen == "constant":
        what = 'has no effect with lr_scheduler = "constant", which then fails: write "constant_with_warmup"'
        problems.append(Problem("lr_warmup_steps", what, layer))
    return problems
