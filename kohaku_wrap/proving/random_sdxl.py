"""An SDXL of full size with random weights, for measuring where no model is at hand."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.files import fsync_folder
from kohaku_wrap.formats.safetensors import encode_header, lay_out_tensors
from kohaku_wrap.formats.sdxl import SDXL_SIZES
from kohaku_wrap.processes import ask_python
from kohaku_wrap.streams import seed_of

SHAPES_WORKER = "kohaku_wrap.planning.workers.list_sgm_tensors"
SPREAD = 0.02
"""Standard deviation of embeddings, as CLIP is initialised."""

LOGIT_SCALE = 4.6052


def write_random_sdxl(path: Path, sizes: Any = SDXL_SIZES) -> None:
    """Write the fp16 checkpoint, 6.9 GB in SDXL's sizes, a tensor at a time; what is there is kept.

    Raises NoAnswer where the shapes cannot be had (torch, diffusers or transformers are missing).
    """
    if path.is_file():
        return
    shapes: dict[str, list[int]] = ask_python(SHAPES_WORKER, request=sizes)
    spots = lay_out_tensors(
        (name, "I64" if name.endswith("position_ids") else "F16", tuple(shape)) for name, shape in shapes.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        with part.open("wb") as stream:
            stream.write(encode_header(spots, {"format": "pt", "modelspec.title": "random weights of full size"}))
            for name in spots:
                stream.write(random_tensor(name, shapes[name]).tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def random_tensor(name: str, shape: list[int]) -> npt.NDArray[Any]:
    """Values at which activations neither vanish nor overflow: the same on every machine."""
    if name.endswith("position_ids"):
        return np.arange(shape[-1], dtype="<i8").reshape(shape)
    if name.endswith("logit_scale"):
        return np.array(LOGIT_SCALE, dtype="<f2")
    if name.endswith("bias") or len(shape) == 1:
        return np.full(shape, float(not name.endswith("bias")), dtype="<f2")
    draws = np.random.default_rng(seed_of("random sdxl", name)).random(math.prod(shape), dtype=np.float32)
    bound = SPREAD * math.sqrt(3) if "embedding" in name and "embedders.1" not in name else math.prod(shape[1:]) ** -0.5
    return ((2 * draws - 1) * np.float32(bound)).astype("<f2").reshape(shape)
