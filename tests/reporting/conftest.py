"""Runs of the plain worker for every test of this room."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kohaku_wrap.training.records.folder import Run

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "training")]


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Run]:
    """Makes runs below one runs folder."""
    from plain_runs import make_run

    return lambda name="r", **options: make_run(tmp_path / "runs" / name, **options)
