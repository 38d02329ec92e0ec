"""A checkpoint of untrained weights, written tensor by tensor: values by name and shape, from draws of the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.files import atomic_write
from kohaku_wrap.formats.safetensors import encode_header, lay_out_tensors

Array = npt.NDArray[Any]
Draw = Callable[[str, int], Array]
"""From a tensor's name and a count to that many draws, uniform in 0 … 1."""

LOGIT_SCALE = 4.6052
"""CLIP's usual logarithm of the inverse temperature."""

EMBEDDING_SPREAD = 0.02
"""Standard deviation of embeddings, as CLIP is initialised."""


def untrained_tensor(name: str, shape: Sequence[int], draw: Draw) -> Array:
    """The initial value of one tensor, at which activations neither vanish nor overflow: fp16, or int64 for positions.

    Little-endian.
    """
    if name.endswith("position_ids"):
        return np.arange(shape[-1], dtype="<i8").reshape(shape)
    if name.endswith("logit_scale"):
        return np.array(LOGIT_SCALE, dtype="<f2")
    if name.endswith("bias") or len(shape) == 1:
        return np.full(shape, float(not name.endswith("bias")), dtype="<f2")
    is_embedding = "embedding" in name and ".embedders.1.model.transformer" not in name
    bound = EMBEDDING_SPREAD * math.sqrt(3) if is_embedding else 1 / math.sqrt(math.prod(shape[1:]))
    return ((2 * draw(name, math.prod(shape)) - 1) * bound).astype("<f2").reshape(shape)


def write_untrained(path: Path, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str], draw: Draw) -> None:
    """Write the checkpoint whole or not at all, with one tensor in memory; position ids come first, so all lie aligned.

    Raises KwrapError where the header would be longer than readers accept.
    """
    positions_first = sorted(shapes, key=lambda name: not name.endswith("position_ids"))
    spots = lay_out_tensors(
        (name, "I64" if name.endswith("position_ids") else "F16", tuple(shapes[name])) for name in positions_first
    )
    with atomic_write(path, "wb") as stream:
        stream.write(encode_header(spots, metadata))
        for name in spots:
            stream.write(untrained_tensor(name, shapes[name], draw).tobytes())
