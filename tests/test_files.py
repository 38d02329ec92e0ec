"""Atomic files: the final name holds the whole content or what it held before."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kohaku_wrap.files import atomic_write, home_folder, kept_answer, link_file, parse_json, shipped_folder, write_text


def test_a_failed_write_leaves_the_former_content_and_no_neighbour(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with pytest.raises(RuntimeError), atomic_write(path) as stream:
        stream.write("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_write_names_the_file_that_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(OSError) as failed, atomic_write(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert failed.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as failed, atomic_write(path):
        (tmp_path / "b.txt").read_text()
    assert failed.value.filename == str(tmp_path / "b.txt")


def test_a_killed_write_never_shows_under_the_final_name(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    code = (
        "import sys, time; from pathlib import Path; from kohaku_wrap.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1]), 'wb') as stream:\n"
        "    stream.write(b'x' * 1000000); stream.flush(); print('written', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    assert not path.exists()


def test_home_is_kwrap_home_where_it_is_set(home: Path) -> None:
    assert home_folder() == home


@pytest.mark.parametrize("name", ["templates", "datasets"])
def test_shipped_folders_hold_toml(name: str) -> None:
    assert list(shipped_folder(name).glob("*.toml"))


def test_the_help_is_quick_and_free_of_torch() -> None:
    code = (
        "import sys; from kohaku_wrap.cli import run_program; run_program(['--help']); "
        "print('torch' in sys.modules, 'pandas' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["False", "False"]


@pytest.mark.parametrize("text", ["[" * 100_000, "{", ""])
def test_a_document_that_cannot_be_read_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("kept", ["", "[]", "{}", '{"a": []}', "[" * 50_000, "\udcff"])
def test_a_kept_answer_that_cannot_be_read_is_asked_for_anew(kept: str, tmp_path: Path) -> None:
    place = tmp_path / "kept.json"
    place.write_text(kept, errors="surrogateescape")
    answers = iter([{"a": 3}, {"a": 4}])
    for _ in range(2):
        assert kept_answer(place, lambda found: int(found["a"]), lambda: next(answers)) == 3


def test_an_answer_is_given_where_it_cannot_be_kept(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for place in (tmp_path / "pipe", tmp_path / "file" / "kept.json", None):
        assert kept_answer(place, lambda found: int(found["a"]), lambda: {"a": 3}) == 3
    assert (tmp_path / "pipe").is_fifo()


def test_a_second_name_is_a_link_here_and_a_copy_on_another_disk(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_bytes(b"rows")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for place in (tmp_path / "b", Path(folder) / "b"):
            link_file(source, place)
            assert place.read_bytes() == b"rows"
            assert place.samefile(source) == (place.stat().st_dev == source.stat().st_dev)
        assert place.stat().st_dev != source.stat().st_dev
