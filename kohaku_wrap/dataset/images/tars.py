"""Where each member of a tar lies: from the index beside it where that fits, otherwise from its headers.

Nothing is ever unpacked by name. Links, devices, directories and names that climb out of a folder are
refused and listed; a damaged or cut archive gives its members up to the damage, and says where it lies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kohaku_wrap.dataset.images.tars_headers import (
    BLOCK,
    REGULAR,
    HeaderWalk,
    Member,
    TarListing,
    parse_number,
    read_name,
    sum_header,
)
from kohaku_wrap.errors import KwrapError


class TarUnreadable(KwrapError):
    """A tar that cannot be opened at all."""


def list_tar(path: Path, use_index: bool = True) -> TarListing:
    """The members of the tar at `path`.

    The index `path` with the suffix .json is used when its `filesize` is the tar's.
    Raises TarUnreadable when the tar cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise TarUnreadable(f"{path}: {error.strerror}", "Check the tar, or fetch it again.") from error
    try:
        size_bytes = os.fstat(descriptor).st_size
        listing = read_index(path.with_suffix(".json"), size_bytes) if use_index else None
        return listing or HeaderWalk(descriptor, size_bytes).walk()
    finally:
        os.close(descriptor)


def read_index(path: Path, size_bytes: int) -> TarListing | None:
    """The listing of a tar of `size_bytes` from its index, or None when it has none that fits."""
    try:
        index = json.loads(path.read_bytes())
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


class TarReader:
    """An open tar whose members are read by their place, and checked against their headers."""

    def __init__(self, path: Path, wanted: Callable[[str], bool]) -> None:
        """Open and list the tar at `path`; members for whose name `wanted` is false are not kept.

        Raises TarUnreadable when it cannot be opened.
        """
        self.path = path
        self.listing = list_tar(path)
        self._wanted = wanted
        self._descriptor = os.open(path, os.O_RDONLY)
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
        """True when a header with the right checksum and size lies before each wanted member."""
        for member in self.members:
            header = os.pread(self._descriptor, BLOCK, member.offset - BLOCK)
            try:
                checksum, size_bytes = parse_number(header[148:156]), parse_number(header[124:136])
            except ValueError:
                return False
            if len(header) < BLOCK or checksum != sum_header(header) or header[156] not in REGULAR:
                return False
            name = read_name(header)
            # A long name stands in a header of its own; this one then holds its beginning.
            if size_bytes != member.size_bytes or not (name == member.name or len(name) >= 99):
                return False
        return True
