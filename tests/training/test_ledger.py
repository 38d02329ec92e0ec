"""The ledger: fixed-size records that survive what a crash does to the end of a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kohaku_wrap.training.records.ledger import (
    FILL,
    HEADER,
    RECORD,
    SUBSTITUTE,
    BadLedger,
    LedgerHeader,
    LedgerWriter,
    ledger_file,
    list_ledger_files,
    read_ledger_file,
)

FIRST = LedgerHeader(attempt=1, rank=2, processes=4, accumulation=16, batch_size=4, seed=-5)


def write(folder: Path, records: int) -> Path:
    with LedgerWriter(folder, FIRST) as ledger:
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
    header, records = read_ledger_file(path)
    assert header == FIRST
    assert records["optimizer_step"].tolist() == [1, 2, 3]
    assert records["position"].tolist() == [2, 6, 10]
    assert records["order_digest"].tolist() == [2**64 - 1, 2**64 - 2, 2**64 - 3]
    assert records["flags"].tolist() == [0, FILL, SUBSTITUTE]
    assert set(records["rank"]) == {2} and set(records["attempt"]) == {1}


def test_the_form_on_disk_is_pinned(tmp_path: Path) -> None:
    assert (HEADER.size, RECORD.itemsize) == (64, 60)
    data = write(tmp_path, 1).read_bytes()
    assert data[:8] == b"KWRAPLG2" and len(data) == 64 + 60
    assert data[64:].hex() == (
        "01000000" "01000000" "00000000" "0200" "0000" "0200000000000000"
        "ffffffffffffffff" "0000000000000000" "000000000000e03f" "2d431cebe2361a3f"
        "94d3724f"
    )  # fmt: skip


@pytest.mark.parametrize("cut", [1, 59, 60, 61])
def test_a_torn_end_is_left_out(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, 3)
    os.truncate(path, path.stat().st_size - cut)
    assert len(read_ledger_file(path)[1]) == (2 if cut <= 60 else 1)


def test_blocks_that_a_power_cut_left_empty_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, 2)
    with path.open("ab") as stream:
        stream.write(bytes(200))
    assert len(read_ledger_file(path)[1]) == 2


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
    assert len(read_ledger_file(ledger_file(tmp_path, 1, 2))[1]) == 7
