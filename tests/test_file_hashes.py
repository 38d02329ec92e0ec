"""Hashes of files: what is read once, and what is read again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from kohaku_wrap.file_hashes import count_unhashed, find_by_hash, kept_sha256, sha256_of_file
from kohaku_wrap.files import home_folder


def test_an_unchanged_file_is_hashed_once(tmp_path: Path) -> None:
    path, read = tmp_path / "a.bin", list[int]()
    path.write_bytes(b"before")
    assert kept_sha256(path, read.append) == kept_sha256(path, read.append) == hashlib.sha256(b"before").hexdigest()
    assert read == [6]
    path.write_bytes(b"after")
    assert kept_sha256(path, read.append) == hashlib.sha256(b"after").hexdigest()
    assert read == [6, 5]
    (home_folder() / "file-hashes.json").write_text("[1")
    assert kept_sha256(path, read.append) == hashlib.sha256(b"after").hexdigest() and read == [6, 5, 5]


def test_bytes_that_are_still_to_be_hashed_are_counted(tmp_path: Path) -> None:
    known, unknown = tmp_path / "known.bin", tmp_path / "unknown.bin"
    known.write_bytes(b"before")
    unknown.write_bytes(b"behind it")
    kept_sha256(known)
    assert count_unhashed([known, unknown, unknown, tmp_path / "none.bin"]) == 9


def test_bytes_changed_with_the_time_put_back_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    before, status = kept_sha256(path), path.stat()
    path.write_bytes(b"behind")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns and path.stat().st_ino == status.st_ino
    assert kept_sha256(path) == hashlib.sha256(b"behind").hexdigest() != before


def test_sha256_tells_the_bytes_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(os.urandom(10_000_001))
    seen: list[int] = []
    assert sha256_of_file(path, seen.append) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(seen) == 10_000_001


def test_a_pipe_is_not_hashed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        sha256_of_file(tmp_path / "pipe")


def test_a_file_is_found_by_its_kept_hash_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "style|v2|fp16.safetensors"
    path.write_bytes(b"network")
    assert find_by_hash(kept_sha256(path)) == path.resolve()
    path.write_bytes(b"another")
    assert find_by_hash(sha256_of_file(path)) is None
