"""What an engine writes into networks, and what is published of a run, tells nothing of the machine or the person."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engine_world import World

from kohaku_wrap.trainer.checkout import TrainerMissing, find_checkout

PERSON = "zz-ann-of-nowhere"
SETTINGS = (
    "effective_batch=4", "max_train_epochs=1", "save_every_n_steps=1", "max_token_length=150", 'preset="kohaku-lokr"',
    "dataset_options.resolution=[64, 64]", "dataset_options.min_bucket_reso=32", "dataset_options.max_bucket_reso=128",
)  # fmt: skip
TRAINER_HOME = os.environ.get("KWRAP_HOME", "")


@pytest.mark.parametrize("engine", ["builtin", pytest.param("sd-scripts", marks=pytest.mark.sd_scripts)])
@pytest.mark.slow
def test_nothing_tells_who_and_where(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    home = tmp_path / "home" / PERSON
    shutil.copytree(world.folder, home / "world", ignore=shutil.ignore_patterns("runs"))
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, str(home) if name == "HOME" else PERSON)
    if engine == "sd-scripts":
        if TRAINER_HOME:
            monkeypatch.setenv("KWRAP_HOME", TRAINER_HOME)
        try:
            find_checkout()
        except TrainerMissing:
            pytest.skip("sd-scripts is not installed; enable with `kwrap trainer install`")
    run, out = home / "world" / "runs" / "one", home / "published"
    settings = [part for each in SETTINGS for part in ("--set", each)]
    for arguments in (
        ["train", "demo", "--site", home / "world" / "site.toml", "--run", "one", "--engine", engine, *settings],
        ["publish", run, "--out", out],
    ):
        command = [sys.executable, "-m", "kohaku_wrap", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    files = [*(run / "checkpoints").rglob("*"), *out.rglob("*")]
    networks = [path for path in files if path.suffix == ".safetensors"]
    assert len(networks) >= 4 and out / "one-baked.safetensors" in networks
    assert any(b"preset.toml" in path.read_bytes() for path in networks), "the preset's own name stays"
    for path in filter(Path.is_file, files):
        for word in (PERSON, str(tmp_path), tmp_path.name, platform.node()):
            # A short name of a machine stands within other words.
            whole = re.compile(rb"(?<![A-Za-z0-9])" + re.escape(word.encode()) + rb"(?![A-Za-z0-9])")
            assert not whole.search(path.read_bytes()), (path, word)
