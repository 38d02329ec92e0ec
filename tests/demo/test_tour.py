"""What the tour says at its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kohaku_wrap.demo.tour import print_next


def test_the_way_to_the_command_is_told_where_it_is_not_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    print_next(Path("my demo/runs/epsilon"), demo=True)
    first, way, *_ = capsys.readouterr().out.splitlines()
    assert first == "Next: kwrap status 'my demo/runs/epsilon'"
    assert ". .venv/bin/activate" in way
    (tmp_path / "kwrap").touch(0o755)
    print_next(Path("runs/epsilon"), demo=False)
    assert capsys.readouterr().out == "Next: kwrap status runs/epsilon\n"


UNREAD = """
from kohaku_wrap.demo.tour import Stage, run_stage
from kohaku_wrap.outlets import run_as_work

def main():
    run_stage(Stage("shown", ("template", "show", "demo")))
    run_stage(Stage("made", ("template", "cp", "demo", "mine.toml")))
    print("done")
    return 0

run_as_work(main)
"""


@pytest.mark.parametrize("place", ["reader gone", "full log", "closed"])
def test_what_nobody_reads_is_no_reason_to_stop(tmp_path: Path, place: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    output = os.open("/dev/full", os.O_WRONLY) if place == "full log" else writer
    close = "exec >&- 2>&-; " if place == "closed" else ""
    argv = ["bash", "-c", f'{close}exec "$@"', "bash", sys.executable, "-c", UNREAD]
    code = subprocess.run(argv, stdout=output, stderr=output, cwd=tmp_path, check=False, timeout=120).returncode
    os.close(writer)
    assert code == 0 and (tmp_path / "mine.toml").is_file()
