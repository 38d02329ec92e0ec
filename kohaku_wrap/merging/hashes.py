"""Hashes of large files, kept so that an unchanged file is read only once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from kohaku_wrap.files import HASH_BLOCK_BYTES, Progress, home_folder, write_text
from kohaku_wrap.merging.layout import read_header

CACHE_NAME = "file-hashes.json"
CACHE_LIMIT = 4096


@dataclass(frozen=True)
class FileHashes:
    """What people quote a checkpoint or network by."""

    sha256: str
    """Of the whole file, in hex."""

    data_sha256: str
    """Of the data section alone: what kohya writes as `sshs_model_hash`."""

    @property
    def auto_v2(self) -> str:
        """The short hash that model sites show."""
        return self.sha256[:10]


def cache_key(path: Path) -> str:
    """What must stay the same for a kept hash to hold: path, size, time of change and inode."""
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"


def load_cache() -> dict[str, list[str]]:
    """The kept hashes; none if there is no cache or it cannot be read."""
    try:
        held = json.loads((home_folder() / CACHE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(held, dict):
        return {}
    return {key: value for key, value in held.items() if isinstance(value, list) and len(value) == 2}


def store_cache(added: dict[str, list[str]]) -> None:
    """Add to the kept hashes; a cache that cannot be written is no failure."""
    held = {**load_cache(), **added}
    newest = dict(list(held.items())[-CACHE_LIMIT:])
    try:
        write_text(home_folder() / CACHE_NAME, json.dumps(newest, indent=0))
    except OSError:
        return


class HashCounter:
    """Tells how much has been hashed over several files."""

    def __init__(self, total_bytes: int, on_progress: Progress) -> None:
        self.total_bytes, self.on_progress = total_bytes, on_progress
        self.done_bytes = 0
        self.stopped = False
        self.lock = Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.done_bytes += count
            self.on_progress(self.done_bytes, self.total_bytes)
        if self.stopped:
            raise InterruptedError


def hash_file(path: Path, counter: HashCounter) -> FileHashes:
    """Both hashes of a safetensors file, read once.

    Raises MalformedFile or PickledFile where it is none.
    """
    data_start = read_header(path).data_start
    whole, data = hashlib.sha256(), None
    with path.open("rb", buffering=0) as stream:
        buffer = bytearray(HASH_BLOCK_BYTES)
        whole.update(stream.read(data_start))
        counter.add(data_start)
        data = hashlib.sha256()
        while count := stream.readinto(buffer):
            block = memoryview(buffer)[:count]
            whole.update(block)
            data.update(block)
            counter.add(count)
    return FileHashes(whole.hexdigest(), data.hexdigest())


def hash_files(
    paths: Sequence[Path], threads: int = 0, on_progress: Progress = lambda done, total: None
) -> list[FileHashes]:
    """The hashes of safetensors files, from the cache where a file is unchanged since it was hashed."""
    held = load_cache()
    keys = [cache_key(path) for path in paths]
    wanted = {key: path for key, path in zip(keys, paths, strict=True) if key not in held}
    if wanted:
        counter = HashCounter(sum(path.stat().st_size for path in wanted.values()), on_progress)
        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            try:
                found = list(pool.map(lambda path: hash_file(path, counter), wanted.values()))
            except BaseException:
                counter.stopped = True
                raise
        added = {key: [hashes.sha256, hashes.data_sha256] for key, hashes in zip(wanted, found, strict=True)}
        held.update(added)
        store_cache(added)
    return [FileHashes(*held[key]) for key in keys]
