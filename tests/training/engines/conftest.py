"""A tiny world for both engines, and the modules of a real sd-scripts where a checkout is installed."""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toml

from kohaku_wrap.demo.base_model import write_base_model
from kohaku_wrap.demo.tokenizers import write_tokenizers
from kohaku_wrap.trainer.checkout import TrainerMissing, find_checkout
from kohaku_wrap.trainer.requirements import requirement_paths
from kohaku_wrap.training.records.folder import Run

sys.path.insert(0, str(Path(__file__).parent))

from engine_world import CAPTION, World, kwrap, train_arguments, write_images


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made once; tests that change it copy what they change."""
    world = World(tmp_path_factory.mktemp("world"))
    write_images(world.images)
    write_base_model(world.base_model.parent, seed=1)
    write_tokenizers(world.tokenizers, [CAPTION.format("one", "two")])
    paths = {
        "images": "images",
        "base_model": "base/model.safetensors",
        "tokenizers": "base/tokenizers",
        "runs": "runs",
    }
    machine = {"engine": "builtin", "gpus": 0, "batch_per_gpu": 2, "workers": 0}
    world.site.write_text(toml.dumps({"paths": paths, "machine": machine}), encoding="utf-8")
    return world


@pytest.fixture(scope="session")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Run:
    """An uninterrupted run of seven images in two epochs: one for all workers of pytest-xdist."""
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent
    with (shared / "whole-run").open("a+", encoding="utf-8") as made:
        fcntl.flock(made, fcntl.LOCK_EX)
        made.seek(0)
        if folder := made.read():
            return Run(Path(folder))
        result = kwrap(*train_arguments(world.site, "whole"))
        assert result.returncode == 0, result.stdout + result.stderr
        run = Run(world.folder / "runs" / "whole")
        made.write(str(run.folder))
        return run


@pytest.fixture(scope="session")
def sd_scripts() -> Any:
    """The trainer's own modules, where a checkout is installed; the test is skipped otherwise."""
    try:
        checkout = find_checkout()
    except TrainerMissing:
        pytest.skip("sd-scripts is not installed; enable with `kwrap trainer install`, or KWRAP_SD_SCRIPTS=CHECKOUT")
    sys.path.insert(0, str(checkout.path))
    sys.path.extend(str(path) for path in requirement_paths())
    from kohaku_wrap.training.engines.sd_scripts.torchvision_on_cpu import import_torchvision

    try:
        import_torchvision()
    except ImportError:
        pytest.skip("torchvision is missing: kwrap trainer install --requirements-only")
    import sdxl_train_network
    from library import sdxl_model_util, strategy_sdxl, train_util

    return SimpleNamespace(
        train_util=train_util,
        strategy=strategy_sdxl,
        models=sdxl_model_util,
        trainer=sdxl_train_network,
        checkout=checkout,
    )
