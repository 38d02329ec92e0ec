"""When each optimizer step ended, and how much memory was taken, seen from outside: nothing is added to the trainer."""

from __future__ import annotations

import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil

from kohaku_wrap.planning.sizes import MIB

PROGRESS = re.compile(rb"steps:[^\r\n]*?(\d+)/\d+ \[\d")
"""tqdm's count of steps; the trainer draws other bars, as of the images it looks at."""

POLL_SECONDS = 0.01
MEMORY_EVERY = 50
"""Polls between two looks at the memory."""

WARM_UP_STEPS = 2


class StepClock:
    """Follows the progress bar that a trainer writes into its log, and the memory of GPUs and of processes."""

    def __init__(self, log: Path, list_processes: Callable[[], list[int]], *, on_gpu: bool) -> None:
        self.log = log
        self.list_processes = list_processes
        self.on_gpu = on_gpu
        self.ended_at: dict[int, float] = {}
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> StepClock:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def step_seconds(self) -> list[float]:
        """Of every optimizer step after the first ones, in which kernels are chosen and caches filled."""
        known = sorted(self.ended_at.items())
        pairs = pairwise(known)
        return [late - early for (one, early), (other, late) in pairs if other == one + 1 and one >= WARM_UP_STEPS]

    def _follow(self) -> None:
        place, looks = 0, 0
        while not self._stop.wait(POLL_SECONDS):
            looks += 1
            if looks % MEMORY_EVERY == 0:
                self.peak_bytes = max(
                    self.peak_bytes, gpu_bytes() if self.on_gpu else host_bytes(self.list_processes())
                )
            try:
                with self.log.open("rb") as stream:
                    stream.seek(place)
                    fresh = stream.read()
            except FileNotFoundError:
                continue
            whole = fresh[: max(fresh.rfind(b"\r"), fresh.rfind(b"\n"), fresh.rfind(b"]")) + 1]
            place += len(whole)
            now = time.monotonic()
            for found in PROGRESS.finditer(whole):
                self.ended_at.setdefault(int(found[1]), now)


def median_of(seconds: list[float]) -> float:
    """The median; NaN where nothing was seen."""
    return statistics.median(seconds) if seconds else float("nan")


def gpu_bytes() -> int:
    """Memory that processes take of the fullest GPU, by the driver; 0 where it does not tell."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, errors="replace", check=False, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return max((int(line) * MIB for line in told.split() if line.isdigit()), default=0)


def host_bytes(processes: list[int]) -> int:
    """Memory of these processes together, pages that several share counted once."""
    total = 0
    for process in processes:
        with suppress(psutil.Error):
            total += psutil.Process(process).memory_full_info().pss
    return total
