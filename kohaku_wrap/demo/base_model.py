"""A tiny SDXL with every part of the real one, as the single file that trainers and merges take.

Names and shapes stand in tiny_sdxl.json, which `python -m kohaku_wrap.planning.workers.list_sgm_tensors`
derives from diffusers' own conversion. The weights are untrained: uniform draws, equal on every machine.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.formats.untrained import write_untrained
from kohaku_wrap.streams import draws, stream_key

Array = npt.NDArray[Any]

METADATA = {
    "format": "pt",
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.title": "kwrap demo: a tiny SDXL, untrained",
}


def load_description() -> dict[str, Any]:
    """`config`: the sizes of the four models. `tensors`: shape by name."""
    text = Path(__file__).with_name("tiny_sdxl.json").read_text(encoding="utf-8")
    described: dict[str, Any] = json.loads(text)
    return described


def draw(seed: int, name: str, count: int) -> Array:
    """The uniform draws of a tensor, the same on every machine."""
    numbers = draws(stream_key("demo", "base", seed, name), np.arange(count, dtype=np.uint64))
    return (numbers >> np.uint64(40)).astype(np.float64) / 2**24


def write_base_model(folder: Path, seed: int) -> None:
    """Write `folder`/model.safetensors with sgm names, and the sizes of its models to config.json."""
    described = load_description()
    shapes = dict(sorted(described["tensors"].items()))
    write_untrained(folder / "model.safetensors", shapes, METADATA, partial(draw, seed))
    text = json.dumps(described["config"], indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
