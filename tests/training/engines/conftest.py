"""A whole run of the builtin engine in the tiny world."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from engine_world import World, kwrap, train_arguments

from kohaku_wrap.training.records.folder import Run


@pytest.fixture(scope="session")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Run:
    """An uninterrupted run of seven images in two epochs: one for all workers of pytest-xdist."""
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent
    with (shared / "whole-run").open("a+", encoding="utf-8") as made:
        fcntl.flock(made, fcntl.LOCK_EX)
        made.seek(0)
        if folder := made.read():
            return Run(Path(folder))
        result = kwrap(*train_arguments(world.site, "whole"))
        assert result.returncode == 0, result.stdout + result.stderr
        run = Run(world.folder / "runs" / "whole")
        made.write(str(run.folder))
        return run
