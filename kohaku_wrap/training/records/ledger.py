"""What was trained: one fixed-size record a micro-batch and rank, appended as it happens."""

from __future__ import annotations

import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from kohaku_wrap.errors import KwrapError

MAGIC = b"KWRAPLG2"
HEADER = struct.Struct("<8sIIIIIIq20xI")
"""Magic, record size, attempt, rank, processes, accumulation, batch size, seed, and the CRC-32 of these; 64 bytes."""

RECORD = np.dtype(
    [
        ("attempt", "<u4"),
        ("optimizer_step", "<u4"),
        ("epoch", "<u4"),
        ("rank", "<u2"),
        ("flags", "<u2"),
        ("position", "<u8"),
        ("order_digest", "<u8"),
        ("content_digest", "<u8"),
        ("loss", "<f8"),
        ("learning_rate", "<f8"),
        ("checksum", "<u4"),
    ]
)
"""`optimizer_step` counts from 1 and is the step that the micro-batch belongs to; 0 marks no record.

`checksum`: the CRC-32 of the bytes before it.
"""

CHECKED_BYTES = RECORD.itemsize - 4

FILL = 1
"""The position only completes the epoch's last optimizer step."""

SUBSTITUTE = 2
"""An unreadable image of the batch was replaced (`--allow bad-images`)."""

FILE_NAME = re.compile(r"attempt-(\d+)-rank-(\d+)\.bin")

Records = npt.NDArray[np.void]
"""A structured array of RECORD."""


class BadLedger(KwrapError):
    """A ledger file is not one, or its header is cut."""


@dataclass(frozen=True)
class LedgerHeader:
    """The first 64 bytes of a ledger file."""

    attempt: int
    """Counted from 1."""

    rank: int
    """Of the process, from 0."""

    processes: int
    """W of the attempt."""

    accumulation: int
    """A of the attempt."""

    batch_size: int
    """Images of one batch."""

    seed: int
    """Of the run."""


def pack_header(header: LedgerHeader) -> bytes:
    """The first bytes of a ledger file."""
    fields = (
        header.attempt, header.rank, header.processes, header.accumulation, header.batch_size, header.seed,
    )  # fmt: skip
    unchecked = HEADER.pack(MAGIC, RECORD.itemsize, *fields, 0)
    return HEADER.pack(MAGIC, RECORD.itemsize, *fields, zlib.crc32(unchecked[:-4]))


def compute_checksums(records: Records) -> npt.NDArray[np.uint32]:
    """What the checksum of each record must be."""
    data, size = memoryview(records.tobytes()), RECORD.itemsize
    checksums = (zlib.crc32(data[start : start + CHECKED_BYTES]) for start in range(0, len(data), size))
    return np.fromiter(checksums, dtype=np.uint32, count=len(records))


def ledger_file(ledger: Path, attempt: int, rank: int) -> Path:
    """Where one rank of one attempt writes."""
    return ledger / f"attempt-{attempt:04d}-rank-{rank:03d}.bin"


class LedgerWriter:
    """Appends the records of one rank; after `write_out` SIGKILL loses none."""

    def __init__(self, ledger: Path, header: LedgerHeader) -> None:
        ledger.mkdir(parents=True, exist_ok=True)
        self.header = header
        self.path = ledger_file(ledger, header.attempt, header.rank)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o644)
        self._record = np.zeros(1, dtype=RECORD)
        self._record["attempt"], self._record["rank"] = header.attempt, header.rank
        self._unwritten = pack_header(header)

    def append(
        self,
        *,
        optimizer_step: int,
        epoch: int,
        position: int,
        order_digest: int,
        content_digest: int,
        loss: float,
        learning_rate: float,
        is_fill: bool = False,
        is_substitute: bool = False,
    ) -> None:
        """Note one micro-batch after its backward pass, for `write_out`; digests are unsigned 64-bit."""
        record = self._record
        record["optimizer_step"], record["epoch"], record["position"] = optimizer_step, epoch, position
        record["flags"] = FILL * is_fill | SUBSTITUTE * is_substitute
        record["order_digest"], record["content_digest"] = order_digest, content_digest
        record["loss"], record["learning_rate"] = loss, learning_rate
        record["checksum"] = compute_checksums(record)
        self._unwritten += record.tobytes()

    def write_out(self) -> None:
        """Hand what was noted to the system; may be called again after a full disk, which takes a part of a record."""
        while self._unwritten:
            self._unwritten = self._unwritten[os.write(self._descriptor, self._unwritten) :]

    def sync(self) -> None:
        """Make the records durable; called on every rank before a state is written."""
        self.write_out()
        os.fsync(self._descriptor)

    def close(self) -> None:
        self.write_out()
        os.close(self._descriptor)

    def __enter__(self) -> LedgerWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_ledger_file(path: Path) -> tuple[LedgerHeader, Records]:
    """Header and whole records of one file; what a crash tore off the end is left out."""
    data = path.read_bytes()
    if len(data) < HEADER.size:
        raise BadLedger(f"{path}: the header is cut", "The crash came before the first record; remove this file.")
    magic, record_size, *fields, checksum = HEADER.unpack_from(data)
    if magic != MAGIC or record_size != RECORD.itemsize:
        raise BadLedger(f"{path}: not a ledger of this kwrap", "Move files that are not kwrap's out of ledger/.")
    if zlib.crc32(data[: HEADER.size - 4]) != checksum:
        raise BadLedger(f"{path}: the header differs from its checksum", "The file was damaged: restore it.")
    whole = (len(data) - HEADER.size) // RECORD.itemsize
    records = np.frombuffer(data, dtype=RECORD, count=whole, offset=HEADER.size)
    # A power cut can leave a grown file whose last blocks were never written: they read as zeros.
    written = np.flatnonzero(records["optimizer_step"])
    records = records[: written[-1] + 1] if len(written) else records[:0]
    return LedgerHeader(*fields), records


def list_ledger_files(ledger: Path) -> list[tuple[int, int, Path]]:
    """Attempt, rank and path of each file, in that order; a file cut before its header ended holds no record."""
    if not ledger.is_dir():
        return []
    found = [(FILE_NAME.fullmatch(path.name), path) for path in ledger.iterdir()]
    return sorted(
        (int(match.group(1)), int(match.group(2)), path)
        for match, path in found
        if match and path.stat().st_size >= HEADER.size
    )
