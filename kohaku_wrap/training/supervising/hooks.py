"""A person's own command, called when something happens to a run: a webhook or a mail is one line of shell."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kohaku_wrap.training.records.attempts import ATTEMPT_VARIABLE, RUN_VARIABLE
from kohaku_wrap.training.records.folder import Run

HookEvent = Literal["start", "state", "crash", "finish", "stop"]

HOOK_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Hook:
    """The command and the run that it is told about."""

    command: str
    """For `sh -c`; empty for none."""

    run: Run
    """Whose events they are."""

    on_trouble: Callable[[str], None]
    """Called with what went wrong with the command, if anything."""

    def call(self, event: HookEvent, message: str, optimizer_step: int) -> None:
        """Run the command with what happened in KWRAP_EVENT, KWRAP_RUN_NAME, KWRAP_RUN_FOLDER, KWRAP_OPTIMIZER_STEP
        and KWRAP_MESSAGE. A broken hook never stops a run."""
        if not self.command:
            return
        # Without the attempt's own variables: a hook is not one of the processes that end with it.
        environment = {
            name: value for name, value in os.environ.items() if name not in (RUN_VARIABLE, ATTEMPT_VARIABLE)
        }
        environment |= {
            "KWRAP_EVENT": event,
            "KWRAP_RUN_NAME": self.run.name,
            "KWRAP_RUN_FOLDER": str(self.run.folder),
            "KWRAP_OPTIMIZER_STEP": str(optimizer_step),
            "KWRAP_MESSAGE": message,
        }
        try:
            # No pipe: it would be waited for as long as a process that the command left behind holds it.
            with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
                done = subprocess.run(
                    ["sh", "-c", self.command],
                    env=environment,
                    cwd=self.run.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    timeout=HOOK_TIMEOUT_SECONDS,
                    check=False,
                )
                said.seek(0)
                last = (said.read().strip().splitlines() or [""])[-1]
        except subprocess.TimeoutExpired:
            self.on_trouble(f"the hook command did not end within {HOOK_TIMEOUT_SECONDS} s of {event}")
            return
        except (OSError, ValueError) as error:
            self.on_trouble(f"the hook command could not be started on {event}: {error}")
            return
        if done.returncode:
            self.on_trouble(f"the hook command ended with exit code {done.returncode} on {event}: {last}".rstrip(": "))
