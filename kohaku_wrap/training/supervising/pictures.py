"""Pictures while a run trains: drawn of its networks by `kwrap sample` in a process of its own, never by the trainer.

Only the run's folder `samples/` and its log know of it: whatever becomes of that process, the training goes on.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import psutil

from kohaku_wrap.config.site import AFTER, load_site
from kohaku_wrap.errors import KwrapError, command_line
from kohaku_wrap.processes import end_child, start_helper
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.remembered import read_remembered
from kohaku_wrap.training.records.samples import Pictures, list_pictures

LOOK_SECONDS = 2.0
END_SECONDS = 5.0
NICENESS = 10
"""Below the training, where both compute on the processor."""

LOG = "drawing.log"
"""In the run's `samples/`: what the process that draws printed."""


class PictureMaker:
    """Has pictures drawn as networks are saved, or when the run's attempts have ended."""

    def __init__(self, run: Run, tell: Callable[[str], None]) -> None:
        """`tell` gets a line for people."""
        self.run, self.tell = run, tell
        self.device, self.is_shared = find_device(run)
        self.child: subprocess.Popen[bytes] | None = None
        self.tried: set[Pictures] = set()
        self.looked_at = 0.0

    def waiting(self) -> list[Pictures]:
        """What is not drawn yet."""
        return [each for each in list_pictures(self.run) if not each.are_drawn]

    def look(self) -> None:
        """Tell what was drawn, and start on what has come; called often while an attempt trains."""
        if time.monotonic() - self.looked_at < LOOK_SECONDS:
            return
        self.looked_at = time.monotonic()
        try:
            self.take_end()
            if self.child is None and self.device != AFTER:
                self.start(self.device)
        except (KwrapError, OSError) as error:
            self.fail(str(error))

    def finish(self, is_stopped: Callable[[], bool]) -> None:
        """Draw what is left, when no attempt follows, until `is_stopped`."""
        usual = "cpu" if self.run.lock.is_on_cpu else "cuda"
        try:
            while not is_stopped():
                self.take_end()
                if self.child is None:
                    self.start(usual if self.device == AFTER else self.device)
                if self.child is None:
                    break
                time.sleep(0.1)
        except (KwrapError, OSError) as error:
            self.fail(str(error))
        finally:
            self.close()

    def start(self, device: str) -> None:
        """Start a process that draws all that waits, unless it failed at just that before."""
        waiting = self.waiting()
        if not waiting or self.tried >= set(waiting):
            return
        self.tried |= set(waiting)
        self.run.samples.mkdir(exist_ok=True)
        kind, _, index = device.partition(":")
        words = ("sample", "--run", self.run.folder, "--queued", "--device", kind)
        self.child = start_helper("kohaku_wrap", *words, log=self.run.samples / LOG, added=choose_gpu(index))
        with suppress(psutil.Error):
            psutil.Process(self.child.pid).nice(NICENESS)
        steps = ", ".join(f"{each.optimizer_step:,}" for each in waiting)
        shared = ", a GPU that trains too: both need its memory" if self.is_shared and device == self.device else ""
        self.tell(f"drawing pictures of optimizer step {steps} on {device}{shared}")

    def take_end(self) -> None:
        """Tell of a process that has ended."""
        if self.child is None or (code := self.child.poll()) is None:
            return
        self.child = None
        if code:
            said = (self.run.samples / LOG).read_text(encoding="utf-8", errors="replace")
            lines = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
            self.fail(lines[-1] if lines else f"the process ended with code {code}")
            return
        drawn = [each for each in self.tried if each.are_drawn]
        self.tried -= set(drawn)
        for each in sorted(drawn, key=lambda one: one.optimizer_step):
            self.tell(f"pictures of optimizer step {each.optimizer_step:,}: {each.sheet}")

    def fail(self, why: str) -> None:
        """Tell that pictures are not drawn, and how to draw them later."""
        again = command_line("sample", "--run", self.run.folder, "--queued")
        self.tell(f"pictures were not drawn: {why}; the training is not touched. Draw them later: `{again}`")

    def close(self) -> None:
        """End the process where it still runs; what it has drawn is kept."""
        if self.child is not None:
            end_child(self.child, END_SECONDS)
            self.child = None


def find_device(run: Run) -> tuple[str, bool]:
    """Where pictures are drawn, and whether that GPU trains too: by the site that the run goes by now.

    Without one on the CPU, or after a training on GPUs.
    """
    with suppress(KwrapError):
        machine = load_site(read_remembered(run).site).machine
        if machine.sample_device:
            return machine.sample_device, machine.draws_where_it_trains
    return "cpu" if run.lock.is_on_cpu else AFTER, False


def choose_gpu(index: str) -> Mapping[str, str]:
    """The settings that show only this GPU, of those that this process may use."""
    if not index:
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    listed = [each.strip() for each in seen.split(",") if each.strip()]
    if listed and int(index) >= len(listed):
        raise KwrapError(f"[machine] sample_device: there is no cuda:{index} among CUDA_VISIBLE_DEVICES={seen}",
                         "Name one that is there.")  # fmt: skip
    return {"CUDA_VISIBLE_DEVICES": listed[int(index)] if listed else index}
