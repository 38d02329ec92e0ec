"""A folder of one's own in real processes: trained, killed, grown by an import, resumed on what it began with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import toml
from engine_world import World, kwrap, train_arguments
from PIL import Image

from kohaku_wrap.proving.killing import Kill, train_with_kills
from kohaku_wrap.training.records.folder import Run


def paint(path: Path, number: int, caption: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise([(90, 60), (60, 90), (64, 64)][number % 3], 60).convert("RGB").save(path)
    if caption:
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def json_of(*words: object) -> dict:
    done = kwrap(*map(str, words), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def place(world: World, tmp_path: Path) -> Path:
    """N_name folders with three images of two repeats and two of one, and a site for their import."""
    for number in range(3):
        paint(tmp_path / "img" / "2_ann" / f"{number} ü.png", number, f"ann, tag {number}, smile" if number else "")
    for number in range(2):
        paint(tmp_path / "img" / "1_bob" / f"{number}.jpg", number, f"bob, tag {number}")
    paths = {"images": str(tmp_path / "images"), "runs": str(tmp_path / "runs"), "base_model": str(world.base_model)}
    machine = {"engine": "builtin", "gpus": 0, "batch_per_gpu": 2, "workers": 0}
    site = {"paths": paths | {"tokenizers": str(world.tokenizers)}, "machine": machine}
    (tmp_path / "site.toml").write_text(toml.dumps(site), encoding="utf-8")
    assert json_of("import", tmp_path / "img", "--out", tmp_path / "images")["total"] == 5
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_of_own_images_goes_on_with_those_it_began_with(place: Path) -> None:
    site = place / "site.toml"
    run = Run(place / "runs" / "r")
    train_with_kills(run, train_arguments(site, "r"), (Kill(0.5),), (0, 1), place)
    assert run.lock.images == 8
    assert run.lock.tables["run"]["dataset"] == run.lock.tables["inputs"]["captions_dataset"] == "img"
    assert json_of("verify", run.folder, "--deep", 3)["faults"] == []
    paint(place / "img" / "2_ann" / "new.png", 1, "ann, new")
    (place / "img" / "1_bob" / "0.txt").write_text("other words")
    assert json_of("import", place / "img", "--out", place / "images")["written"] == 1
    step = run.lock.total_optimizer_steps - 1
    resumed = subprocess.run(
        [sys.executable, "-m", "kohaku_wrap", "resume", str(run.folder), "--step", str(step)],
        capture_output=True,
        text=True,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "imported anew and has 6 images; this run goes on with the 5" in resumed.stdout + resumed.stderr
    verified = json_of("verify", run.folder, "--deep", 3)
    assert verified["faults"] == []
    assert verified["order_checked"]
    assert verified["deep_samples"] == 3


def test_plan_and_check_say_what_a_template_does_to_captions_without_a_separator(place: Path) -> None:
    said = kwrap("plan", "demo", "--site", str(place / "site.toml"), "--set", "effective_batch=2", "--no-modules")
    begins = "the tag with which those of a folder begin ('bob', 'ann')"
    assert begins in said.stderr
    fixed = kwrap(
        "plan", "demo", "--site", str(place / "site.toml"), "--set", "effective_batch=2", "--no-modules",
        "--set", "dataset_options.keep_tokens=1", "--set", 'dataset_options.keep_tokens_separator=""',
    )  # fmt: skip
    assert begins not in fixed.stderr
    (place / "own.toml").write_text('extends = "demo"\n[batch]\neffective_batch = 2\n')
    checked = json_of("template", "check", place / "own.toml", "--site", site_of(place), "--no-modules")
    assert any("'ann'" in note for note in checked["notes"])


def site_of(place: Path) -> Path:
    return place / "site.toml"
