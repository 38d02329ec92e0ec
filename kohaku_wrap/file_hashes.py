"""The sha256 of files, and those that kwrap keeps so that an unchanged file is read only once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from kohaku_wrap.files import home_folder, open_regular, read_json, write_text

HASH_BLOCK_BYTES = 1 << 22

KEPT_HASHES = "file-hashes.json"
"""Below kwrap's own folder, so that an unchanged file is read only once."""

HASHES_KEPT = 4096


def sha256_of_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The file's sha256 in hex; `on_bytes` is told the size of each block read."""
    digest = hashlib.sha256()
    with open_regular(Path(path)) as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
            if on_bytes:
                on_bytes(len(block))
    return digest.hexdigest()


def kept_sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The file's sha256 in hex; not read again where it is unchanged since it was last hashed.

    For answers that are the hash use `sha256_of_file`: a disk that loses bits changes no time of a file.
    """
    key = key_of_file(path)
    if held := load_hashes().get(key):
        return held[0]
    digest = sha256_of_file(path, on_bytes)
    if key_of_file(path) == key:
        keep_hashes({key: [digest]})
    return digest


def keeps_sha256(path: Path) -> bool:
    """Whether `kept_sha256` would not read the file."""
    return key_of_file(path) in load_hashes()


def count_unhashed(paths: Iterable[Path]) -> int:
    """Bytes of those of the files that are there and that `kept_sha256` would read; for progress."""
    return sum(path.stat().st_size for path in set(paths) if path.is_file() and not keeps_sha256(path))


def key_of_file(path: Path) -> str:
    """What must stay the same for a kept hash to hold: path, size, inode, and the times of data and of the inode.

    A program can put the time of the data back, but not that of the inode.
    """
    status = path.stat()
    return f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}|{status.st_ino}"


def load_hashes() -> dict[str, list[str]]:
    """The kept hashes by key: the sha256, for a safetensors file perhaps also that of its data; none if unreadable."""
    held = read_json(home_folder() / KEPT_HASHES)
    return {key: hashes for key, hashes in held.items() if isinstance(hashes, list) and hashes}


def find_by_hash(sha256: str) -> Path | None:
    """A file that still is what its kept hash says; None where no such file is known."""
    for key, hashes in load_hashes().items():
        path = Path(key.rsplit("|", 4)[0])
        if hashes[0] == sha256 and path.is_file() and key_of_file(path) == key:
            return path
    return None


def keep_hashes(added: dict[str, list[str]]) -> None:
    """Add to the kept hashes; where they cannot be written it is no failure."""
    held = {**load_hashes(), **added}
    newest = dict(list(held.items())[-HASHES_KEPT:])
    with suppress(OSError):
        write_text(home_folder() / KEPT_HASHES, json.dumps(newest, indent=0))


def sha256_of_text(text: str) -> str:
    """The sha256 of the text's UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()
