"""How an attempt is started: the command and its environment, decided before anything runs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.config.kernels import dropped_variables, kernel_settings
from kohaku_wrap.config.run_files import ACCELERATE_FILE, DATASET_FILE, TRAINER_FILE
from kohaku_wrap.files import expand_user
from kohaku_wrap.processes import accelerate_command, asked_threads, count_cores, safe_settings
from kohaku_wrap.trainer.engines import find_engine
from kohaku_wrap.training.records.attempts import ATTEMPT_VARIABLE, MACHINE_VARIABLE, RUN_VARIABLE, Attempt
from kohaku_wrap.training.starting.machines import ONE_MACHINE, Machines

FOLDERS = ("KWRAP_SD_SCRIPTS", "KWRAP_HOME")
"""Variables of the caller that name folders, maybe relative to where the caller stands."""

SHUTDOWN_TIMEOUT_SECONDS = 7200
"""torchrun kills its workers 30 s after a signal by itself; an optimizer step and a state take longer."""

MOST_THREADS = 8


@dataclass(frozen=True)
class Launch:
    """What is started, ready to run or to paste."""

    argv: tuple[str, ...]
    """The command."""

    environment: Mapping[str, str]
    """What kwrap sets beside the caller's own variables."""

    folder: Path
    """The working directory: the run's own, where no package lies that could shadow another."""

    dropped: frozenset[str] = frozenset()
    """Variables of the caller that it does not get, besides accelerate's own."""

    def full_environment(self) -> dict[str, str]:
        """The caller's variables as far as they have a say, and those of the attempt over them.

        accelerate's are left out: they would win over the run's own file, in silence.
        """
        callers = {
            name: value
            for name, value in os.environ.items()
            if name not in self.dropped and not name.startswith("ACCELERATE_")
        }
        return {**callers, **self.environment}

    def text(self) -> str:
        """One line for a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if dropped := sorted(self.dropped & os.environ.keys()):
            settings = ["env", *(f"-u {name}" for name in dropped), *settings]
        return f"cd {shlex.quote(str(self.folder))} && {' '.join(settings)} {shlex.join(self.argv)}"


def plan_launch(
    run_folder: Path,
    engine: str,
    attempt_number: int,
    processes: int,
    accumulation: int,
    on_cpu: bool,
    threads: int | None = None,
    machines: Machines = ONE_MACHINE,
    kernels: Mapping[str, Any] | None = None,
) -> Launch:
    """The command of one attempt; nothing is looked up or written. `kernels`: the table of the run's lock."""
    several = tuple(machines.arguments()) if processes > 1 else ()
    argv = (
        *accelerate_command(),
        "launch",
        "--config_file",
        str(run_folder / ACCELERATE_FILE),
        *several,
        "--num_processes",
        str(processes),
        "-m",
        find_engine(engine).worker,
        "--config_file",
        TRAINER_FILE,
        "--dataset_config",
        DATASET_FILE,
        "--gradient_accumulation_steps",
        str(accumulation),
    )
    environment = {
        **safe_settings(),
        RUN_VARIABLE: str(run_folder),
        ATTEMPT_VARIABLE: str(attempt_number),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads or default_threads(processes // machines.count, on_cpu)),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT_SECONDS),
    }
    if machines.count > 1:
        environment[MACHINE_VARIABLE] = str(machines.rank)
        # torchrun reads it: a machine that still starts an attempt which is over meets nobody of the next one.
        environment["PET_RDZV_ID"] = f"{run_folder.name}-{attempt_number}"
    if on_cpu:
        # For runs of kwrap 0.1, whose locks say nothing of kernels, as it started them.
        environment |= {"LYCORIS_KERNEL_BACKEND": "torch", "LYCORIS_KERNEL_TUNE": "off", "CUDA_VISIBLE_DEVICES": ""}
    environment |= kernel_settings(kernels or {}, run_folder)
    # The worker's folder is another one: what is relative here would not be found there.
    environment |= {name: str(expand_user(os.environ[name]).absolute()) for name in FOLDERS if os.environ.get(name)}
    return Launch(argv, environment, run_folder, dropped_variables(kernels or {}))


def plan_attempt_launch(attempt: Attempt, machine_rank: int = 0) -> Launch:
    """The command of an attempt of a run that is there, on one of its machines."""
    lock = attempt.lock
    return plan_launch(
        attempt.run.folder,
        lock.engine,
        attempt.number,
        attempt.processes,
        attempt.accumulation,
        lock.is_on_cpu,
        attempt.threads,
        Machines(attempt.machines, machine_rank, {**lock.accelerate, **attempt.address}),
        lock.table("kernels"),
    )


def note_threads(attempt: Attempt | None) -> list[str]:
    """How the caller's OMP_NUM_THREADS differs from that of the attempt before, which holds."""
    given, kept = os.environ.get("OMP_NUM_THREADS", ""), attempt.threads if attempt else None
    if kept is None or given in ("", str(kept)):
        return []
    return [f"OMP_NUM_THREADS is {given} here and was {kept} in the attempt before: the run keeps it as it was"]


def default_threads(processes: int, on_cpu: bool) -> int:
    """Threads of each process: the caller's OMP_NUM_THREADS, else one on a CPU, else the cores shared out.

    Their number changes the last bits of sums, so an attempt keeps that of the one before. What is trained on a CPU
    is a tiny model, and threads that wait for each other on busy cores make it twenty times slower.
    """
    if given := asked_threads():
        return given
    if on_cpu:
        return 1
    return max(1, min(MOST_THREADS, count_cores() // processes))
