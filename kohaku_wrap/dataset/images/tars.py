"""Where each member of a tar lies: from the index beside it where that fits, otherwise from its headers.

Nothing is ever unpacked by name. Links, devices, directories and names that climb out of a folder are
refused and listed; a damaged or cut archive gives its members up to the damage, and says where it lies.
The headers are read by the standard library's tarfile, which knows every format.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from kohaku_wrap.errors import DAMAGE, KwrapError, refusing
from kohaku_wrap.files import open_regular
from kohaku_wrap.formats.disguises import START_BYTES, name_disguise

INDEX_LIMIT_BYTES = 1 << 28
"""No index of an honest tar is larger: it takes some 200 bytes a member."""

EXTENDED_HEADER_BYTES = 1 << 20
"""No long name or pax header is larger in an honest tar of images."""

REFUSED_KINDS = {
    tarfile.LNKTYPE: "is a hard link",
    tarfile.SYMTYPE: "is a symbolic link",
    tarfile.CHRTYPE: "is a character device",
    tarfile.BLKTYPE: "is a block device",
    tarfile.FIFOTYPE: "is a named pipe",
}


class TarUnreadable(KwrapError):
    """A tar that cannot be opened at all."""


class Member(NamedTuple):
    """One regular file of a tar."""

    name: str
    """As the archive has it, folders included."""

    offset: int
    """Byte at which its data begin; the last block of its header lies before."""

    size_bytes: int
    """Of its data."""

    sha256: str = ""
    """From the index, where it gives one."""


@dataclass(frozen=True)
class Refusal:
    """A member of a tar, or a file, that is not taken."""

    name: str
    """As the archive has it, or the file's path."""

    reason: str
    """What is wrong with it."""


@dataclass
class TarListing:
    """What a tar holds."""

    members: list[Member] = field(default_factory=list)
    """The regular files under harmless names, in the archive's order."""

    refused: list[Refusal] = field(default_factory=list)
    """All other entries but directories."""

    from_index: bool = False
    """True when the index beside the tar was used and no header was read."""

    damage: str = ""
    """Why and where the walk through the headers ended early; "" for a whole archive."""

    def add(self, member: Member, fault: str = "") -> None:
        """Put a member among those taken, or among the refused for this fault or for its name."""
        if reason := fault or find_name_fault(member.name):
            self.refused.append(Refusal(member.name, reason))
        else:
            self.members.append(member)


def find_name_fault(name: str) -> str:
    """Why a name is refused, or ""."""
    if "\\" in name:
        return "has a backslash in its name"
    if name.startswith("/"):
        return "has an absolute name"
    if ".." in name.split("/"):
        return "climbs out of its folder by '..'"
    return ""


class HeaderFile(io.FileIO):
    """A tar opened for its headers alone: what wants more at once than any honest header is damage."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises ValueError for a read that no header needs."""
        if size is None or not 0 <= size <= EXTENDED_HEADER_BYTES:
            raise ValueError(f"a name of {size} bytes")
        return super().read(size)


def walk_headers(descriptor: int) -> TarListing:
    """List all members up to the end or the first damage, reading nothing but headers."""
    listing = TarListing()
    size_bytes = os.fstat(descriptor).st_size
    end = 0
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        file = HeaderFile(descriptor, closefd=False)
        with tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape") as archive:
            for header in archive:
                if header.size < 0:
                    raise ValueError("a negative size")
                end = header.offset_data + header.size
                take_header(listing, header, size_bytes)
            end = archive.offset
        last = os.pread(descriptor, tarfile.BLOCKSIZE, end)
        if len(last) < tarfile.BLOCKSIZE:
            listing.damage = f"ends at byte {size_bytes} without its closing blocks"
        elif last.strip(b"\0"):
            listing.damage = f"header at byte {end}: wrong checksum or size"
    except (tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError, OSError) as error:
        end = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        listing.damage = "is cut short" if end > size_bytes else f"header at byte {end}: {error}"
    return listing


def take_header(listing: TarListing, header: tarfile.TarInfo, size_bytes: int) -> None:
    """Put what a header of a tar of `size_bytes` stands for into the listing."""
    fault = ""
    if header.isdir():
        return
    if header.issparse():
        fault = "is a sparse file"
    elif not header.isreg():
        fault = REFUSED_KINDS.get(header.type, f"is of the unknown kind {header.type.decode('latin-1')!r}")
    elif header.offset_data + header.size > size_bytes:
        fault = "is cut short by the end of the archive"
    listing.add(Member(header.name, header.offset_data, header.size), fault)


def parse_header(block: bytes) -> tarfile.TarInfo:
    """The header in a block, without what a long name or pax header before it says. Raises tarfile.HeaderError."""
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")


def list_tar(path: Path, use_index: bool = True) -> TarListing:
    """The members of the tar at `path`.

    The index `path` with the suffix .json is used when its `filesize`, where it has one, is the tar's and it lists all
    of the tar; what it leaves out is found by the headers.
    Raises TarUnreadable when the tar cannot be opened, or is something else.
    """
    with open_tar(path) as stream:
        descriptor = stream.fileno()
        refuse_disguise(path, descriptor)
        index = read_index(path.with_suffix(".json"), os.fstat(descriptor).st_size) if use_index else None
        if index and covers_tar(index, descriptor):
            return index
        listing = walk_headers(descriptor)
        return join_listings(listing, index, descriptor) if index else listing


def open_tar(path: Path) -> IO[bytes]:
    """The tar; a pipe or a device would be read without end. Raises TarUnreadable."""
    with refusing(TarUnreadable, f"{path}: cannot be read:", "Check the tar, or fetch it again."):
        return open_regular(path)


def refuse_disguise(path: Path, descriptor: int) -> None:
    """Raise TarUnreadable for what only has the name of a tar."""
    start = os.pread(descriptor, START_BYTES, 0)
    try:
        parse_header(start)
    except tarfile.HeaderError as error:
        if what := name_disguise(start):
            raise TarUnreadable(f"{path}: is {what}", "Fetch the tar again.") from error


def covers_tar(index: TarListing, descriptor: int) -> bool:
    """True where nothing but its own header lies before each member of the index, and no header after the last."""
    end = 0
    for member in sorted(index.members, key=lambda member: member.offset):
        if member.offset != end + tarfile.BLOCKSIZE:
            return False
        end = member.offset + -(-member.size_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return bool(end) and not index.refused and not os.pread(descriptor, tarfile.BLOCKSIZE, end).strip(b"\0")


def join_listings(walked: TarListing, index: TarListing, descriptor: int) -> TarListing:
    """What the headers list, with the sha256 of the index; behind damage also what only the index finds."""
    of_offset = {member.offset: member for member in index.members}
    only_index = dict(of_offset)
    for number, member in enumerate(walked.members):
        only_index.pop(member.offset, None)
        if known := of_offset.get(member.offset):
            walked.members[number] = member._replace(sha256=known.sha256)
    if walked.damage:
        walked.members += [member for member in only_index.values() if follows_header(descriptor, member)]
    return walked


def read_index(path: Path, size_bytes: int) -> TarListing | None:
    """The listing of a tar of `size_bytes` from its index, or None when it has none that fits."""
    with suppress(*DAMAGE):
        with open_regular(path) as stream:
            index = json.loads(stream.read(INDEX_LIMIT_BYTES))
        if "files" in index and index["filesize"] != size_bytes:
            return None
        listing = TarListing(from_index=True)
        # That of 2025 holds nothing but places: {"7501000.jpg": [start, end]}.
        places = index["files"] if "files" in index else {name: place_of(*ends) for name, ends in index.items()}
        for name, place in places.items():
            offset, member_bytes = place["offset"], place["size"]
            if type(offset) is not int or type(member_bytes) is not int:
                return None
            if offset < tarfile.BLOCKSIZE or member_bytes < 0 or offset + member_bytes > size_bytes:
                return None
            listing.add(Member(name, offset, member_bytes, str(place.get("sha256") or "")))
        return listing
    return None


def place_of(start: int, end: int) -> dict[str, Any]:
    """The place of a member from the bytes at which its data begin and end."""
    return {"offset": start, "size": end - start}


class TarReader:
    """An open tar whose members are read by their place, and checked against their headers."""

    def __init__(self, path: Path, wanted: Callable[[str], bool]) -> None:
        """Open and list the tar at `path`; members for whose name `wanted` is false are not kept.

        Raises TarUnreadable when it cannot be opened.
        """
        self.path = path
        self.listing = list_tar(path)
        self._wanted = wanted
        self._stream = open_tar(path)
        if self.listing.from_index and not all(follows_header(self._stream.fileno(), one) for one in self.members):
            self.listing = list_tar(path, use_index=False)

    def __enter__(self) -> TarReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stream.close()

    @property
    def members(self) -> list[Member]:
        """The wanted members."""
        return [member for member in self.listing.members if self._wanted(member.name)]

    def read(self, member: Member) -> bytes:
        """The member's data; fewer bytes than it says where the file ends before."""
        return os.pread(self._stream.fileno(), member.size_bytes, member.offset)


def follows_header(descriptor: int, member: Member) -> bool:
    """True when a header with the right checksum, size and name lies before the member's data."""
    with suppress(tarfile.HeaderError):
        header = parse_header(os.pread(descriptor, tarfile.BLOCKSIZE, member.offset - tarfile.BLOCKSIZE))
        # A long name stands in a header of its own; this one then holds its beginning.
        named = header.name == member.name or len(header.name) >= 99
        return header.isreg() and not header.issparse() and header.size == member.size_bytes and named
    return False
