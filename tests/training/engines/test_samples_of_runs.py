"""`[samples]` by kwrap beside a real training: whatever becomes of the process that draws, the training is the same."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import toml
from engine_world import World

from kohaku_wrap.proving.likeness import compare_runs
from kohaku_wrap.training.records.folder import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRAINED = (
    "effective_batch=4",
    "max_train_epochs=1",
    "save_every_n_steps=1",
    "save_precision=float",
    "dataset_options.resolution=[64, 64]",
    "dataset_options.min_bucket_reso=32",
    "dataset_options.max_bucket_reso=128",
)
DRAWN = ('samples.by="kwrap"', 'samples.prompts=["1girl, hat"]', "samples.steps=2")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "kohaku_wrap", *words]


def kwrap(*words: str) -> str:
    done = subprocess.run(command(*words), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(site: Path, runs: Path, name: str, settings: Sequence[str], kill_drawing: bool = False) -> tuple[Run, int]:
    """The run, trained with exit code 0, and how many processes that draw were killed meanwhile."""
    chosen = [part for setting in (*TRAINED, *settings) for part in ("--set", setting)]
    killed: set[int] = set()
    with (runs.parent / f"{name}.log").open("w+") as log:
        process = psutil.Popen(command("train", "demo", "--site", str(site), "--run", name, *chosen), stdout=log,
                               stderr=subprocess.STDOUT)  # fmt: skip
        while process.poll() is None:
            for child in process.children() if kill_drawing else ():
                with suppress(psutil.Error):  # it ends by itself meanwhile
                    if "--queued" in child.cmdline():
                        child.kill()
                        killed.add(child.pid)
            time.sleep(0.05)
        log.seek(0)
        assert process.returncode == 0, log.read()
    return Run(runs / name), len(killed)


@pytest.fixture(scope="module")
def without(world: World) -> Run:
    """The same training without pictures."""
    return train(world.site, world.folder / "runs", "without", ())[0]


@pytest.mark.parametrize("trouble", ["fails", "is killed"])
def test_a_training_does_not_feel_who_draws(world: World, without: Run, trouble: str) -> None:
    site = world.site
    if trouble == "fails":
        site = world.folder / "site-without-that-gpu.toml"
        document = toml.loads(world.site.read_text(encoding="utf-8"))
        document["machine"]["sample_device"] = "cuda:99"
        site.write_text(toml.dumps(document), encoding="utf-8")
    name = f"drawing-{trouble.replace(' ', '-')}"
    run, killed = train(site, world.folder / "runs", name, DRAWN, kill_drawing=trouble == "is killed")
    assert bool(killed) == (trouble == "is killed")
    compare_runs(without, run)
    said = (run.folder / "supervisor.log").read_text(encoding="utf-8")
    assert "pictures were not drawn" in said and "--queued" in said
    steps = [1, run.lock.total_optimizer_steps]
    assert json.loads(kwrap("status", str(run.folder), "--json"))["samples_waiting"] == steps
    assert "pictures to draw" in kwrap("status", str(run.folder))

    kwrap("sample", "--run", str(run.folder), "--queued", "--device", "cpu")
    assert json.loads(kwrap("status", str(run.folder), "--json"))["samples_waiting"] == []
    for step in steps:
        names = {path.name for path in (run.samples / f"optimizer-step-{step:08d}").glob("*.png")}
        assert len(names) == 2 and "contact-sheet.png" in names
    assert json.loads(kwrap("sample", "--run", str(run.folder), "--queued", "--json"))["queue"] == []
