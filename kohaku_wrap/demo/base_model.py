"""A tiny SDXL with every part of the real one, as the single file that trainers and merges take.

Names and shapes stand in tiny_sdxl.json, which `python -m kohaku_wrap.planning.workers.list_sgm_tensors`
derives from diffusers' own conversion. The weights are untrained: uniform draws, equal on every machine.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.formats.safetensors import encode_header, lay_out_tensors
from kohaku_wrap.streams import draws, stream_key

Array = npt.NDArray[Any]

LOGIT_SCALE = 4.6052
"""CLIP's usual logarithm of the inverse temperature."""

EMBEDDING_SPREAD = 0.02
"""Standard deviation of embeddings, as CLIP is initialised."""

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


def make_tensor(name: str, shape: list[int], seed: int) -> Array:
    """The initial value of one tensor: fp16, or int64 for the position ids."""
    if name.endswith("position_ids"):
        return np.arange(shape[-1], dtype=np.int64).reshape(shape)
    if name.endswith("logit_scale"):
        return np.array(LOGIT_SCALE, dtype=np.float16)
    if name.endswith("bias"):
        return np.zeros(shape, dtype=np.float16)
    if len(shape) == 1:
        return np.ones(shape, dtype=np.float16)
    embedding = "embedding" in name and ".embedders.1.model.transformer" not in name
    inputs = math.prod(shape[1:])
    bound = EMBEDDING_SPREAD * math.sqrt(3) if embedding else 1 / math.sqrt(inputs)
    counters = np.arange(math.prod(shape), dtype=np.uint64)
    unit = (draws(stream_key("demo", "base", seed, name), counters) >> np.uint64(40)).astype(np.float64) / 2**24
    return ((2 * unit - 1) * bound).astype(np.float16).reshape(shape)


def write_base_model(folder: Path, seed: int) -> None:
    """Write `folder`/model.safetensors with sgm names, and the sizes of its models to config.json."""
    described = load_description()
    folder.mkdir(parents=True)
    tensors = {name: make_tensor(name, shape, seed) for name, shape in described["tensors"].items()}
    write_safetensors(folder / "model.safetensors", tensors, METADATA)
    text = json.dumps(described["config"], indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    """Write fp16 and int64 arrays as a safetensors file, the wider type first so that all lie aligned."""
    types = {np.dtype(np.float16): "F16", np.dtype(np.int64): "I64"}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    spots = lay_out_tensors((name, types[array.dtype], array.shape) for name, array in ordered)
    with path.open("wb") as stream:
        stream.write(encode_header(spots, metadata))
        for _, array in ordered:
            stream.write(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
