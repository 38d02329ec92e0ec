"""What was trained: a record of fixed size for each micro-batch and each optimizer step of a rank, as it happens."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import match_names, open_regular

MAGIC = b"KWRAPLG3"
HEADER = struct.Struct("<8sIIIIIIq32s64sIQI4xI")
"""Magic, record size, attempt, rank, processes, accumulation, batch size, seed, the run's id, the digest of its
options, header flags, a digest of the device, the chapter of the run, and the CRC-32 of these; 160 bytes.
"""

MAGIC_2 = b"KWRAPLG2"
HEADER_2 = struct.Struct("<8sIIIIIIq20xI")
"""The header of kwrap 0.1, which has no id, no digest, no flags; 64 bytes. No record of a step follows it."""

DETERMINISTIC = 1
"""Header flag: the worker asked for the same bits each time, on a device that gives them."""

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

STEP_RATES = 4
STEP_RECORD = np.dtype(
    [
        ("attempt", "<u4"),
        ("optimizer_step", "<u4"),
        ("epoch", "<u4"),
        ("rank", "<u2"),
        ("flags", "<u2"),
        ("updates", "<u4"),
        ("groups", "<u2"),
        ("first_group", "<u2"),
        ("rates", "<f8", (STEP_RATES,)),
        ("checksum", "<u4"),
    ]
)
"""Written after the optimizer step, in as many records as its groups need, STEP_RATES of them in each; same size.

`updates`: steps so far, this one included, that changed the weights; `groups`: of the optimizer; `first_group`: of
this record's rates, counted from 0. The rates are those that the step was made with.
"""

CHECKED_BYTES = RECORD.itemsize - 4

FILL = 1
"""The position only completes the epoch's last optimizer step."""

SUBSTITUTE = 2
"""An unreadable image of the batch was replaced (`--allow bad-images`)."""

STEP = 4
"""The record is a STEP_RECORD."""

SKIPPED = 8
"""The GradScaler skipped the optimizer step: the weights stayed as they were."""

NON_FINITE = 16
"""The mean loss of the optimizer step is not a number, or is infinite."""

FILE_NAME = re.compile(r"attempt-(\d+)-rank-(\d+)\.bin")

Records = npt.NDArray[np.void]
"""A structured array of RECORD."""

StepRecords = npt.NDArray[np.void]
"""A structured array of STEP_RECORD."""


class BadLedger(KwrapError):
    """A ledger file is not one, or its header is cut."""


@dataclass(frozen=True)
class LedgerHeader:
    """The beginning of a ledger file."""

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

    run_id: str = ""
    """Of the run, random; empty for a run of kwrap 0.1."""

    options_digest: str = ""
    """Of the options that decide the weights, by the run's lock; empty for a run of kwrap 0.1."""

    is_deterministic: bool = False
    """Whether the same attempt on the same machine would give the same bits; False where that is not known."""

    device_digest: int = 0
    """Of the kind of device and torch's version, unsigned 64-bit: others round otherwise. 0 where it is not known."""

    chapter: int = 1
    """Of the run, counted from 1: each time that it was made longer begins a new one."""

    version: int = 3
    """Of the file's form; 2 was written by kwrap 0.1."""


@dataclass(frozen=True)
class LedgerFile:
    """One file of the ledger."""

    header: LedgerHeader
    """Its beginning."""

    records: Records
    """Of micro-batches, in the order of the file."""

    steps: StepRecords
    """Of optimizer steps, in the order of the file; none in a file of kwrap 0.1."""

    steps_after: npt.NDArray[np.int64]
    """(steps,) how many records of micro-batches stand before each of `steps`."""


def pack_header(header: LedgerHeader) -> bytes:
    """The first bytes of a ledger file, in the form that `header.version` says."""
    fields = (
        header.attempt, header.rank, header.processes, header.accumulation, header.batch_size, header.seed,
    )  # fmt: skip
    if header.version == 2:
        return seal_header(HEADER_2, MAGIC_2, RECORD.itemsize, *fields)
    texts = (header.run_id.encode("ascii"), header.options_digest.encode("ascii"))
    flags = DETERMINISTIC * header.is_deterministic
    return seal_header(HEADER, MAGIC, RECORD.itemsize, *fields, *texts, flags, header.device_digest, header.chapter)


def seal_header(form: struct.Struct, *fields: bytes | int) -> bytes:
    """The fields and the CRC-32 of their bytes."""
    return form.pack(*fields, zlib.crc32(form.pack(*fields, 0)[:-4]))


def unpack_header(path: Path, data: bytes) -> tuple[LedgerHeader, int]:
    """The header of either form, and its length; raises BadLedger."""
    form, version = (HEADER_2, 2) if data.startswith(MAGIC_2) else (HEADER, 3)
    if version == 3 and len(data) >= len(MAGIC) and not data.startswith(MAGIC):
        raise BadLedger(f"{path}: not a ledger of this kwrap", "Move files that are not kwrap's out of ledger/.")
    if len(data) < form.size:
        raise BadLedger(f"{path}: the header is cut", "The crash came before the first record; remove this file.")
    _, record_size, *fields, checksum = form.unpack_from(data)
    if zlib.crc32(data[: form.size - 4]) != checksum or record_size != RECORD.itemsize:
        raise BadLedger(f"{path}: the header differs from its checksum", "The file was damaged: restore it.")
    attempt, rank, processes, accumulation, batch_size, seed, *rest = fields
    header = LedgerHeader(attempt, rank, processes, accumulation, batch_size, seed, version=version)
    if rest:
        run_id, options_digest = (each.rstrip(b"\0").decode("ascii", "replace") for each in rest[:2])
        flags, device_digest, chapter = rest[2:]
        header = replace(
            header,
            run_id=run_id,
            options_digest=options_digest,
            is_deterministic=bool(flags & DETERMINISTIC),
            device_digest=device_digest,
            # 0 in files from before there were chapters.
            chapter=chapter or 1,
        )
    return header, form.size


def compute_checksums(records: Records) -> npt.NDArray[np.uint32]:
    """What the checksum of each record must be."""
    data, size = memoryview(records.tobytes()), RECORD.itemsize
    checksums = (zlib.crc32(data[start : start + CHECKED_BYTES]) for start in range(0, len(data), size))
    return np.fromiter(checksums, dtype=np.uint32, count=len(records))


def ledger_file(ledger: Path, attempt: int, rank: int) -> Path:
    """Where one rank of one attempt writes."""
    return ledger / f"attempt-{attempt:04d}-rank-{rank:03d}.bin"


def recorded_attempts(ledger: Path) -> set[int]:
    """The attempts that left a file in the ledger's folder."""
    return {int(name[1]) for name, _ in match_names(ledger, FILE_NAME)}


class LedgerWriter:
    """Appends the records of one rank; after `write_out` SIGKILL loses none."""

    def __init__(self, ledger: Path, header: LedgerHeader) -> None:
        ledger.mkdir(parents=True, exist_ok=True)
        self.header = header
        self.path = ledger_file(ledger, header.attempt, header.rank)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._record = np.zeros(1, dtype=RECORD)
        self._step = np.zeros(1, dtype=STEP_RECORD)
        for record in (self._record, self._step):
            record["attempt"], record["rank"] = header.attempt, header.rank
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

    def append_step(
        self,
        *,
        optimizer_step: int,
        epoch: int,
        updates: int,
        rates: Sequence[float],
        is_skipped: bool = False,
        is_non_finite: bool = False,
    ) -> None:
        """Note one optimizer step after it was made, for `write_out`; `rates`: of each group of the optimizer."""
        record = self._step
        record["optimizer_step"], record["epoch"], record["updates"] = optimizer_step, epoch, updates
        record["flags"] = STEP | SKIPPED * is_skipped | NON_FINITE * is_non_finite
        record["groups"] = len(rates)
        for first in range(0, max(len(rates), 1), STEP_RATES):
            part = rates[first : first + STEP_RATES]
            record["first_group"] = first
            record["rates"] = 0.0
            record["rates"][0, : len(part)] = part
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


def read_ledger_file(path: Path) -> LedgerFile:
    """All that one file holds, of either form; what a crash tore off the end is left out. Raises BadLedger."""
    with open_regular(path) as stream:
        data = stream.read()
    header, start = unpack_header(path, data)
    whole = (len(data) - start) // RECORD.itemsize
    records = np.frombuffer(data, dtype=RECORD, count=whole, offset=start)
    # A power cut can leave a grown file whose last blocks were never written: they read as zeros.
    written = np.flatnonzero(records["optimizer_step"])
    records = records[: written[-1] + 1] if len(written) else records[:0]
    is_step = (records["flags"] & STEP) > 0 if header.version > 2 else np.zeros(len(records), dtype=bool)
    before = np.cumsum(~is_step)
    return LedgerFile(header, records[~is_step], records[is_step].view(STEP_RECORD), before[is_step])


def read_beginning(path: Path) -> tuple[LedgerHeader, int | None]:
    """The header, and the optimizer step of the first record; None where there is none. Raises BadLedger."""
    with open_regular(path) as stream:
        data = stream.read(HEADER.size + RECORD.itemsize)
    header, start = unpack_header(path, data)
    if len(data) < start + RECORD.itemsize:
        return header, None
    return header, int(np.frombuffer(data, dtype=RECORD, count=1, offset=start)["optimizer_step"][0]) or None


def list_ledger_files(ledger: Path) -> list[tuple[int, int, Path]]:
    """Attempt, rank and path of each file, in that order; a file cut before its header ended holds no record."""
    found = match_names(ledger, FILE_NAME)
    return sorted((int(name[1]), int(name[2]), path) for name, path in found if holds_header(path))


def holds_header(path: Path) -> bool:
    """Whether the file was not cut before its header ended."""
    with open_regular(path) as stream:
        data = stream.read(HEADER.size)
    return len(data) >= (HEADER if data.startswith(MAGIC) else HEADER_2).size


def digest_of_ledger(ledger: Path) -> str:
    """The sha256 over the names, sizes and bytes of a ledger's files, in the order of their names.

    Empty where there is no ledger.
    """
    files = sorted(path for path in ledger.rglob("*") if path.is_file())
    if not files:
        return ""
    digest = hashlib.sha256()
    for path in files:
        name = path.relative_to(ledger).as_posix()
        digest.update(f"{name}\n{path.stat().st_size}\n".encode())
        with path.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()
