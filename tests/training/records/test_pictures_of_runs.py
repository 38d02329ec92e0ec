"""The pictures of a run on the disk: where those of sd-scripts go, and how long they took."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from plain_runs import make_run

from kohaku_wrap.training.records.samples import collect_trainer_pictures, read_drawing_seconds


def test_a_run_tells_how_long_its_pictures_took(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "r", samples={"by": "kwrap", "width": 64, "height": 32, "steps": 5})
    assert read_drawing_seconds(run) is None
    for step, took in ((2, 8.0), (4, 12.0), (6, 400.0)):
        folder = run.samples / f"optimizer-step-{step:08d}"
        folder.mkdir(parents=True)
        for name, at in (("sheet.json", 0.0), ("a.png", 1.0), ("b.png", 2.0), ("contact-sheet.png", took)):
            (folder / name).write_bytes(b"")
            os.utime(folder / name, (1e9 + at, 1e9 + at))
    assert read_drawing_seconds(run) == pytest.approx(6.0 / (64 * 32 * 5))


def test_the_trainers_pictures_go_to_the_folder_of_their_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "r")
    folder = run.checkpoints / "sample"
    folder.mkdir(parents=True)
    per_epoch = run.lock.count.optimizer_steps_per_epoch
    names = {
        "r_000002_00_20261126050000_7.png": 2,
        "e000009_odd_e000001_11_20261126050100.png": per_epoch,
        "r_1234567_00_20261126050000.png": 1_234_567,
    }
    for name in (*names, "mine.png"):
        (folder / name).write_text(name)
    collect_trainer_pictures(run)
    collect_trainer_pictures(run)
    for name, step in names.items():
        assert (run.samples / f"optimizer-step-{step:08d}" / name).read_text() == name
    assert [path.name for path in folder.iterdir()] == ["mine.png"]
