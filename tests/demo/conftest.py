"""One embedded world for all tests of the room."""

from __future__ import annotations

from pathlib import Path

import pytest

from kohaku_wrap.demo.world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The default world, whole."""
    return make_world(Path(tmp_path_factory.mktemp("demo")) / "world")
