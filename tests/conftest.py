"""What every test gets: a home of its own, quiet colours, and pinned threads."""

from __future__ import annotations

import signal
from pathlib import Path
from types import ModuleType

import database_writer
import pytest
from hypothesis import settings

settings.register_profile("plain", max_examples=300, deadline=None)
# `make fuzz`: the same properties for minutes.
settings.register_profile("fuzz", max_examples=50_000, deadline=None)
settings.load_profile("plain")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs so, and children would inherit it: no interrupt could be tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty `$KWRAP_HOME`, so that no test reads or writes the person's own."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("KWRAP_HOME", str(folder))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


@pytest.fixture(scope="session")
def writer() -> ModuleType:
    """Small databases: `make_world`, `make_post`, `write_layout`, `shuffled`, `LAYOUTS`, `World`."""
    return database_writer


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests of the real trainer were skipped, and how to enable them."""
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if "sd_scripts" in getattr(report, "keywords", {})
    ]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} tests of the real sd-scripts skipped; enable them with "
            "`kwrap trainer install` or KWRAP_SD_SCRIPTS=CHECKOUT"
        )
