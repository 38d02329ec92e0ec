"""Deltas from low-rank factors, and DoRA, computed in float32 by lycoris-lora's functional API.

`get_diff_weight`, `merge_to` and `lycoris.utils.merge` of lycoris-lora 4.1.3 apply the scale twice for LoKr and
LoHa and are not used.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

SLOW_IMPORTS = ("bitsandbytes", "lycoris.kohya")


@contextmanager
def without_imports(names: tuple[str, ...]) -> Iterator[None]:
    """Meanwhile, modules that are not yet imported count as not installed."""
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    hidden = [name for name in names if name not in modules]
    modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del modules[name]


with without_imports(SLOW_IMPORTS):  # only training needs them, and they take seconds
    from lycoris.functional import locon, loha, lokr
    from lycoris.functional.general import weight_decompose

Array = NDArray[np.float32]
Tensors = Mapping[str, torch.Tensor]

BACKEND = "torch"


def compute_delta(algorithm: str, arrays: Mapping[str, Array]) -> Array:
    """What a LoKr, LoHa or LoRA module adds to its weight: (out, in, …).

    `arrays`: the module's tensors by the part of the key after its name.
    """
    torch.set_num_threads(1)  # of the calling thread; a merge has threads of its own
    of_algorithm = {"LoKr": delta_of_lokr, "LoHa": delta_of_loha, "LoRA": delta_of_lora}[algorithm]
    delta = of_algorithm({name: torch.from_numpy(array) for name, array in arrays.items()})
    return cast(Array, delta.numpy())


def decompose_weight(weight: Array, dora_scale: Array, multiplier: float) -> Array:
    """The weight with the norms that DoRA learned.

    `weight`: base plus delta, (out, in, …). `dora_scale`: (out, 1, …), or (1, in, …) for norms over the outputs.
    """
    torch.set_num_threads(1)
    on_output = dora_scale.shape[0] == weight.shape[0] and dora_scale.size == weight.shape[0]
    # As many dimensions as the weight has, which a 1 x 1 convolution and its linear layer tell differently.
    ones = [1] * (weight.ndim - 1)
    norms = torch.from_numpy(dora_scale).reshape([-1, *ones] if on_output else [1, -1, *ones[1:]])
    merged = weight_decompose(torch.from_numpy(weight), norms, multiplier, wd_on_out=on_output, backend=BACKEND)
    return cast(Array, merged.contiguous().numpy())


def scale_of(tensors: Tensors, rank: int) -> float:
    """alpha / rank; 1 without alpha, or with alpha 0, which LyCORIS reads as the rank."""
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    return (alpha or rank) / rank


def delta_of_lokr(tensors: Tensors) -> torch.Tensor:
    """scale x kron(w1, w2), (rows, columns) or (out, in, kh, kw)."""
    scale = scale_of_lokr(tensors)
    names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    delta = lokr.kron_weight(*(tensors.get(name) for name in names), scale=scale, backend=BACKEND)
    return cast(torch.Tensor, delta)


def scale_of_lokr(tensors: Tensors) -> float:
    """1 where both factors are whole, else alpha / rank.

    `lokr_t2`: (rank, rank, kh, kw). Source: `LokrModule.__init__` of lycoris-lora 4.1.3.
    """
    if "lokr_w1" in tensors and "lokr_w2" in tensors:
        return 1.0
    if "lokr_t2" in tensors:
        return scale_of(tensors, tensors["lokr_t2"].shape[0])
    pair = "lokr_w2_b" if "lokr_w2_b" in tensors else "lokr_w1_b"
    return scale_of(tensors, tensors[pair].shape[0])


def delta_of_loha(tensors: Tensors) -> torch.Tensor:
    """scale x (w1_a w1_b) * (w2_a w2_b), element by element."""
    scale = torch.tensor(scale_of(tensors, tensors["hada_w1_b"].shape[0]), dtype=torch.float32)
    names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2")
    return cast(torch.Tensor, loha.diff_weight(*(tensors.get(name) for name in names), gamma=scale, backend=BACKEND))


def delta_of_lora(tensors: Tensors) -> torch.Tensor:
    """(up x down) x scale, with or without a Tucker core."""
    down = tensors["lora_down.weight"]
    delta = locon.diff_weight(
        down, tensors["lora_up.weight"], tensors.get("lora_mid.weight"), gamma=1.0, backend=BACKEND
    )
    return cast(torch.Tensor, delta * scale_of(tensors, down.shape[0]))
