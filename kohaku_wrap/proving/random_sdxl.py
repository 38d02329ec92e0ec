"""An SDXL of full size with random weights, for measuring where no model is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.formats.sdxl import SDXL_SIZES
from kohaku_wrap.formats.untrained import write_untrained
from kohaku_wrap.processes import ask_python
from kohaku_wrap.streams import seed_of

SHAPES_WORKER = "kohaku_wrap.planning.workers.list_sgm_tensors"


def write_random_sdxl(path: Path, sizes: Any = SDXL_SIZES) -> None:
    """Write the fp16 checkpoint, 6.9 GB in SDXL's sizes, a tensor at a time; what is there is kept.

    Raises NoAnswer where the shapes cannot be had (torch, diffusers or transformers are missing).
    """
    if path.is_file():
        return
    shapes: dict[str, list[int]] = ask_python(SHAPES_WORKER, request=sizes)
    write_untrained(path, shapes, {"format": "pt", "modelspec.title": "random weights of full size"}, draw)


def draw(name: str, count: int) -> npt.NDArray[np.float32]:
    """The draws of a tensor: the same on every machine with this numpy."""
    return np.random.default_rng(seed_of("random sdxl", name)).random(count, dtype=np.float32)
