"""What a file is that is not what its name says: the usual leftovers of a download."""

from __future__ import annotations

START_BYTES = 512
"""How much of a file tells what it is."""

STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"\x1f\x8b", "compressed with gzip; decompress it first"),
    (b"\xfd7zXZ\x00", "compressed with xz; decompress it first"),
    (b"BZh", "compressed with bzip2; decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; decompress it first"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a rar archive"),
    (b"SQLite format 3\x00", "an sqlite database"),
    (b"PAR1", "a Parquet file"),
)

TEXT_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype", "a web page, most often an error of the server; fetch the file again"),
    (b"<html", "a web page, most often an error of the server; fetch the file again"),
    (b"<head", "a web page, most often an error of the server; fetch the file again"),
    (b"<?xml", "an XML text, most often an error of the server; fetch the file again"),
    (b"<error", "an XML text, most often an error of the server; fetch the file again"),
    (b'{"', "a JSON text, most often an error of the server; fetch the file again"),
)
"""Of texts without the blanks before them, in small letters."""


def name_disguise(start: bytes) -> str:
    """What a file with this beginning is, and what to do; empty where it is nothing of this list."""
    if not start:
        return "empty; fetch the file again"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    told = [what for sign, what in STARTS if start.startswith(sign)]
    told += [what for sign, what in TEXT_STARTS if text.startswith(sign)]
    return told[0] if told else ""
