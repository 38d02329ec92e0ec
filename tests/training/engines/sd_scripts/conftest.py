"""The real sd-scripts checkout and a demo world to train on, for tests marked `sd_scripts`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kohaku_wrap.training.records.folder import Run

SETTINGS = ("effective_batch=16", "save_every_n_steps=1", "save_precision=float", "states.keep=9")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, kwrap: Callable[..., str]) -> Path:
    """A demo world with images and captions; its site trains on one process of the CPU."""
    folder = tmp_path_factory.mktemp("demo") / "world"
    kwrap("demo", str(folder), "--posts", "24")
    database, images, selection = folder / "danbooru.db", folder / "images", folder / "demo.parquet"
    kwrap("select", "demo", "--db", str(database), "--out", str(selection))
    kwrap("extract", str(selection), "--tars", str(folder / "tars"), "--out", str(images))
    kwrap("caption", str(selection), "--db", str(database), "--out", str(images), "--dataset", "demo")
    return folder


@pytest.fixture(scope="session")
def train(trainer: object, kwrap: Callable[..., str], world: Path) -> Callable[..., Run]:
    """Trains a run of that name and engine in the world: two epochs, accumulation that does not divide the batches."""

    def run(name: str, engine: str, *settings: str) -> Run:
        options = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
        kwrap("train", "demo", "--site", str(world / "site.toml"), "--run", name, "--engine", engine, *options)
        return Run(world / "runs" / name)

    return run


@pytest.fixture(scope="session")
def whole(train: Callable[..., Run]) -> Run:
    """An uninterrupted run of the real trainer."""
    return train("whole", "sd-scripts")
