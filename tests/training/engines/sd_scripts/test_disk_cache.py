"""sd-scripts' own latents on the disk: all of one caching, or all made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from kohaku_wrap.training.engines.sd_scripts.disk_cache import FOLDER, WHOLE, make_whole

NAMES = ("a", "b", "c")


def make(folder: Path, _model: Any, _accelerator: Any) -> None:
    """As the trainer does: a file for each image that has none, drawn from where the generator stands."""
    for name in NAMES:
        if not (path := folder / f"{name}.npz").exists():
            path.write_bytes(torch.randn(4).numpy().tobytes())


def begin_attempt(folder: Path) -> dict[str, bytes]:
    """Cache as every attempt begins; what lies there then."""
    torch.manual_seed(1)
    make_whole(make, folder, 7)(folder, None, Accelerator(cpu=True))
    return {path.name: path.read_bytes() for path in folder.glob("*.npz")}


@pytest.mark.parametrize("gone", [("b.npz",), ("c.npz", WHOLE), (WHOLE,)])
def test_what_a_caching_lost_is_made_again_to_the_same_latents(tmp_path: Path, gone: tuple[str, ...]) -> None:
    folder = tmp_path / FOLDER
    first = begin_attempt(folder)
    after = torch.rand(1)
    for name in gone:
        (folder / name).unlink()
    assert begin_attempt(folder) == first
    assert torch.rand(1) == after


def test_the_latents_of_an_earlier_kwrap_stay(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    begin_attempt(folder)
    (folder / WHOLE).write_text("")
    (folder / "a.npz").write_bytes(b"of that time")
    assert begin_attempt(folder)["a.npz"] == b"of that time"
