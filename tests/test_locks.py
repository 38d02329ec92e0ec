"""Folders that several processes work in: whose is what, and what a killed one leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kohaku_wrap.locks import making_folder


def test_a_folder_that_a_killed_process_was_filling_goes(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from pathlib import Path; from kohaku_wrap.locks import making_folder\n"
        "with making_folder(Path(sys.argv[1]), '.x-') as part:\n"
        "    (part / 'half').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with making_folder(tmp_path, ".x-") as one, making_folder(tmp_path, ".x-") as other:
        assert sorted(tmp_path.iterdir()) == sorted([one, other])
    assert not list(tmp_path.iterdir())
