"""What every test gets: a home of its own, quiet colours, and pinned threads."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import database_writer
import pytest
from hypothesis import settings

from kohaku_wrap.trainer.checkout import Checkout, TrainerMissing, find_checkout
from kohaku_wrap.trainer.requirements import check_requirements

HOW_TO_ENABLE = "enable with `kwrap trainer install`, or KWRAP_SD_SCRIPTS=CHECKOUT"

settings.register_profile("plain", max_examples=300, deadline=None)
# `make fuzz`: the same properties for minutes.
settings.register_profile("fuzz", max_examples=50_000, deadline=None)
settings.load_profile("plain")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts its background jobs so, and children would inherit it: no interrupt could be tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)


STARTED = time.monotonic()
MINUTES = float(os.environ.get("KWRAP_TEST_MINUTES") or "inf")
"""What has not begun by then is skipped, and says so: a check with a time limit of its own can run what fits."""


def pytest_runtest_setup() -> None:
    if time.monotonic() - STARTED > 60 * MINUTES:
        pytest.skip(f"not begun within {MINUTES:g} minutes (KWRAP_TEST_MINUTES)")


@dataclass(frozen=True)
class Trainer:
    """The checkout that the person has, and the home where its packages lie."""

    checkout: Checkout
    """A supported checkout."""

    home: str | None
    """`$KWRAP_HOME` as it was before the tests got their own."""


@pytest.fixture(scope="session")
def trainer() -> Trainer:
    """The person's checkout; where there is none, the test is skipped with how to enable it."""
    try:
        checkout = find_checkout()
    except TrainerMissing:
        pytest.skip(f"sd-scripts is not installed; {HOW_TO_ENABLE}")
    missing = [state.requirement.distribution for state in check_requirements() if state.is_missing]
    if missing:
        pytest.skip(f"sd-scripts lacks {', '.join(missing)}: kwrap trainer install --requirements-only")
    return Trainer(checkout, os.environ.get("KWRAP_HOME"))


@pytest.fixture
def use_trainer(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Let commands of this test find the person's checkout and packages."""
    if trainer.home is None:
        monkeypatch.delenv("KWRAP_HOME")
    else:
        monkeypatch.setenv("KWRAP_HOME", trainer.home)
    return trainer


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
