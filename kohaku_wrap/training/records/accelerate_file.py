"""accelerate's own file of a run, for the processes and machines of an attempt."""

from __future__ import annotations

from typing import Any

from kohaku_wrap.config.run_files import ACCELERATE_FILE, read_yaml
from kohaku_wrap.config.trainer_arguments import MACHINES_IN_FILE, describe_accelerate, render_yaml
from kohaku_wrap.files import write_text
from kohaku_wrap.training.records.attempts import Attempt

BY_LAUNCH = frozenset(
    {"distributed_type", "gpu_ids", "machine_rank", "num_processes", "num_machines", *MACHINES_IN_FILE}
)
"""Options of accelerate's file that follow from an attempt's processes and machines."""


def describe_attempt_accelerate(attempt: Attempt) -> dict[str, Any]:
    """accelerate's options for an attempt: those of the run as they were written, and its own processes."""
    lock = attempt.lock
    gpus = 0 if lock.is_on_cpu else attempt.processes
    machines = {**lock.accelerate, **attempt.address} if attempt.machines > 1 else {}
    precision = str(lock.values.get("mixed_precision", "no"))
    table = describe_accelerate(attempt.processes, gpus, precision, machines=machines)
    if written := lock.files.get(ACCELERATE_FILE):
        # Never what a later kwrap would write.
        kept = {name: value for name, value in read_yaml(written).items() if name not in BY_LAUNCH}
        table = kept | {name: value for name, value in table.items() if name in BY_LAUNCH}
    return table


def write_accelerate_config(attempt: Attempt) -> None:
    """The run's own file for accelerate, for the attempt's processes; the user's default file then has no say."""
    write_text(attempt.run.accelerate_config, render_yaml(describe_attempt_accelerate(attempt)))
