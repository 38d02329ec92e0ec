"""What a process leaves for those who watch it, written so that neither a crash nor a full disk makes it a fault."""

from __future__ import annotations

import io
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from kohaku_wrap.errors import command_line
from kohaku_wrap.outlets import Outlet

Phase = Literal["start-up", "step", "sampling", "validating", "saving", "paused"]
"""What a rank is doing; each phase has its own time-out."""

SUPERVISOR_LOG = "supervisor.log"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SIGN_BYTES = 4096
"""Of each sign of life, the same for all, so that one covers the other."""


@dataclass(frozen=True)
class Heartbeat:
    """The last sign of life of one rank."""

    rank: int
    """Of the process, from 0."""

    pid: int
    """The rank's process."""

    phase: Phase
    """What it is doing; each phase has its own time-out."""

    optimizer_step: int
    """Optimizer steps done."""

    micro_batch: int
    """Micro-batches done in this attempt."""

    unix_seconds: float
    """When it was written."""

    message: str = ""
    """For people, such as why it pauses."""

    monotonic_seconds: float = 0.0
    """When, by the clock that nobody sets; means nothing on another boot."""

    boot_id: str = ""
    """Of the machine's boot that it was written in."""


@dataclass(frozen=True)
class Failure:
    """Why a rank gave up, in its own words."""

    rank: int
    """Of the process, from 0."""

    kind: str
    """`non-finite-loss`, `mostly-skipped`, `nan-latents`, `out-of-memory`, `bad-image`, `disk-full`, `bad-state` or
    `error`."""

    message: str
    """One line for people."""

    optimizer_step: int
    """Optimizer steps done when it happened."""

    next_step: str = ""
    """What to do about it, where the rank knows."""

    unix_seconds: float = 0.0
    """When it was written; the first failure of an attempt is its cause. 0 in attempts of kwrap 0.1."""

    is_lasting: bool = False
    """Whether the next attempt would only meet it again."""


def leave_sign(path: Path, text: str) -> None:
    """Write a sign of life over the last one, for which a full disk has room. One that fails is only missed."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(descriptor, text.ljust(SIGN_BYTES).encode(), 0)
        finally:
            os.close(descriptor)


@lru_cache
def read_boot_id() -> str:
    """What names this boot of this machine; empty where the system does not tell."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


class RunLog:
    """What the supervisor has to say, kept in the run's own folder for those who do not see its terminal."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / SUPERVISOR_LOG
        self.watch = command_line("status", run_folder)

    def note(self, text: str) -> None:
        """Add a line with the time; a full disk only leaves it out."""
        with suppress(OSError), self.path.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def note_loss(self, what: str) -> None:
        """Say that the training goes on unseen, how to see it and how to stop it."""
        self.note(
            f"note: {what}; the training goes on. Watch it: `{self.watch}`. "
            f"Stop it, with a state saved: `kill -INT {os.getpid()}`"
        )


def send_output_to(log_file: Path) -> None:
    """Let this process's output, Python's and that of libraries, go to a log."""
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(cast("Any", Outlet(number)), "utf-8", "backslashreplace", write_through=True)
        for number in (1, 2)
    )
