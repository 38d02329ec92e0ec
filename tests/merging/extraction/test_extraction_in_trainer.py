"""A change as a LoRA against sd-scripts' own extraction, which takes full singular value decompositions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kohaku_wrap.demo.base_model import write_base_model
from kohaku_wrap.merging.extraction.changes import write_network
from kohaku_wrap.merging.plan import MergeOptions
from kohaku_wrap.merging.planning import plan_merge

pytestmark = [pytest.mark.sd_scripts, pytest.mark.slow]

RANK = 8
ALIKE = 1e-3
"""Relative, of products of single-precision factors of a change that is far from low rank."""

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, and two tuned ones: with changes of rank 4, and with changes whose singular values fall slowly."""
    folder = tmp_path_factory.mktemp("extraction")
    write_base_model(folder, seed=3)
    found = {"base": folder / "model.safetensors"}
    for name, rank in (("low", 4), ("full", 0)):
        generator = np.random.default_rng(rank)
        tensors = {key: value.float() for key, value in load_file(found["base"]).items()}
        save_file(tensors, found["base"])
        for key, value in tensors.items():
            if value.ndim < 2 or key.startswith("first_stage_model."):
                continue
            rows, columns = value.shape[0], value[0].numel()
            small = rank or min(rows, columns)
            left, right = (generator.standard_normal(shape) for shape in ((rows, small), (small, columns)))
            change = left * 0.8 ** np.arange(small) @ right * 0.01
            tensors[key] = value + torch.from_numpy(change.astype(np.float32)).reshape(value.shape)
        found[name] = folder / f"{name}.safetensors"
        save_file(tensors, found[name])
    return found


def products(path: Path) -> Tensors:
    """What each module adds, as a matrix."""
    tensors = load_file(path)
    found = {}
    for key in tensors:
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            down, up = tensors[key].double(), tensors[f"{name}.lora_up.weight"].double()
            scale = float(tensors[f"{name}.alpha"]) / down.shape[0]
            found[name] = up.flatten(1) @ down.flatten(1) * scale
    return found


@pytest.mark.parametrize("kind", ["low", "full"])
def test_a_change_as_lora_is_what_sd_scripts_extracts(
    checkpoints: dict[str, Path], tmp_path: Path, use_trainer: Any, kind: str
) -> None:
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    words = [use_trainer.checkout.path, checkpoints["base"], checkpoints[kind], theirs, RANK]
    script = Path(__file__).with_name("extract_with_trainer.py")
    done = subprocess.run([sys.executable, str(script), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    plan = plan_merge(
        "tuned - base",
        {"tuned": checkpoints[kind], "base": checkpoints["base"]},
        MergeOptions(network="lora", rank=RANK, dtype="F32"),
    )
    write_network(plan, ours, {}, 1)
    wanted, found = products(theirs), products(ours)
    assert wanted and wanted.keys() <= found.keys()
    assert sum(name.startswith("lora_unet_") for name in wanted) > 50
    for name, product in wanted.items():
        apart = float((product - found[name]).norm() / product.norm())
        assert apart <= (1e-5 if kind == "low" else ALIKE), (name, apart)
