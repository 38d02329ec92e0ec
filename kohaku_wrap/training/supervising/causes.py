"""Which rank of an attempt failed first, and of what: a rank that fails takes the others with it."""

from __future__ import annotations

import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from kohaku_wrap.files import read_tail
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.supervising.memory_kills import describe_sigkill

LAUNCHER_LOGS = ("launcher.log", "launcher-machine-*.log")
REPORT_BYTES = 1 << 16

ALLOCATION_FAILED = re.compile(
    r"CUDA out of memory|HIP out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|"
    r"DefaultCPUAllocator: .*allocate|[Cc]an(no|')t allocate memory"
)
"""Errors that an allocator raised without a class of their own."""

LOST_CONNECTION = re.compile(
    r"^(torch\.distributed\.)?Dist(Backend|Network|Store)Error|^NCCL|NCCL (communicator|error|operation)|nccl\w+Error|"
    r"\bgloo\b|Connection (closed|reset|refused|was likely closed) by peer|Connection was likely closed|"
    r"Connection (closed|reset|refused)|Broken pipe|Socket (closed|Timeout)|Application timeout caused pair closure|"
    r"Timed out waiting \d+ms for|collective operation timeout|process group has been (aborted|shut down)|TCPStore"
)
"""What a rank raises whose partner is gone."""

FAILED_PROCESS = re.compile(
    r"^ +time +: (?P<time>\S+)\n(?: +host .*\n)? +rank +: (?P<rank>\d+) .*\n +exitcode +: (?P<code>-?\d+) "
    r"\(pid: (?P<pid>\d+)\)",
    re.MULTILINE,
)
"""One process in torchrun's report."""

ENDED_BY_TORCHRUN = re.compile(r"Unable to shutdown process (\d+) via \d+, forcefully exiting via")

DEADLY = frozenset({signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL})
"""Signals that a process dies of by itself, or by the system; torchrun ends the others by SIGTERM."""


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended, as one rank or machine left it behind."""

    kind: str
    """As in `AttemptEnd`."""

    message: str
    """One line for people that names the rank or the machine."""

    unix_seconds: float
    """When it was seen."""

    rank: int | None = None
    """None for a machine."""

    depth: int = 0
    """0: a cause of its own. 1: a machine that left because its processes ended. 2: what others leave a rank with."""

    is_explained: bool = True
    """False for a process that ended with an exit code and left no word."""

    next_step: str = ""
    """What to do, where the rank knew."""

    is_lasting: bool = False
    """Whether the next attempt would only meet it again."""


@dataclass(frozen=True)
class ReportedProcess:
    """A process that torchrun saw fail."""

    rank: int
    """Among all processes of the attempt."""

    exit_code: int
    """Negative for a signal."""

    unix_seconds: float
    """When torchrun saw it, in whole seconds."""

    was_ended: bool
    """Whether torchrun itself killed it, since it did not end when another one failed."""


def find_first_cause(attempt: Attempt, optimizer_step: int, memory_kills: int | None = None) -> Cause | None:
    """What ended the attempt first; None where no rank, machine or report tells of anything.

    `memory_kills`: as `count_memory_kills` was when it began.
    """
    reported = read_reports(attempt)
    causes = [*failure_causes(attempt), *death_causes(attempt, reported, optimizer_step, memory_kills)]
    for why, seconds in attempt.machines_left():
        causes.append(Cause("crash", why, seconds, depth=1 if "ended with exit code" in why else 0))
    if causes and all(cause.depth == 2 for cause in causes):
        causes += silent_causes(attempt, reported)
    first = min(causes, key=lambda cause: (cause.depth, cause.unix_seconds), default=None)
    if first is not None and first.depth == 2:
        return replace(first, message=f"{first.message}; nothing says why its partner was lost")
    return first


def failure_causes(attempt: Attempt) -> list[Cause]:
    """What the ranks said themselves."""
    causes = []
    for failure in attempt.failures():
        kind = "crash" if failure.kind == "error" else failure.kind
        lost = kind == "crash" and LOST_CONNECTION.search(failure.message)
        if kind == "crash" and ALLOCATION_FAILED.search(failure.message):
            kind = "out-of-memory"
        cause = Cause(kind, f"rank {failure.rank}: {failure.message}", failure.unix_seconds, failure.rank)
        cause = replace(cause, depth=2 if lost else 0, next_step=failure.next_step)
        causes.append(replace(cause, is_lasting=failure.is_lasting))
    return causes


def death_causes(
    attempt: Attempt, reported: list[ReportedProcess], optimizer_step: int, memory_kills: int | None
) -> list[Cause]:
    """Ranks that died of a signal, or ended without a word, by torchrun's report."""
    spoke = {failure.rank for failure in attempt.failures()}
    causes = []
    for process in reported:
        if process.was_ended or process.rank in spoke:
            continue
        if process.exit_code >= 0:
            message = f"rank {process.rank}: ended with exit code {process.exit_code} after optimizer step"
            cause = Cause("crash", f"{message} {optimizer_step:,}", process.unix_seconds, process.rank)
            causes.append(replace(cause, is_explained=False))
        elif -process.exit_code in DEADLY:
            name = signal.Signals(-process.exit_code).name
            message = f"rank {process.rank}: killed by {name} after optimizer step {optimizer_step:,}"
            if -process.exit_code == signal.SIGKILL:
                is_here = process.rank < attempt.processes_here
                message += f", {describe_sigkill(memory_kills if is_here else None)}"
            # A process aborts by itself where a collective cannot go on, too.
            depth = 2 if -process.exit_code == signal.SIGABRT else 0
            causes.append(Cause("crash", message, process.unix_seconds, process.rank, depth))
    return causes


def silent_causes(attempt: Attempt, reported: list[ReportedProcess]) -> list[Cause]:
    """Ranks that ended with exit code 0 while others went on: torchrun reports no such process."""
    here = attempt.processes_here
    machines = {process.rank // here for process in reported}
    told = {process.rank for process in reported} | {failure.rank for failure in attempt.failures()}
    return [
        Cause(
            "exited-early",
            f"rank {beat.rank}: ended with exit code 0 after optimizer step {beat.optimizer_step:,}, before the others",
            beat.unix_seconds,
            beat.rank,
        )
        for beat in attempt.heartbeats()
        if beat.rank not in told and beat.rank // here in machines
    ]


def read_reports(attempt: Attempt) -> list[ReportedProcess]:
    """The processes in torchrun's reports, of all machines."""
    processes = []
    for path in (path for pattern in LAUNCHER_LOGS for path in sorted(attempt.folder.glob(pattern))):
        text = read_tail(path, REPORT_BYTES)
        ended = {int(pid) for pid in ENDED_BY_TORCHRUN.findall(text)}
        for found in FAILED_PROCESS.finditer(text):
            seconds = 0.0
            with suppress(ValueError):
                seconds = time.mktime(time.strptime(found["time"], "%Y-%m-%d_%H:%M:%S"))
            was_ended = int(found["pid"]) in ended
            processes.append(ReportedProcess(int(found["rank"]), int(found["code"]), seconds, was_ended))
    return processes
