"""Locks of what several processes share, files and parts of a folder, and what killed ones left there."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from kohaku_wrap.errors import KwrapError


def take_lock(descriptor: int, path: Path) -> bool:
    """Whether the open file is now ours alone, and still the one at `path`: who held it before may have removed it."""
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def hold_lock(path: Path) -> int | None:
    """Take the lock file for the life of this process; its descriptor, or None when another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if take_lock(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor of a file or folder for the time of a block."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def locking(path: Path, flags: int) -> Iterator[bool]:
    """Open a file or folder for the time of a block, and say whether it is ours alone, as `take_lock` does."""
    with opened(path, flags) as descriptor:
        yield take_lock(descriptor, path)


@contextmanager
def holding_lock(path: Path, busy: KwrapError) -> Iterator[None]:
    """Hold the lock file for the time of a block; raises `busy` when another process holds it."""
    with locking(path, os.O_RDWR | os.O_CREAT) as is_ours:
        if not is_ours:
            raise busy
        yield


def is_lock_free(path: Path) -> bool:
    """Whether the lock file exists and nobody holds it."""
    with suppress(FileNotFoundError, BlockingIOError), opened(path, os.O_RDONLY) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, waiting for it; free again when the process ends."""
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


LOCKS = ".locks"
"""Below a folder of work that several processes share: a locked file for each part that one of them does now."""


class Claims:
    """The parts of a folder's work that this process does now: a locked file each, free again when the process ends."""

    def __init__(self, out: Path) -> None:
        self.folder, self.out = out / LOCKS, out
        self.held: dict[str, int] = {}

    def take(self, name: str) -> bool:
        """Whether the part is ours; what a killed process left of its file is removed."""
        path = self.folder / f"{name}.lock"
        descriptor = self._open(path)
        if not take_lock(descriptor, path):
            os.close(descriptor)
            return False
        self.held[name] = descriptor
        for left in self.out.glob(f".{name}.*.part"):
            left.unlink(missing_ok=True)
        return True

    def _open(self, path: Path) -> int:
        """The lock's file, also where another process removes the empty folder just now."""
        while True:
            self.folder.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def release(self) -> None:
        """Let all go."""
        for name, descriptor in self.held.items():
            (self.folder / f"{name}.lock").unlink(missing_ok=True)
            os.close(descriptor)
        self.held.clear()
        with suppress(OSError):
            self.folder.rmdir()


def clear_leavings(out: Path, *patterns: str) -> None:
    """Remove what killed processes left: locks that nobody holds, and half-written files of these patterns."""
    for path in (out / LOCKS).glob("*.lock"):
        with suppress(OSError), locking(path, os.O_RDWR) as is_ours:
            if is_ours:
                path.unlink()
    with suppress(OSError):
        (out / LOCKS).rmdir()
    for part in (part for pattern in patterns for part in out.glob(pattern)):
        number = part.name.split(".")[-2]
        if number.isdecimal() and not is_alive(int(number)):
            part.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether that process is there and more than a zombie: in a container nobody may ever wait for an orphan."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def making_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new hidden folder to fill and to rename; it is gone after the block, and so are those of killed processes.

    A folder that is locked is being filled by another process and stays.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{escape(prefix)}*"):
        with suppress(OSError), locking(left, os.O_DIRECTORY | os.O_NOFOLLOW) as is_ours:
            if is_ours:
                shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    with locking(part, os.O_DIRECTORY):
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)
