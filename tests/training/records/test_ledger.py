"""The ledger: fixed-size records that survive what a crash does to the end of a file."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kohaku_wrap.training.records.ledger import (
    FILL,
    HEADER,
    MAGIC,
    NON_FINITE,
    RECORD,
    SKIPPED,
    STEP,
    STEP_RECORD,
    SUBSTITUTE,
    BadLedger,
    LedgerHeader,
    LedgerWriter,
    compute_checksums,
    ledger_file,
    list_ledger_files,
    pack_header,
    read_ledger_file,
    seal_header,
)

FIRST = LedgerHeader(
    attempt=1, rank=2, processes=4, accumulation=16, batch_size=4, seed=-5,
    run_id="c0ffee" * 5 + "aa", options_digest="0123456789abcdef" * 4, is_deterministic=True, device_digest=2**64 - 5,
)  # fmt: skip


def write(folder: Path, records: int) -> Path:
    with closing(LedgerWriter(folder, FIRST)) as ledger:
        for each in range(records):
            ledger.append(
                optimizer_step=each + 1, epoch=0, position=4 * each + 2, order_digest=2**64 - 1 - each,
                content_digest=each, loss=0.5, learning_rate=1e-4, is_fill=each == 1, is_substitute=each == 2,
            )  # fmt: skip
        ledger.sync()
    return ledger.path


def test_reads_what_was_appended(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    assert path == ledger_file(tmp_path, 1, 2) and list_ledger_files(tmp_path) == [(1, 2, path)]
    file = read_ledger_file(path)
    header, records = file.header, file.records
    assert header == FIRST
    assert records["optimizer_step"].tolist() == [1, 2, 3]
    assert records["position"].tolist() == [2, 6, 10]
    assert records["order_digest"].tolist() == [2**64 - 1, 2**64 - 2, 2**64 - 3]
    assert records["flags"].tolist() == [0, FILL, SUBSTITUTE]
    assert set(records["rank"]) == {2} and set(records["attempt"]) == {1}


def test_the_form_on_disk_is_pinned(tmp_path: Path) -> None:
    assert (HEADER.size, RECORD.itemsize, STEP_RECORD.itemsize) == (160, 60, 60)
    data = write(tmp_path, 1).read_bytes()
    assert data[:8] == b"KWRAPLG3" and len(data) == 160 + 60
    assert data[40:72] == b"c0ffee" * 5 + b"aa" and data[72:136] == b"0123456789abcdef" * 4
    assert data[160:].hex() == (
        "01000000" "01000000" "00000000" "0200" "0000" "0200000000000000"
        "ffffffffffffffff" "0000000000000000" "000000000000e03f" "2d431cebe2361a3f"
        "94d3724f"
    )  # fmt: skip


def test_steps_stand_after_their_micro_batches_with_the_rates_of_all_groups(tmp_path: Path) -> None:
    many = [1e-4 * group for group in range(6)]
    with closing(LedgerWriter(tmp_path, FIRST)) as ledger:
        for step in (1, 2):
            for position in (0, 4):
                ledger.append(
                    optimizer_step=step, epoch=0, position=position, order_digest=0, content_digest=0, loss=1.0,
                    learning_rate=1e-4,
                )  # fmt: skip
            ledger.append_step(
                optimizer_step=step, epoch=0, updates=1, rates=many, is_skipped=step == 2, is_non_finite=step == 2
            )
    file = read_ledger_file(ledger.path)
    assert file.header == FIRST and len(file.records) == 4
    assert file.steps["optimizer_step"].tolist() == [1, 1, 2, 2] and file.steps_after.tolist() == [2, 2, 4, 4]
    assert np.concatenate(file.steps["rates"][:2]).tolist() == [*many, 0.0, 0.0]
    assert file.steps["groups"].tolist() == [6] * 4 and file.steps["first_group"].tolist() == [0, 4, 0, 4]
    assert [flags & (SKIPPED | NON_FINITE) for flags in file.steps["flags"]] == [0, 0, *[SKIPPED | NON_FINITE] * 2]
    assert read_ledger_file(ledger.path).records["position"].tolist() == [0, 4, 0, 4]


def test_a_file_of_kwrap_0_1_is_still_read(tmp_path: Path) -> None:
    """Written by kwrap 0.1: header and one record, byte for byte."""
    path = tmp_path / "attempt-0001-rank-002.bin"
    header = bytes.fromhex("4b57524150 4c4732 3c000000 01000000 02000000 04000000 10000000 04000000 fbffffffffffffff")
    header += bytes(20)
    header += zlib.crc32(header).to_bytes(4, "little")
    record = bytes.fromhex(
        "01000000" "01000000" "00000000" "0200" "0000" "0200000000000000"
        "ffffffffffffffff" "0000000000000000" "000000000000e03f" "2d431cebe2361a3f"
        "94d3724f"
    )  # fmt: skip
    path.write_bytes(header + record)
    file = read_ledger_file(path)
    assert file.header == dataclasses.replace(
        FIRST, run_id="", options_digest="", is_deterministic=False, device_digest=0, version=2
    )
    assert file.records["position"].tolist() == [2] and not len(file.steps)
    assert pack_header(file.header) == header


def test_a_header_cut_by_a_crash_holds_no_record(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    for size_bytes in (0, 7, 63, 64, 159):
        path.write_bytes(pack_header(FIRST)[:size_bytes])
        assert list_ledger_files(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 59, 60, 61])
def test_a_torn_end_is_left_out(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, 3)
    os.truncate(path, path.stat().st_size - cut)
    assert len(read_ledger_file(path).records) == (2 if cut <= 60 else 1)


def test_blocks_that_a_power_cut_left_empty_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    with path.open("ab") as stream:
        stream.write(bytes(200))
    assert len(read_ledger_file(path).records) == 2


def test_flags_and_lengths_on_disk_are_pinned() -> None:
    assert (FILL, SUBSTITUTE, STEP, SKIPPED, NON_FINITE) == (1, 2, 4, 8, 16)
    plain = LedgerHeader(1, 0, 1, 1, 1, 1)
    assert (plain.is_deterministic, plain.device_digest, plain.version) == (False, 0, 3)
    assert pack_header(plain)[136:148] == bytes(12) and pack_header(FIRST)[136:140] == b"\1\0\0\0"
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.rank = 1  # type: ignore[misc]


@pytest.mark.parametrize(("groups", "firsts"), [(0, [0]), (1, [0]), (4, [0]), (5, [0, 4]), (8, [0, 4]), (9, [0, 4, 8])])
def test_a_step_takes_as_many_records_as_its_groups_need(tmp_path: Path, groups: int, firsts: list[int]) -> None:
    rates = [float(group + 1) for group in range(groups)]
    with closing(LedgerWriter(tmp_path, FIRST)) as ledger:
        ledger.append(
            optimizer_step=7, epoch=3, position=1, order_digest=0, content_digest=0, loss=1.0, learning_rate=1.0
        )
        ledger.append_step(optimizer_step=7, epoch=3, updates=5, rates=[9.0] * 9)
        ledger.append_step(optimizer_step=8, epoch=3, updates=6, rates=rates)
    steps = read_ledger_file(ledger.path).steps
    steps = steps[steps["optimizer_step"] == 8]
    assert steps["first_group"].tolist() == firsts and set(steps["groups"].tolist()) == {groups}
    filled = np.concatenate(steps["rates"]).tolist()
    assert filled[:groups] == rates and not any(filled[groups:])
    assert set(steps["updates"].tolist()) == {6} and set(steps["flags"].tolist()) == {STEP}
    assert set(steps["rank"].tolist()) == {2} and set(steps["epoch"].tolist()) == {3}
    assert steps["checksum"].tolist() == compute_checksums(steps).tolist()


def test_a_disk_that_takes_a_part_at_a_time_gets_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "whole", 3).read_bytes()
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    assert write(tmp_path / "parts", 3).read_bytes() == whole


def test_numbers_are_given_by_name(tmp_path: Path) -> None:
    """Two of them changed over would be recorded as they are."""
    with closing(LedgerWriter(tmp_path, FIRST)) as ledger:
        calls: list[tuple[Any, tuple[object, ...]]] = [
            (ledger.append, (1, 0, 2, 3, 4, 0.5, 1e-4)),
            (ledger.append_step, (1, 0, 1, [1e-4])),
        ]
        for append, numbers in calls:
            with pytest.raises(TypeError):
                append(*numbers)


def test_no_file_is_written_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "b", 1)
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(FileExistsError):
        LedgerWriter(path.parent, FIRST)
    with closing(LedgerWriter(path.parent, dataclasses.replace(FIRST, rank=3))) as ledger:
        pass
    with pytest.raises(OSError):  # it was closed
        os.fsync(ledger._descriptor)


def test_files_are_listed_by_attempt_and_rank(tmp_path: Path) -> None:
    assert list_ledger_files(tmp_path / "none") == []
    for attempt, rank in ((2, 0), (1, 1), (10, 0), (1, 0)):
        ledger_file(tmp_path, attempt, rank).write_bytes(pack_header(FIRST))
    ledger_file(tmp_path, 3, 0).write_bytes(pack_header(dataclasses.replace(FIRST, version=2)))
    ledger_file(tmp_path, 4, 0).write_bytes(pack_header(dataclasses.replace(FIRST, version=2)) + bytes(120))
    for name in ("attempt-0001-rank-000.bin.old", "notes.txt", "xattempt-0001-rank-000.bin"):
        (tmp_path / name).write_bytes(pack_header(FIRST))
    assert [found[:2] for found in list_ledger_files(tmp_path)] == [(1, 0), (1, 1), (2, 0), (3, 0), (4, 0), (10, 0)]


def test_every_byte_of_a_header_counts(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    data = path.read_bytes()
    for place in range(160):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(BadLedger, match="differs from its checksum" if place >= 8 else "not a ledger"):
            read_ledger_file(path)
    other = data[:8] + (61).to_bytes(4, "little") + data[12:156]
    path.write_bytes(other + zlib.crc32(other).to_bytes(4, "little") + data[160:])
    with pytest.raises(BadLedger, match="differs from its checksum"):
        read_ledger_file(path)


@pytest.mark.parametrize(("flags", "is_deterministic"), [(0, False), (1, True), (2, False), (3, True)])
def test_only_the_first_flag_of_a_header_says_deterministic(tmp_path: Path, flags: int, is_deterministic: bool) -> None:
    """The others are free for later versions."""
    path = tmp_path / "attempt-0001-rank-000.bin"
    path.write_bytes(seal_header(HEADER, MAGIC, RECORD.itemsize, 1, 0, 1, 1, 1, 1, b"", b"", flags, 0, 0))
    assert read_ledger_file(path).header.is_deterministic is is_deterministic
    assert read_ledger_file(path).header.chapter == 1, "a file from before there were chapters"


def test_a_file_with_no_more_than_its_header(tmp_path: Path) -> None:
    path = write(tmp_path, 0)
    file = read_ledger_file(path)
    header, records = file.header, file.records
    assert header == FIRST and len(records) == 0
    with path.open("ab") as stream:
        stream.write(bytes(120))
    assert len(read_ledger_file(path).records) == 0


def test_refuses_what_is_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / "attempt-0001-rank-000.bin"
    path.write_bytes(b"KWRAP")
    with pytest.raises(BadLedger, match="the header is cut"):
        read_ledger_file(path)
    assert list_ledger_files(tmp_path) == [], "a crash before the header was whole left no record"
    path.write_bytes(bytes(200))
    with pytest.raises(BadLedger, match="not a ledger"):
        read_ledger_file(path)


def test_sigkill_loses_no_record(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; sys.path.insert(0, sys.argv[1]); from test_ledger import write, FIRST, LedgerWriter\n"
        "from pathlib import Path; ledger = LedgerWriter(Path(sys.argv[2]), FIRST)\n"
        "for step in range(1, 8): ledger.append(optimizer_step=step, epoch=0, position=step, order_digest=0,"
        " content_digest=0, loss=0, learning_rate=0); ledger.write_out()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], check=False)
    assert len(read_ledger_file(ledger_file(tmp_path, 1, 2)).records) == 7


def test_a_pipe_in_place_of_a_ledger_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "attempt-0001-rank-000.bin")
    with pytest.raises(OSError, match="not a regular file"):
        list_ledger_files(tmp_path)
