"""What every test gets: a home of its own, quiet colours, pinned threads; and what tests of several rooms ask for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import database_writer
import pyarrow as pa
import pytest
from hypothesis import settings

from kohaku_wrap.config.site import Site, load_site
from kohaku_wrap.trainer.checkout import Checkout, TrainerMissing, find_checkout
from kohaku_wrap.trainer.requirements import check_requirements
from kohaku_wrap.training.records.folder import Run

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


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Run]:
    """Makes runs of the plain worker below one runs folder."""
    from plain_runs import make_run

    return lambda name="r", **options: make_run(tmp_path / "runs" / name, **options)


@pytest.fixture(scope="session")
def kwrap() -> Callable[..., str]:
    """Runs one `kwrap` command in its own process; its output. Fails with its last lines."""

    def run(*arguments: str, expect: int = 0) -> str:
        command = [sys.executable, "-m", "kohaku_wrap", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == expect, (done.stdout + done.stderr)[-4000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture
def make_site(tmp_path: Path) -> Callable[..., Site]:
    """A function that writes a site.toml with the given [machine] and [trainer] lines and reads it."""

    def make(machine: str = "gpus = 4\nbatch_per_gpu = 4\nworkers = 2", trainer: str = "") -> Site:
        path = tmp_path / "site.toml"
        path.write_text(f"[machine]\n{machine}\n[trainer]\n{trainer}\n", encoding="utf-8")
        return load_site(path)

    return make


@pytest.fixture
def write_captions() -> Callable[[Path, Sequence[tuple[int, int]]], None]:
    """A function that makes `IMAGES/captions.arrow` as `kwrap caption` leaves it."""
    return make_captions


def make_captions(images: Path, sizes: Sequence[tuple[int, int]]) -> None:
    images.mkdir(parents=True, exist_ok=True)
    about = {
        "digest": "d" * 64,
        "count": len(sizes),
        "dataset": "demo",
        "style": "kohaku",
        "prompt_format": "<general tags>",
        "selection_sha256": "5" * 64,
    }
    metadata = {"kwrap": json.dumps(about)}
    fields = [("id", pa.int64()), ("file", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
    schema = pa.schema([*fields, ("caption", pa.large_string())], metadata=metadata)
    columns = {
        "id": list(range(len(sizes))),
        "file": [f"{index % 1000:04d}/{index}.png" for index in range(len(sizes))],
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
        "caption": ["1girl ||| solo ||| safe"] * len(sizes),
    }
    with pa.OSFile(str(images / "captions.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema))


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
