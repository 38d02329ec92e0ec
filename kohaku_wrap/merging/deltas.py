"""What a module of a network adds to a weight, computed in float32 by lycoris-lora's functional API.

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

Tensors = Mapping[str, torch.Tensor]

BACKEND = "torch"


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


class Delta:
    """The delta of one module, in float32, by rows."""

    def __init__(self, algorithm: str, kind: str, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """`arrays`: the module's tensors by the part of the key after its name. `kind`: weight or bias."""
        torch.set_num_threads(1)  # of the calling thread; a merge has threads of its own
        self.tensors = tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.period = 0
        self.whole: torch.Tensor | None = None
        if kind == "bias":
            self.whole = tensors["diff_b" if algorithm == "full" else "b_norm"]
        elif algorithm == "full":
            self.whole = tensors["diff"]
        elif algorithm == "norm":
            self.whole = tensors["w_norm"]
        elif algorithm == "LoHa":
            self.whole = delta_of_loha(tensors)
        elif algorithm == "LoRA":
            self.whole = delta_of_lora(tensors)
        elif "lokr_w1" in tensors and "lokr_w2" in tensors:
            self.outer, self.inner = tensors["lokr_w1"], tensors["lokr_w2"]
            self.period = self.inner.shape[0]
        else:
            self.whole = delta_of_lokr(tensors)

    def whole_delta(self) -> NDArray[np.float32]:
        """All of it."""
        return (self.whole if self.whole is not None else delta_of_lokr(self.tensors)).numpy()

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        """Rows `first` to `last` (not included), flat.

        Where LoKr's factors are whole, only these rows are computed: each number is one product, so they are the
        same as in the whole delta. Then all rows must lie within one multiple of `period`.
        """
        if self.whole is not None:
            rows = self.whole.reshape(self.whole.shape[0] if self.whole.dim() else 1, -1)[first:last]
        else:
            block, start = divmod(first, self.period)
            rows = lokr.make_kron(self.outer[block : block + 1], self.inner[start : start + last - first], 1.0)
        return cast(NDArray[np.float32], rows.reshape(-1).numpy())

    def decompose(self, base: NDArray[np.float32], multiplier: float) -> NDArray[np.float32]:
        """`base` (out, in, …) plus this delta, with the norms that DoRA learned; flat.

        The norms are over the inputs of each output, or the other way, by the shape of `dora_scale`: (out, 1, …) or
        (1, in, …).
        """
        weight = torch.from_numpy(base) + torch.from_numpy(self.whole_delta()).reshape(base.shape)
        scale = self.tensors["dora_scale"]
        on_output = scale.shape[0] == weight.shape[0] and scale.numel() == weight.shape[0]
        merged = weight_decompose(weight, scale, multiplier, wd_on_out=on_output, backend=BACKEND)
        return cast(NDArray[np.float32], merged.reshape(-1).numpy())
