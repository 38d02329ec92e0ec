"""The processes that log an attempt's metrics to other tools: started, looked after, ended; a failure is only told."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from kohaku_wrap.errors import KwrapError, command_line
from kohaku_wrap.processes import python_command, safe_environment
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.remembered import read_secrets
from kohaku_wrap.training.records.trackers import read_logbook

MODULE = "kohaku_wrap.training.supervising.logging_process"
END_SECONDS = 60.0
"""How long the last steps may take to arrive."""


class Loggers:
    """A process for each tool that `log_with` names."""

    def __init__(self, attempt: Attempt, tell: Callable[[str], None]) -> None:
        """`tell` gets a line for people."""
        self.attempt, self.tell = attempt, tell
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start them; what cannot be started is told."""
        run = self.attempt.run
        try:
            book = read_logbook(run)
            key = read_secrets(run).get("wandb_api_key") if "wandb" in book.trackers else None
            for name in book.trackers:
                with self.log_of(name).open("wb") as log:
                    self.children[name] = subprocess.Popen(
                        python_command("-m", "kohaku_wrap.processes", os.getpid(), MODULE,
                                       run.folder, self.attempt.number, name),
                        stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                        env=safe_environment({"WANDB_API_KEY": str(key)} if key else None), start_new_session=True,
                    )  # fmt: skip
                self.tell(f"metrics go to {name}: {book.folder}")
        except (KwrapError, OSError, ValueError) as error:
            self.tell(f"metrics are not logged: {error}; the training is not touched")

    def log_of(self, name: str) -> Path:
        """What the process for a tool prints."""
        return self.attempt.folder / f"log-{name}.log"

    def look(self) -> None:
        """Tell of processes that ended too early."""
        for name, child in list(self.children.items()):
            if child.poll() is not None:
                del self.children[name]
                self.tell_end(name, child)

    def tell_end(self, name: str, child: subprocess.Popen[bytes]) -> None:
        """Tell of a failure, and how what is missing is logged."""
        if child.stdin is not None:
            child.stdin.close()
        if child.returncode == 0:
            return
        said = self.log_of(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = said[-1] if said else f"the process ended with code {child.returncode}"
        again = "the next attempt writes what is missing"
        if name == "tensorboard":
            again += f", and so does `{command_line('status', self.attempt.run.folder, '--to', name, 'DIR')}`"
        self.tell(f"metrics are no longer logged to {name}: {why}; the training is not touched; {again}")

    def finish(self, is_hurried: Callable[[], bool]) -> None:
        """Let them write the rest and end, for a while at most, until `is_hurried`."""
        for child in self.children.values():
            if child.stdin is not None:
                child.stdin.close()
        until = time.monotonic() + END_SECONDS
        while any(child.poll() is None for child in self.children.values()):
            if time.monotonic() > until or is_hurried():
                break
            time.sleep(0.1)
        for name, child in self.children.items():
            if child.poll() is None:
                child.kill()
                child.wait()
            self.tell_end(name, child)
        self.children.clear()
