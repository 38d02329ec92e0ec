"""A run through the ordinary days of a person: stopped, renamed, moved, made longer, branched, published."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toml
from engine_world import World, await_text, kwrap, train_arguments

from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.records.networks import is_finished

UNET, TEXT = 1e-3, 2e-4
OPTIONS = (
    f"unet_lr={UNET}",
    f"text_encoder_lr=[{TEXT}]",
    "optimizer_type=AdamW",
    "optimizer_args.weight_decay=0.1",
    "lr_scheduler=constant",
    "lr_warmup_steps=0",
    "states.keep=9",
)


def do(*arguments: object) -> str:
    """What a command printed; it must have done its work, without any `--allow`."""
    done = kwrap(*map(str, arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def prove(run: Run) -> None:
    report: dict[str, Any] = json.loads(kwrap("verify", str(run.folder), "--json").stdout)
    assert report["proved"], report


@pytest.fixture(params=["builtin", pytest.param("sd-scripts", marks=pytest.mark.sd_scripts)])
def home(request: pytest.FixtureRequest, world: World, tmp_path: Path) -> World:
    """A world of its own, since its files are moved."""
    engine = str(request.param)
    if engine == "sd-scripts":
        request.getfixturevalue("use_trainer")
    own = World(tmp_path / "disk")
    for folder in ("images", "base"):
        shutil.copytree(world.folder / folder, own.folder / folder)
    document = toml.loads(world.site.read_text(encoding="utf-8"))
    document["machine"]["engine"] = engine
    own.site.write_text(toml.dumps(document), encoding="utf-8")
    return own


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_day_in_the_life(home: World, tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "kohaku_wrap", *train_arguments(home.site, "monday", *OPTIONS)]
        training = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        await_text(log, "state of optimizer step 1 saved", training)
        training.send_signal(signal.SIGINT)
        assert training.wait(300) == 130, log.read_text()
    finally:
        training.kill()
        training.wait()
    prove(Run(home.folder / "runs" / "monday"))

    do("rename", home.folder / "runs" / "monday", "tuesday")
    run = Run(home.folder / "runs" / "tuesday")
    (home.folder / "other").mkdir()
    shutil.move(home.images, home.folder / "other" / "pictures")
    shutil.move(home.base_model.parent, home.folder / "other" / "models")
    document = toml.loads(home.site.read_text(encoding="utf-8"))
    document["paths"] |= {
        "images": "other/pictures",
        "base_model": "other/models/model.safetensors",
        "tokenizers": "other/models/tokenizers",
    }
    home.site.write_text(toml.dumps(document), encoding="utf-8")
    do("resume", run.folder)
    assert is_finished(run)
    prove(run)

    do("extend", run.folder, "--epochs", 1)
    run = Run(run.folder)
    assert is_finished(run) and len(run.lock.chapters) == 2
    steps = run.lock.total_optimizer_steps
    assert [line["optimizer_step"] for line in read_metrics(run)] == list(range(1, steps + 1))
    prove(run)

    halves = (f"unet_lr={UNET / 2}", f"text_encoder_lr=[{TEXT / 2}]", "optimizer_args.weight_decay=0.3")
    chosen = [word for setting in (*halves, "max_train_epochs=4") for word in ("--set", setting)]
    do("branch", run.folder, "--step", 2, "--run", "half", *chosen)
    branch = Run(run.folder.parent / "half")
    lines = read_metrics(branch)
    assert [line["optimizer_step"] for line in lines] == list(range(3, branch.lock.total_optimizer_steps + 1))
    assert len(lines) >= 5
    for line in lines:
        assert line["lr_unet"] == pytest.approx(UNET / 2, rel=1e-12)
        assert line["lr_text_encoder"] == pytest.approx(TEXT / 2, rel=1e-12)
        assert line["weight_decay_unet"] == line["weight_decay_text_encoder"] == 0.3
    prove(branch)

    do("publish", branch.folder, "--out", tmp_path / "published")
    published = {path.name for path in (tmp_path / "published").iterdir()}
    assert {"half.safetensors", "half-baked.safetensors", "README.md", "SHA256SUMS", "report.html"} <= published
