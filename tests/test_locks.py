"""Folders that several processes work in: whose is what, and what a killed one leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kohaku_wrap.locks import clear_leavings, making_folder


def test_a_folder_that_a_killed_process_was_filling_goes(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from pathlib import Path; from kohaku_wrap.locks import making_folder\n"
        "with making_folder(Path(sys.argv[1]), '.x [1]-') as part:\n"
        "    (part / 'half').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with making_folder(tmp_path, ".x [1]-") as one, making_folder(tmp_path, ".x [1]-") as other:
        assert sorted(tmp_path.iterdir()) == sorted([one, other])
    assert not list(tmp_path.iterdir())


def test_what_a_process_left_that_nobody_waited_for_goes(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        parts = [tmp_path / f".x.{pid}.part" for pid in (process.pid, os.getpid())]
        for part in parts:
            part.touch()
        clear_leavings(tmp_path, ".x.*.part")
        assert all(part.exists() for part in parts)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # It has ended, and stays a zombie.
        clear_leavings(tmp_path, ".x.*.part")
    assert [part.exists() for part in parts] == [False, True]
