"""The processes of an attempt: found by the run that their environment names, ended together."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

from kohaku_wrap.training.records.attempts import ATTEMPT_VARIABLE, MACHINE_VARIABLE, RUN_VARIABLE, Attempt
from kohaku_wrap.training.records.folder import Run, is_run

END_SECONDS = 30.0
STACKS_SECONDS = 1.0


def list_processes(run: Run, attempt_number: int | None = None, machine_rank: int | None = None) -> list[int]:
    """The live processes here that were started for a run, for one attempt of it, for one of its machines.

    torchrun puts every rank into a session of its own, so neither process groups nor, once the launcher is dead, the
    process tree would find them all.
    """
    wanted = {} if attempt_number is None else {ATTEMPT_VARIABLE: str(attempt_number)}
    found: list[int] = []
    for process in psutil.process_iter(["environ", "status", "cwd"]):
        settings = process.info["environ"] or {}
        if RUN_VARIABLE not in settings or str(run.folder) != place_of(process.info["cwd"], settings[RUN_VARIABLE]):
            continue
        # Two machines of a run may be one, as in its tests.
        of_machine = machine_rank is None or settings.get(MACHINE_VARIABLE, str(machine_rank)) == str(machine_rank)
        is_live = process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
        if wanted.items() <= settings.items() and of_machine and is_live:
            found.append(process.pid)
    return found


def place_of(working_folder: str | None, told: str) -> str:
    """The run's folder of a process: where it works follows a run that is moved, what it was told does not."""
    return working_folder if working_folder and is_run(Path(working_folder)) else told


def end_processes(run: Run, attempt_number: int | None = None, machine_rank: int | None = None) -> None:
    """Kill all processes here of a run, attempt or machine and wait until they are gone."""
    deadline = time.monotonic() + END_SECONDS
    while (alive := list_processes(run, attempt_number, machine_rank)) and time.monotonic() < deadline:
        for pid in alive:
            send_signal(pid, signal.SIGKILL)
        time.sleep(0.05)


def ask_for_stacks(attempt: Attempt) -> None:
    """Let every rank of machine 0 write the stacks of its threads into its log."""
    alive = set(list_processes(attempt.run, attempt.number, 0))
    # A process of another machine may have the number of one here.
    ranks = [beat.pid for beat in attempt.heartbeats() if beat.pid in alive and beat.rank < attempt.processes_here]
    for pid in ranks:
        send_signal(pid, signal.SIGUSR1)
    if ranks:
        time.sleep(STACKS_SECONDS)


def send_signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
