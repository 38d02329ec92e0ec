"""Walk through the headers of a tar: names, places and sizes of its files, and where it is damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bytes2D = npt.NDArray[np.uint8]

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
HEADERS_A_BATCH = 2048
"""Headers whose checksums are summed at once."""

EXTENDED_HEADER_BYTES = 1 << 20
"""No long name or pax header is larger in an honest tar of images."""

REGULAR = (ord("0"), 0, ord("7"))
REFUSED_KINDS = {
    ord("1"): "is a hard link",
    ord("2"): "is a symbolic link",
    ord("3"): "is a character device",
    ord("4"): "is a block device",
    ord("6"): "is a named pipe",
    ord("S"): "is a sparse file",
}
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL, DIRECTORY = (ord(kind) for kind in "LKxg5")
ENDS_OF_NUMBER = (0, 32)
OCTAL_PLACES = 8 ** np.arange(10, -1, -1, dtype=np.int64)


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
    """A member that is not taken."""

    name: str
    """As the archive has it."""

    reason: str
    """What is wrong with it."""


@dataclass
class TarListing:
    """What a tar holds."""

    names: list[str] = field(default_factory=list)
    """Of regular files under harmless names, in the archive's order."""

    offsets: list[int] = field(default_factory=list)
    """Where the data of each begin."""

    sizes: list[int] = field(default_factory=list)
    """Bytes of data of each."""

    sha256s: list[str] = field(default_factory=list)
    """From the index; empty when the headers were read."""

    refused: list[Refusal] = field(default_factory=list)
    """All other entries but directories."""

    from_index: bool = False
    """True when the index beside the tar was used and no header was read."""

    damage: str = ""
    """Why and where the walk through the headers ended early; "" for a whole archive."""

    @property
    def members(self) -> Iterator[Member]:
        """The regular files, one by one."""
        hashes = self.sha256s or [""] * len(self.names)
        return map(Member._make, zip(self.names, self.offsets, self.sizes, hashes, strict=True))

    def add_file(self, name: str, offset: int, member_bytes: int) -> None:
        """Put a regular file among those taken, or among the refused for its name."""
        if reason := find_name_fault(name):
            self.refused.append(Refusal(name, reason))
        else:
            self.names.append(name)
            self.offsets.append(offset)
            self.sizes.append(member_bytes)


def find_name_fault(name: str) -> str:
    """Why a name is refused, or ""."""
    if "\\" in name:
        return "has a backslash in its name"
    if name.startswith("/"):
        return "has an absolute name"
    if ".." in name.split("/"):
        return "climbs out of its folder by '..'"
    return ""


def parse_number(digits: bytes) -> int:
    """A number of a tar header: octal text, or binary after a first byte of 0x80.

    Raises ValueError for anything else, negative numbers included.
    """
    if digits and digits[0] & 0x80:
        if digits[0] != 0x80:
            raise ValueError("a negative or oversized number")
        return int.from_bytes(digits[1:], "big")
    text = digits.split(b"\0", 1)[0].strip(b" ")
    if text and not text.isdigit():
        raise ValueError("not an octal number")
    return int(text or b"0", 8)


def sum_header(header: bytes) -> int:
    """The checksum of a header: the sum of its bytes with blanks in the place of the checksum."""
    return sum(header) - sum(header[148:156]) + 8 * ord(" ")


def read_sizes(table: Bytes2D) -> tuple[list[int], int]:
    """The members' sizes, and how many of the headers, from the first on, have a right checksum and a plain size.

    `table`: (headers, 512), all of regular files whose size ends with a NUL or a blank.
    """
    sums = table.sum(axis=1, dtype=np.uint32) - table[:, 148:156].sum(axis=1, dtype=np.uint32) + 8 * ord(" ")
    size_digits = table[:, 124:135] - np.uint8(ord("0"))
    sum_digits = table[:, 148:154] - np.uint8(ord("0"))
    sizes = size_digits @ OCTAL_PLACES
    plain = (size_digits < 8).all(axis=1) & (sum_digits < 8).all(axis=1) & (sum_digits @ OCTAL_PLACES[5:] == sums)
    for index in np.flatnonzero(~plain).tolist():
        # Written with blanks or fewer digits: rare, and read one by one.
        header = table[index].tobytes()
        try:
            sizes[index] = parse_number(header[124:136])
            right = parse_number(header[148:156]) == sums[index] and int(header[124:135], 8) == sizes[index]
        except ValueError:
            right = False
        if not right:
            return sizes.tolist(), index
    return sizes.tolist(), len(table)


def count_padded(member_bytes: int) -> int:
    """The bytes that data of this size take in the archive: whole blocks."""
    return -(-member_bytes // BLOCK) * BLOCK


def read_names(table: Bytes2D) -> list[str]:
    """The members' names in their own headers, with the prefix that POSIX tars keep apart.

    `table`: (headers, 512).
    """
    names: list[bytes] = np.ascontiguousarray(table[:, :100]).view("S100").ravel().tolist()
    for index in np.flatnonzero(table[:, 345]).tolist():
        names[index] = read_name(table[index].tobytes()).encode("utf-8", "surrogateescape")
    together = b"\n".join(names)
    if b"\0" not in together and together.count(b"\n") == len(names) - 1:
        return together.decode("utf-8", "surrogateescape").split("\n")
    return [name.split(b"\0", 1)[0].decode("utf-8", "surrogateescape") for name in names]


def parse_pax(content: bytes) -> dict[str, str]:
    """The records of a pax header, each `LENGTH KEY=VALUE` and a line end.

    Raises ValueError for a broken one.
    """
    records = {}
    position = 0
    while position < len(content) and content[position]:
        length_text, _, _ = content[position : position + 20].partition(b" ")
        length = int(length_text)
        record = content[position + len(length_text) + 1 : position + length]
        if length <= len(length_text) + 1 or not record.endswith(b"\n") or b"=" not in record:
            raise ValueError("a broken pax record")
        key, _, value = record[:-1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position += length
    return records


class HeaderWalk:
    """One walk through the headers of an open tar, reading nothing else."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._descriptor = descriptor
        self._size_bytes = size_bytes
        self._listing = TarListing()
        self._headers: list[bytes] = []
        self._offsets: list[int] = []
        self._long_name = ""
        self._pax: dict[str, str] = {}

    def walk(self) -> TarListing:
        """List all members up to the end or the first damage."""
        offset = 0
        damage = ""
        while not damage:
            try:
                offset, header = self._read_batch(offset)
                damage = self._settle_batch()
                if damage or header == ZERO_BLOCK:
                    break
                if len(header) < BLOCK:
                    cut = offset > self._size_bytes
                    damage = "is cut short" if cut else f"ends at byte {self._size_bytes} without its closing blocks"
                elif header:
                    offset += BLOCK + count_padded(self._take_special(header, offset + BLOCK))
            except (ValueError, OSError) as error:
                damage = self._settle_batch() or f"header at byte {offset}: {error}"
        self._listing.damage = damage
        return self._listing

    def _read_batch(self, offset: int) -> tuple[int, bytes]:
        """Read headers of plain files from `offset` on; where it stopped, and the header that is something else.

        What is no number here is found with the checksums, a batch later.
        """
        descriptor, pread = self._descriptor, os.pread
        add_header, add_offset = self._headers.append, self._offsets.append
        regular, ends = REGULAR, ENDS_OF_NUMBER
        special = bool(self._pax or self._long_name)
        header = b""
        try:
            for _ in range(HEADERS_A_BATCH):
                header = pread(descriptor, BLOCK, offset)
                plain = len(header) == BLOCK and header[0] and header[156] in regular and header[135] in ends
                if special or not plain:
                    return offset, header
                member_bytes = int(header[124:135], 8)
                add_header(header)
                add_offset(offset)
                offset += member_bytes + 1023 & -512
        except ValueError:
            return offset, header
        return offset, pread(descriptor, BLOCK, offset)

    def _settle_batch(self) -> str:
        """Check the headers read so far and list their members; the damage, if any."""
        if not self._headers:
            return ""
        table = np.frombuffer(b"".join(self._headers), dtype=np.uint8).reshape(-1, BLOCK)
        sizes, right = read_sizes(table)
        damage = ""
        if right < len(table):
            damage = f"header at byte {self._offsets[right]}: wrong checksum or size"
        offsets = np.array(self._offsets[:right]) + BLOCK
        names = read_names(table[:right])
        text = "".join(names)
        if "/" in text or "\\" in text or (right and offsets[-1] + sizes[right - 1] > self._size_bytes):
            for name, offset, member_bytes in zip(names, offsets.tolist(), sizes, strict=False):
                self._take_file(name, offset, member_bytes)
        else:
            self._listing.names += names
            self._listing.offsets += offsets.tolist()
            self._listing.sizes += sizes[:right]
        self._headers.clear()
        self._offsets.clear()
        return damage

    def _take_file(self, name: str, offset: int, member_bytes: int) -> None:
        if offset + member_bytes > self._size_bytes:
            self._listing.refused.append(Refusal(name, "is cut short by the end of the archive"))
        else:
            self._listing.add_file(name, offset, member_bytes)

    def _take_special(self, header: bytes, offset: int) -> int:
        """Deal with an entry that is not a plain file with a plain name; the bytes of data that follow its header.

        Raises ValueError for damage.
        """
        member_bytes = parse_number(header[124:136])
        if parse_number(header[148:156]) != sum_header(header):
            raise ValueError("wrong checksum")
        kind = header[156]
        if kind in (LONG_NAME, PAX):
            content = self._read_extended(offset, member_bytes)
            if kind == LONG_NAME:
                self._long_name = content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            else:
                self._pax = parse_pax(content)
            return member_bytes
        if kind in (LONG_LINK, PAX_GLOBAL):
            return member_bytes
        name = self._pax.get("path") or self._long_name or read_name(header)
        sparse = any(key.startswith("GNU.sparse") for key in self._pax)
        if "size" in self._pax:
            member_bytes = int(self._pax["size"])
            if member_bytes < 0:
                raise ValueError("a negative size")
        self._long_name, self._pax = "", {}
        if kind in REGULAR and not sparse:
            self._take_file(name, offset, member_bytes)
            return member_bytes
        if kind != DIRECTORY:
            reason = "is a sparse file" if sparse else REFUSED_KINDS.get(kind, f"is of the unknown kind {chr(kind)!r}")
            self._listing.refused.append(Refusal(name, reason))
        # Links, devices and directories have no data, whatever their size says.
        return 0 if ord("1") <= kind <= ord("6") else member_bytes

    def _read_extended(self, offset: int, member_bytes: int) -> bytes:
        if member_bytes > EXTENDED_HEADER_BYTES:
            raise ValueError(f"a name of {member_bytes} bytes")
        return os.pread(self._descriptor, member_bytes, offset)


def read_name(header: bytes) -> str:
    """The member's name in its own header, with the prefix that POSIX tars keep apart."""
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")
