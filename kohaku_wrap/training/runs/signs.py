"""What a process leaves for those who watch it, written so that neither a crash nor a full disk makes it a fault."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

SIGN_BYTES = 4096
"""Of each sign of life, the same for all, so that one covers the other."""


def leave_sign(path: Path, text: str) -> None:
    """Write a sign of life over the last one, for which a full disk has room. One that fails is only missed."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(descriptor, text.ljust(SIGN_BYTES).encode(), 0)
        finally:
            os.close(descriptor)


class LogStream(io.FileIO):
    """Leaves out what a full disk does not take: a line of a log is no reason to end a training."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            super().write(data)
        return len(data)


def send_output_to(log_file: Path) -> None:
    """Let this process's output, Python's and that of libraries, go to a log."""
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(LogStream(number, "w"), "utf-8", "backslashreplace", write_through=True) for number in (1, 2)
    )
