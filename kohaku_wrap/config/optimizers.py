"""Optimizers and schedules: names that the trainer knows, and arguments against the optimizer's real signature."""

from __future__ import annotations

from collections.abc import Mapping

from kohaku_wrap.config.code_names import find_known, find_unknown, is_trusted, load_signatures
from kohaku_wrap.config.effective import Effective, Faults
from kohaku_wrap.config.fates import rows_of
from kohaku_wrap.config.needs import rank
from kohaku_wrap.config.schedules import DEPENDS_ON_LENGTH
from kohaku_wrap.trainer.installed import ask_optimizer
from kohaku_wrap.trainer.options import fits, parse_argument
from kohaku_wrap.wording import suggest

ADAFACTOR = "adafactor"
OWN_ARGUMENTS = ("relative_step", "scale_parameter", "warmup_init")
"""Of Adafactor, which sd-scripts itself takes out before it makes the optimizer."""

SCHEDULERS = tuple(name for name in DEPENDS_ON_LENGTH if name != ADAFACTOR)
"""`lr_scheduler` values that sd-scripts can make; `adafactor:RATE` besides, for that optimizer alone."""

NEEDED_BY_SCHEDULE: Mapping[str, tuple[str, ...]] = {
    "cosine_with_min_lr": ("lr_scheduler_min_lr_ratio", "lr_scheduler_args.min_lr"),
    "piecewise_constant": ("lr_scheduler_args.step_rules",),
}
"""What a schedule fails without; any one of them will do."""

RATES_AND_SCHEDULE = ("unet_lr", "text_encoder_lr", "lr_scheduler", "lr_scheduler_type")
"""What Adafactor's own rates take the place of; `learning_rate` is the first of them."""

LOST_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "adamw8bit": ("amsgrad", "optim_bits"),
    "pagedadamw": ("amsgrad",),
    "pagedadamw32bit": ("amsgrad", "optim_bits"),
    "pagedadamw8bit": ("amsgrad", "optim_bits"),
    "sgdnesterov": ("dampening", "nesterov"),
    "sgdnesterov8bit": ("dampening", "nesterov"),
}
"""Arguments in an optimizer's signature that it does nothing with, or fails with as the trainer makes it."""


def find_unknown_code(effective: Effective) -> Faults:
    """Optimizers, schedules and network modules that are neither known nor trusted; nothing is imported for it."""
    yield from find_unknown(effective.values, effective.trust)


def find_optimizer_faults(effective: Effective) -> Faults:
    """Faults of the optimizer, its arguments and the schedule."""
    yield from find_schedule_faults(effective)
    chosen = effective.get("optimizer_type") or "AdamW"
    recorded = load_signatures().get(chosen.lower())
    arguments: list[str] | None = recorded["arguments"] if recorded else None
    trusted = chosen if "." in chosen and is_trusted(chosen, effective.trust) else ""
    if not arguments and (path := find_known("optimizer_type", chosen) or trusted):
        arguments = ask_optimizer(path)
    if arguments is None:
        return
    lost = LOST_ARGUMENTS.get(chosen.lower(), ())
    extra = OWN_ARGUMENTS if chosen.lower() == ADAFACTOR else ()
    allowed = [each for each in (*arguments, *extra) if each not in lost]
    for name in effective.subtable("optimizer_args"):
        if name not in allowed:
            yield f"optimizer_args.{name}", f"{chosen} takes no such argument{suggest(name, allowed)}"


def find_schedule_faults(effective: Effective) -> Faults:
    """Faults of the schedule, its arguments and its warm-up, which the trainer finds once the models are loaded."""
    warmup = effective.get("lr_warmup_steps", 0)
    chosen = effective.get("lr_scheduler", "constant")
    if sets_own_rates(effective.get("optimizer_type"), effective.subtable("optimizer_args")):
        for key in RATES_AND_SCHEDULE:
            is_same = str(effective.get(key) or "constant").partition(":")[0] in ("constant", ADAFACTOR)
            if not is_same and rank(effective, key) >= rank(effective, "optimizer_type"):
                yield (
                    key,
                    "does nothing while Adafactor sets its own rates: write relative_step = false, or leave it out",
                )
        if warmup:
            yield "lr_warmup_steps", "fails while Adafactor sets its own rates: write relative_step = false, or 0 here"
        return
    if effective.get("lr_scheduler_type"):
        if chosen != "constant" and rank(effective, "lr_scheduler") >= rank(effective, "lr_scheduler_type"):
            yield "lr_scheduler", "does nothing beside lr_scheduler_type: leave one of them out"
        elif warmup and chosen != "constant":
            yield "lr_warmup_steps", "does not go with lr_scheduler_type, which then fails: leave it out, or write 0"
        return
    name, _, rate = chosen.partition(":")
    if name == ADAFACTOR:
        if str(effective.get("optimizer_type")).lower() != ADAFACTOR:
            yield "lr_scheduler", f'"{chosen}" works only with optimizer_type = "Adafactor"'
        if not fits("float", parse_argument(rate)):
            yield "lr_scheduler", f'"{chosen}" must hold the first rate, such as "adafactor:1e-3"'
    elif chosen not in SCHEDULERS:
        yield "lr_scheduler", f'"{chosen}" is not one of {", ".join(SCHEDULERS)}{suggest(chosen, SCHEDULERS)}'
        return
    if isinstance(warmup, float) and warmup >= 1:
        yield (
            "lr_warmup_steps",
            f"{warmup} with a decimal point is a share of the run, not steps: write {int(warmup)}",
        )
    if warmup and chosen == "constant":
        yield (
            "lr_warmup_steps",
            'has no effect with lr_scheduler = "constant", which then fails: write "constant_with_warmup"',
        )
    needed = NEEDED_BY_SCHEDULE.get(chosen, ())
    if needed and all(effective.get(key) is None for key in needed):
        yield "lr_scheduler", f'"{chosen}" fails without {" or ".join(needed)}'
    known = rows_of("lr_scheduler_args")
    allowed = [name for name, fate in known.items() if any(chosen in way["lr_scheduler"] for way in fate.ways())]
    for argument in effective.subtable("lr_scheduler_args"):
        # Those that the table of fates knows are refused with what they need.
        if argument not in known:
            yield f"lr_scheduler_args.{argument}", f"{chosen} takes no such argument{suggest(argument, allowed)}"


def sets_own_rates(optimizer: object, arguments: Mapping[str, object]) -> bool:
    """Whether the trainer puts Adafactor's own rates and schedule in place of those that are asked for.

    `optimizer`: as `optimizer_type` names it; `arguments`: its `optimizer_args`.
    """
    is_relative = arguments.get("relative_step", True) or arguments.get("warmup_init")
    return str(optimizer).lower() == ADAFACTOR and bool(is_relative)
