"""What `kwrap train --try` prints: what two steps showed, and what the whole run will need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kohaku_wrap.cli.output import print_answer
from kohaku_wrap.wording import format_duration, show_bytes

if TYPE_CHECKING:
    from kohaku_wrap.config.effective import Effective
    from kohaku_wrap.planning.training_plan import TrainingPlan
    from kohaku_wrap.proving.trial import Trial


def plan_whole(effective: Effective, trial: Trial) -> TrainingPlan:
    """The whole run at the rate of the trial."""
    from kohaku_wrap.config.training_data import read_training_sizes
    from kohaku_wrap.planning.training_plan import plan_training

    assert effective.site is not None
    sizes = read_training_sizes(effective, effective.site.paths.images)
    return plan_training(effective, sizes, trial.seconds_per_step)


def print_trial(trial: Trial, plan: TrainingPlan, next_command: str) -> None:
    """The closing table of a trial."""
    from kohaku_wrap.planning.sizes import total_of

    disk_bytes = None if plan.sizes is None else total_of(plan.sizes.disk)
    payload = {
        "trial": {
            "seconds_per_step": trial.seconds_per_step,
            "state_bytes": trial.state_bytes,
            "network_bytes": trial.network_bytes,
            "resume_is_identical": not trial.difference,
            "difference": trial.difference or None,
        },
        "optimizer_steps": plan.steps.total_optimizer_steps,
        "eta_seconds": plan.eta_seconds,
        "disk_bytes": disk_bytes,
    }
    rows: list[tuple[str, Any]] = [
        ("trained", "2 optimizer steps, a checkpoint and a state after each"),
        ("resumed from step 1", trial.difference or "the same network, bit for bit"),
        ("a step", f"{trial.seconds_per_step:.2f} s; the first ones of a run are slower than later ones"),
        ("a state, a checkpoint", f"{show_bytes(trial.state_bytes)}, {show_bytes(trial.network_bytes)}"),
        ("the whole run", f"{plan.steps.total_optimizer_steps:,} optimizer steps"),
        ("at this rate", format_duration(plan.eta_seconds or 0.0)),
        *([("disk", show_bytes(disk_bytes))] if disk_bytes is not None else []),
    ]
    print_answer("train", payload, f"Tried {plan.template}; nothing of the trial is kept", rows, next_command)
