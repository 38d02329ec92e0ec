"""Whole files or none: atomic writes, hashes, and where kwrap keeps and finds its own."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

Progress = Callable[[int, int], None]
"""Called with what is done and the total, in the unit that the caller announced."""

HASH_BLOCK_BYTES = 1 << 22


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def blamed_on(path: Path, part: Path) -> Iterator[None]:
    """Let a failure to write `part` name `path`, which it becomes; a write to a full disk names no file by itself."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if unnamed or error.filename == str(part):
            error.filename = str(path)
        raise


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path` and give it the name only when all is on disk.

    On any failure, an interrupt included, the neighbour is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    encoding = None if "b" in mode else "utf-8"
    try:
        with blamed_on(path, part):
            with part.open(mode, encoding=encoding, newline=None if "b" in mode else "\n") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write(text)


def sha256_of_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The file's sha256 in hex; `on_bytes` is told the size of each block read."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
            if on_bytes:
                on_bytes(len(block))
    return digest.hexdigest()


def home_folder() -> Path:
    """Where kwrap keeps what is not part of a project: `$KWRAP_HOME`, else the platform's data folder."""
    if home := os.environ.get("KWRAP_HOME"):
        return Path(home)
    from platformdirs import user_data_path

    return user_data_path("kwrap", appauthor=False)


def shipped_folder(name: str) -> Path:
    """The `templates` or `datasets` folder that came with kwrap, from a wheel or a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
