"""The processes of an attempt: found by the run that their environment names, ended together."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from kohaku_wrap.training.records.attempts import ATTEMPT_VARIABLE, MACHINE_VARIABLE, RUN_VARIABLE, Attempt
from kohaku_wrap.training.records.folder import Run

END_SECONDS = 30.0
STACKS_SECONDS = 1.0


def list_processes(run: Run, attempt_number: int | None = None, machine_rank: int | None = None) -> list[int]:
    """The live processes here that were started for a run, for one attempt of it, for one of its machines.

    torchrun puts every rank into a session of its own, so neither process groups nor, once the launcher is dead, the
    process tree would find them all.
    """
    run_setting = f"{RUN_VARIABLE}={run.folder}".encode()
    attempt_setting = None if attempt_number is None else f"{ATTEMPT_VARIABLE}={attempt_number}".encode()
    other_machine = f"{MACHINE_VARIABLE}=".encode()
    machine_setting = other_machine + str(machine_rank).encode()
    found: list[int] = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if not (entry.name.isascii() and entry.name.isdecimal()) or int(entry.name) == os.getpid():
            continue
        try:
            settings = (entry / "environ").read_bytes().split(b"\0")
            state = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state == "Z" or run_setting not in settings:
            continue
        if attempt_setting is not None and attempt_setting not in settings:
            continue
        # Two machines of a run may be one, as in its tests.
        of_machine = machine_setting in settings or not any(each.startswith(other_machine) for each in settings)
        if machine_rank is None or of_machine:
            found.append(int(entry.name))
    return found


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


def is_alive(pid: int) -> bool:
    """Whether that process is there and more than a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return not Path("/proc/self/stat").exists()
    return stat.rpartition(")")[2].split()[0] != "Z"


def send_signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return
