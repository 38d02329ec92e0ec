"""The page of a run while it trains, written by short processes of their own: whatever becomes of them."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from kohaku_wrap.processes import python_command, safe_environment

if TYPE_CHECKING:
    from kohaku_wrap.training.records.folder import Run

EVERY_SECONDS = 20.0
TIMEOUT_SECONDS = 120.0


@contextmanager
def keeping_page(run: Run, is_wanted: bool) -> Iterator[None]:
    """Have `kwrap report RUN` write the page again and again within the block, and once after it."""
    if not is_wanted:
        yield
        return
    is_over = threading.Event()

    def write() -> None:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                python_command("-m", "kohaku_wrap", "report", run.folder, "--live"),
                env=safe_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=TIMEOUT_SECONDS,
                start_new_session=True,
                check=False,
            )

    def go_on() -> None:
        while not is_over.is_set():
            write()
            is_over.wait(EVERY_SECONDS)

    writer = threading.Thread(target=go_on, daemon=True)
    writer.start()
    try:
        yield
    finally:
        is_over.set()
        writer.join()
        write()
