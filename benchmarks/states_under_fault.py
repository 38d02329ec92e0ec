"""The state writer with a failure at every write, fsync, rename, mkdir and removal: is any torn state ever taken?

    python benchmarks/states_under_fault.py             # 2,000 writes
    python benchmarks/states_under_fault.py --writes 200

Each write is done by a child process in a folder that earlier failures have left their marks in. At one operation the
child is killed, or the operation fails, or the disk is full, or the power is cut: then every file that was not fsynced
loses its content. Afterwards all states under a final name must verify, and the newest must be the one before, or
the one just written.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from kohaku_wrap.training.records.manifest import DamagedState, Fingerprint
from kohaku_wrap.training.records.states import DiskFull, list_states, remove_old_states, verify_state, write_state

Failure = Literal[
    "killed before", "killed after", "input/output error", "disk full", "power cut before", "power cut after"
]

FAILURES: tuple[Failure, ...] = (
    "killed before", "killed after", "input/output error", "disk full", "power cut before", "power cut after",
)  # fmt: skip
SYSTEM_CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
MADE_WITH = Fingerprint("builtin", "kwrap", 1, 4, 1, 4, 2, 9, 18, "", "", 0, 8, 8)
KEEP, EVERY = 3, 50
FAILED, FAILED_ON_DISK = 3, 4
ENDS = {0: "wrote it", FAILED: "error", FAILED_ON_DISK: "full"}


class Fault:
    """Counts operations in this process and fails at one of them."""

    def __init__(self, at: int, failure: Failure, states: Path) -> None:
        self.at = at
        self.failure = failure
        self.states = states
        self.count = 0
        self.name = ""
        self.durable: set[int] = set()

    def install(self) -> None:
        """Put the counting in front of the system's calls and of files opened for writing."""
        for name in SYSTEM_CALLS:
            setattr(os, name, self.around(name, getattr(os, name)))
        real_open = io.open
        fault = self

        def open_counted(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            stream = real_open(file, mode, *rest, **options)
            return CountedFile(stream, fault) if "w" in mode else stream

        io.open = open_counted

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.before(name)
            result = call(*arguments, **options)
            if name == "fsync":
                self.durable.add(os.fstat(arguments[0]).st_ino)
            self.after(name)
            return result

        return counted

    def before(self, name: str) -> None:
        self.count += 1
        if self.count != self.at:
            return
        self.name = name
        if self.failure == "killed before":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.failure == "power cut before":
            self.cut_power()
        if self.failure == "input/output error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.failure == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def after(self, name: str) -> None:
        if self.count != self.at or self.name != name:
            return
        if self.failure == "killed after":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.failure == "power cut after":
            self.cut_power()

    def cut_power(self) -> None:
        """Nothing that this process wrote and did not fsync is there any more."""
        for path in self.states.rglob("*"):
            status = path.stat()
            if path.is_file() and status.st_ino not in self.durable and status.st_mtime >= self.started:
                os.truncate(path, status.st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    started = 0.0


class CountedFile:
    """A file opened for writing whose writes are counted; the failing one writes the first half of its data."""

    def __init__(self, stream: Any, fault: Fault) -> None:
        self.stream = stream
        self.fault = fault

    def write(self, data: Any) -> Any:
        try:
            self.fault.before("write")
        except OSError:
            self.stream.write(data[: len(data) // 2])
            self.stream.flush()
            raise
        result = self.stream.write(data)
        self.stream.flush()
        self.fault.after("write")
        return result

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, *details: Any) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def fill(folder: Path) -> None:
    """A state of three files, one of them in a folder of its own."""
    (folder / "network.bin").write_bytes(os.urandom(3000))
    (folder / "schedule.json").write_text('{"last_epoch": 3}')
    (folder / "inner").mkdir()
    (folder / "inner" / "optimizer.bin").write_bytes(os.urandom(5000))


def write_once(states: Path, step: int) -> None:
    """What a worker does when a state is due."""
    write_state(states, step, fill, MADE_WITH)
    remove_old_states(states, KEEP, EVERY)


def try_write(states: Path, step: int, at: int, failure: Failure) -> int:
    """Let a child write the state of `step` and fail at operation `at`; its wait status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    fault = Fault(at, failure, states)
    fault.started = time.time() - 0.01
    fault.install()
    try:
        write_once(states, step)
    except DiskFull:
        os._exit(FAILED_ON_DISK)
    except OSError:
        os._exit(FAILED)
    os._exit(0)


def count_operations(states: Path) -> int:
    """Operations of one write with retention, when nothing fails."""
    for step in range(1, KEEP + 1):
        write_once(states, step)
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        fault = Fault(0, "killed before", states)
        fault.install()
        write_once(states, KEEP + 1)
        os.write(writer, str(fault.count).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    return int(os.read(reader, 16))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writes", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    chosen = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        states = Path(folder) / "states"
        operations = count_operations(states)
        outcomes: Counter[str] = Counter()
        torn = lost = 0
        last_good = KEEP + 1
        for number in range(chosen.writes):
            step = KEEP + 2 + number
            at = number % operations + 1
            failure = FAILURES[number // operations % len(FAILURES)]
            status = try_write(states, step, at, failure)
            ended = "killed" if os.WIFSIGNALED(status) else ENDS[os.WEXITSTATUS(status)]
            outcomes[ended] += 1
            whole = [0]
            for _, path in list_states(states):
                try:
                    whole.append(verify_state(path).optimizer_step)
                except DamagedState as damaged:
                    torn += 1
                    print(f"TORN  {failure} operation {at}: {damaged.message}")
            newest = max(whole)
            wanted = step if ended == "wrote it" else last_good
            if newest < wanted:
                lost += 1
                print(f"LOST  {failure} operation {at}: newest is of step {newest}, wanted {wanted}")
            last_good = max(last_good, newest)
        left = len(list_states(states))
    print(f"{chosen.writes:,} writes, failing at each of {operations} operations in {len(FAILURES)} ways")
    print("  " + ", ".join(f"{name}: {count:,}" for name, count in sorted(outcomes.items())))
    print(f"  torn under a final name: {torn} (bar: 0)")
    print(f"  resumes without their whole state: {lost} (bar: 0)")
    print(f"  states left: {left} (keep {KEEP}, every {EVERY}), {time.monotonic() - started:.0f} s")
    return 1 if torn or lost else 0


if __name__ == "__main__":
    sys.exit(main())
