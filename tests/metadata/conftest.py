"""The writer of small databases, as fixtures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

WRITER = Path(__file__).resolve().parents[1] / "metadata" / "database_writer.py"


def load_writer() -> ModuleType:
    """`database_writer.py`, which two test folders share."""
    if "kwrap_database_writer" not in sys.modules:
        spec = importlib.util.spec_from_file_location("kwrap_database_writer", WRITER)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["kwrap_database_writer"] = module
        spec.loader.exec_module(module)
    return sys.modules["kwrap_database_writer"]


@pytest.fixture(scope="session")
def writer() -> ModuleType:
    """`make_world`, `make_post`, `write_layout`, `shuffled`, `LAYOUTS`, `World`."""
    return load_writer()
