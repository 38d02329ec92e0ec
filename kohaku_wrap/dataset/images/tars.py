"""Where each member of a tar lies: from the index beside it where that fits, otherwise from its headers.

Nothing is ever unpacked by name. Links, devices, directories and names that climb out of a folder are
refused and listed; a damaged or cut archive gives its members up to the damage, and says where it lies.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kohaku_wrap.dataset.images.tars_headers import (
    BLOCK,
    REGULAR,
    ZERO_BLOCK,
    HeaderWalk,
    Member,
    TarListing,
    parse_number,
    read_name,
    sum_header,
)
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.disguises import START_BYTES, name_disguise

INDEX_LIMIT_BYTES = 1 << 28
"""No index of an honest tar is larger: it takes some 200 bytes a member."""


class TarUnreadable(KwrapError):
    """A tar that cannot be opened at all."""


def list_tar(path: Path, use_index: bool = True) -> TarListing:
    """The members of the tar at `path`.

    The index `path` with the suffix .json is used when its `filesize` is the tar's and it lists all of the tar; what
    it leaves out is found by the headers. Raises TarUnreadable when the tar cannot be opened, or is something else.
    """
    descriptor = open_regular(path)
    try:
        refuse_disguise(path, descriptor)
        size_bytes = os.fstat(descriptor).st_size
        index = read_index(path.with_suffix(".json"), size_bytes) if use_index else None
        if index and covers_tar(index, descriptor):
            return index
        listing = HeaderWalk(descriptor, size_bytes).walk()
        return join_listings(listing, index, descriptor) if index else listing
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> int:
    """A descriptor of a regular file; a pipe or a device would be read without end. Raises TarUnreadable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise TarUnreadable(f"{path}: {error.strerror}", "Check the tar, or fetch it again.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TarUnreadable(f"{path}: not a regular file", "Take it away, or put the tar in its place.")
    return descriptor


def refuse_disguise(path: Path, descriptor: int) -> None:
    """Raise TarUnreadable for what only has the name of a tar."""
    start = os.pread(descriptor, START_BYTES, 0)
    try:
        if len(start) == BLOCK and (start == ZERO_BLOCK or parse_number(start[148:156]) == sum_header(start)):
            return
    except ValueError:
        pass
    if what := name_disguise(start):
        raise TarUnreadable(f"{path}: is {what}", "Fetch the tar again.")


def covers_tar(index: TarListing, descriptor: int) -> bool:
    """True where nothing but its own header lies before each member of the index, and no header after the last."""
    offsets, sizes = np.array(index.offsets, dtype=np.int64), np.array(index.sizes, dtype=np.int64)
    if not len(offsets) or index.refused:
        return False
    order = np.argsort(offsets, kind="stable")
    ends = offsets[order] + -(-sizes[order] // BLOCK) * BLOCK
    gaps = offsets[order] - np.concatenate([[0], ends[:-1]])
    return bool((gaps == BLOCK).all()) and not os.pread(descriptor, BLOCK, int(ends[-1])).strip(b"\0")


def join_listings(walked: TarListing, index: TarListing, descriptor: int) -> TarListing:
    """What the headers list, with the sha256 of the index; behind damage also what only the index finds."""
    sha256_of = dict(zip(index.offsets, index.sha256s, strict=True))
    walked.sha256s = [sha256_of.get(offset, "") for offset in walked.offsets]
    if walked.damage:
        there = set(walked.offsets)
        for member in index.members:
            if member.offset not in there and follows_header(descriptor, member):
                walked.names.append(member.name)
                walked.offsets.append(member.offset)
                walked.sizes.append(member.size_bytes)
                walked.sha256s.append(member.sha256)
    return walked


def read_index(path: Path, size_bytes: int) -> TarListing | None:
    """The listing of a tar of `size_bytes` from its index, or None when it has none that fits."""
    try:
        index = json.loads(read_regular(path, INDEX_LIMIT_BYTES))
        if index["filesize"] != size_bytes:
            return None
        listing = TarListing(from_index=True)
        for name, place in index["files"].items():
            offset, member_bytes = place["offset"], place["size"]
            if type(offset) is not int or type(member_bytes) is not int:
                return None
            if offset < BLOCK or member_bytes < 0 or offset + member_bytes > size_bytes:
                return None
            listing.add_file(name, offset, member_bytes)
            if len(listing.names) > len(listing.sha256s):
                listing.sha256s.append(str(place.get("sha256") or ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return listing


def read_regular(path: Path, limit_bytes: int) -> bytes:
    """The content of a regular file that is not too large; OSError for all else, such as pipes and devices."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit_bytes:
            raise OSError(f"{path}: not a regular file of at most {limit_bytes:,} bytes")
        return stream.read(limit_bytes)


class TarReader:
    """An open tar whose members are read by their place, and checked against their headers."""

    def __init__(self, path: Path, wanted: Callable[[str], bool]) -> None:
        """Open and list the tar at `path`; members for whose name `wanted` is false are not kept.

        Raises TarUnreadable when it cannot be opened.
        """
        self.path = path
        self.listing = list_tar(path)
        self._wanted = wanted
        self._descriptor = open_regular(path)
        if self.listing.from_index and not self._index_is_true():
            self.listing = list_tar(path, use_index=False)

    def __enter__(self) -> TarReader:
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._descriptor)

    @property
    def members(self) -> list[Member]:
        """The wanted members."""
        return [member for member in self.listing.members if self._wanted(member.name)]

    def read(self, member: Member) -> bytes:
        """The member's data; fewer bytes than it says where the file ends before."""
        return os.pread(self._descriptor, member.size_bytes, member.offset)

    def _index_is_true(self) -> bool:
        """True when its own header lies before each wanted member."""
        return all(follows_header(self._descriptor, member) for member in self.members)


def follows_header(descriptor: int, member: Member) -> bool:
    """True when a header with the right checksum, size and name lies before the member's data."""
    header = os.pread(descriptor, BLOCK, member.offset - BLOCK)
    try:
        checksum, size_bytes = parse_number(header[148:156]), parse_number(header[124:136])
    except ValueError:
        return False
    if len(header) < BLOCK or checksum != sum_header(header) or header[156] not in REGULAR:
        return False
    name = read_name(header)
    # A long name stands in a header of its own; this one then holds its beginning.
    return size_bytes == member.size_bytes and (name == member.name or len(name) >= 99)
