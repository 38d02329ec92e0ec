"""A tiny world to train in, the modules of a real sd-scripts where a checkout is installed, and a disk that is full."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toml
from engine_world import CAPTION, World, write_images

from kohaku_wrap.demo.base_model import write_base_model
from kohaku_wrap.demo.tokenizers import write_tokenizers
from kohaku_wrap.trainer.checkout import TrainerMissing, find_checkout
from kohaku_wrap.trainer.requirements import requirement_paths


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


@pytest.fixture
def mount_disk() -> Iterator[Callable[[Path, int], None]]:
    """Mounts a tmpfs of so many MiB on a folder; the test is skipped where that is not permitted."""
    folders: list[Path] = []

    def mount(folder: Path, size_mib: int) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs is not permitted here")
        folders.append(folder)

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=False)
