"""A resume of a resumed run under accelerate before and after its fix of `skip_first_batches` (accelerate#4071).

That fix lets a loader whose first batches are skipped keep its epoch. sd-scripts calls it; kwrap's order begins at the
batch itself and must not depend on it, with kwrap's data and with the trainer's own dataset.
"""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from kohaku_wrap.processes import python_command
from kohaku_wrap.proving.killing import Kill
from kohaku_wrap.proving.likeness import compare_runs
from kohaku_wrap.proving.prove import Bench, Case, Configuration
from kohaku_wrap.training.records.folder import Run

BEFORE, AFTER = "1.14.0", "1.15.0"
KILLS = (Kill(0.6), Kill(1.3))

pytestmark = [pytest.mark.sd_scripts, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("accelerate"), "sd-scripts")
    bench.make_world()
    return bench


def train(bench: Bench, release: str, data: str, kills: tuple[Kill, ...]) -> Run:
    name = f"{data}-{release}-{len(kills)}".replace(".", "-")
    run = bench.train(Case(name, "", kills, (0, 2, 0), Configuration(data=data)))
    assert run.lock.table("versions")["accelerate"] == release
    return run


@pytest.fixture
def before_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older accelerate first on the import path of every process that is started."""
    command = python_command("-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, f"accelerate=={BEFORE}")
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip(f"accelerate {BEFORE} cannot be had from the package index; enable by a connection to it")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_the_installed_accelerate_has_the_fix() -> None:
    assert metadata.version("accelerate") == AFTER


@pytest.mark.parametrize("data", ["sd-scripts", "kwrap"])
def test_a_second_resume_is_exact_before_and_after_the_fix(
    use_trainer: Any, bench: Bench, data: str, request: pytest.FixtureRequest
) -> None:
    """kwrap's data under the newer release: every case of `make prove`."""
    whole = train(bench, AFTER, data, ())
    if data == "sd-scripts":
        assert compare_runs(whole, train(bench, AFTER, data, KILLS)).attempts == 3
    request.getfixturevalue("before_the_fix")
    assert compare_runs(whole, train(bench, BEFORE, data, KILLS)).attempts == 3
