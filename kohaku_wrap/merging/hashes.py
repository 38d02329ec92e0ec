"""Hashes of large files, kept so that an unchanged file is read only once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from kohaku_wrap.file_hashes import HASH_BLOCK_BYTES, keep_hashes, key_of_file, load_hashes
from kohaku_wrap.files import Progress
from kohaku_wrap.formats.safetensors import read_header
from kohaku_wrap.processes import count_cores

AUTO_V2_DIGITS = 10
AUTO_V3_DIGITS = 12
AUTO_V1_START, AUTO_V1_BYTES, AUTO_V1_DIGITS = 0x100000, 0x10000, 8


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
        return self.sha256[:AUTO_V2_DIGITS]

    @property
    def auto_v3(self) -> str:
        """The short hash of the data, which model sites show of networks: the same whatever the metadata."""
        return self.data_sha256[:AUTO_V3_DIGITS]


def find_auto_v1(path: Path) -> str:
    """The hash that the first webuis showed: of 64 KiB at the first MiB, which many files share."""
    with path.open("rb") as stream:
        stream.seek(AUTO_V1_START)
        return hashlib.sha256(stream.read(AUTO_V1_BYTES)).hexdigest()[:AUTO_V1_DIGITS]


def name_recorded_hash(recorded: str, hashes: FileHashes) -> str:
    """What a file's own `sshs_model_hash` is, in words."""
    if recorded == hashes.data_sha256:
        return "sd-scripts' way: the sha256 of the data, AutoV3"
    if recorded.startswith("0x"):
        return "LyCORIS' own way: over the tensors in the order of the training; no site computes it"
    return "another than that of this data, which AutoV3 is"


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
    whole, data = hashlib.sha256(), hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        buffer = bytearray(HASH_BLOCK_BYTES)
        whole.update(stream.read(data_start))
        counter.add(data_start)
        while count := stream.readinto(buffer):
            block = memoryview(buffer)[:count]
            whole.update(block)
            data.update(block)
            counter.add(count)
    return FileHashes(whole.hexdigest(), data.hexdigest())


def hash_files(
    paths: Sequence[Path],
    threads: int = 0,
    on_progress: Progress = lambda done, total: None,
    read_again: bool = False,
) -> list[FileHashes]:
    """The hashes of safetensors files, from the cache where a file is unchanged since it was hashed.

    `read_again`: read every file, for answers that are the hash; no cache sees a disk that loses bits.
    """
    held = {} if read_again else {key: hashes for key, hashes in load_hashes().items() if len(hashes) == 2}
    keys = [key_of_file(path) for path in paths]
    wanted = {key: path for key, path in zip(keys, paths, strict=True) if key not in held}
    if wanted:
        counter = HashCounter(sum(path.stat().st_size for path in wanted.values()), on_progress)
        with ThreadPoolExecutor(threads or count_cores()) as pool:
            try:
                found = list(pool.map(lambda path: hash_file(path, counter), wanted.values()))
            except BaseException:
                counter.stopped = True
                raise
        added = {key: [hashes.sha256, hashes.data_sha256] for key, hashes in zip(wanted, found, strict=True)}
        held.update(added)
        # A file that was written to meanwhile is not what was read.
        keep_hashes({key: hashes for key, hashes in added.items() if key_of_file(wanted[key]) == key})
    return [FileHashes(*held[key]) for key in keys]
