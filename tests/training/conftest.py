"""Runs of the plain worker for every test of this room."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kohaku_wrap.training.records.folder import Run

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Run]:
    """Makes runs below one runs folder."""
    from plain_runs import make_run

    return lambda name="r", **options: make_run(tmp_path / "runs" / name, **options)


@pytest.fixture
def mount_disk() -> Iterator[Callable[[Path, int], None]]:
    """Mounts a tmpfs of so many MiB on a folder; the test is skipped where that is not permitted."""
    folders: list[Path] = []

    def mount(folder: Path, size_mib: int) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs is not permitted here")
        folders.append(folder)

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=False)
