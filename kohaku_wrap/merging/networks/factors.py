"""Deltas of low-rank factors, and DoRA, computed in float32 by lycoris-lora's functional API.

`get_diff_weight`, `merge_to` and `lycoris.utils.merge` of lycoris-lora 4.1.3 apply the scale twice for LoKr and
LoHa and are not used.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

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
    from lycoris.functional.general import factorization as factorization
    from lycoris.functional.general import weight_decompose
    from lycoris.logging import logger as lycoris_logger
    from lycoris.modules import ButterflyOFTModule, DiagOFTModule, GLoRAModule, IA3Module

Array = NDArray[np.float32]
Tensors = Mapping[str, torch.Tensor]

BACKEND = "torch"
BLOCK_ELEMENTS = 1 << 18
LEAST_ROWS = 16
PARTS = {
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_t1"),
    "LoRA": ("lora_up.weight", "lora_down.weight", "lora_mid.weight"),
}
"""By algorithm, the tensors that have the delta's rows, its columns, and its kernel."""

ROWS_OF_DELTA = {"hada_w1_a", "hada_w2_a", "lora_up.weight"}
"""The tensors that have the delta's rows, all of them."""


class LowRank:
    """Rows of a LoHa or LoRA module's delta, computed some at a time.

    Always the same rows together: how a product of matrices rounds may depend on how many rows it has. Few of them
    may round unlike the whole, so a block has many.
    """

    def __init__(self, algorithm: str, arrays: Mapping[str, Array]) -> None:
        """`arrays`: the module's tensors by the part of the key after its name."""
        self.algorithm = algorithm
        self.tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        left, right, core = PARTS[algorithm]
        self.row_dimension = int(algorithm == "LoHa" and core in arrays)
        kernel = arrays[core].shape[2:] if core in arrays else ()
        columns = math.prod(arrays[right].shape[1:]) * math.prod(kernel)
        self.shape = arrays[left].shape[self.row_dimension], columns
        """Rows of the delta, and numbers in a row."""
        blocks = max(1, self.shape[0] // max(LEAST_ROWS, BLOCK_ELEMENTS // columns))
        self.block_rows = -(-self.shape[0] // blocks)
        self.block, self.block_first = np.empty((0, columns), dtype=np.float32), 0

    def fill_rows(self, first: int, last: int, out: NDArray[Any]) -> None:
        """Write rows `first` to `last` (not included) into the flat float32 array `out`."""
        rows = out.reshape(last - first, -1)
        while first < last:
            if not self.block_first <= first < self.block_first + len(self.block):
                self.block_first = first - first % self.block_rows
                self.block = self.compute_block(self.block_first, self.block_first + self.block_rows)
            part = self.block[first - self.block_first :][: last - first]
            rows[: len(part)] = part
            rows, first = rows[len(part) :], first + len(part)

    def compute_block(self, first: int, last: int) -> Array:
        """Rows `first` to `last`, or to the end, by lycoris-lora."""
        torch.set_num_threads(1)  # of the calling thread; a merge has threads of its own
        chosen = dict(self.tensors)
        for name in ROWS_OF_DELTA & chosen.keys():
            chosen[name] = chosen[name].narrow(self.row_dimension, first, min(last, self.shape[0]) - first)
        delta = delta_of_loha(chosen) if self.algorithm == "LoHa" else delta_of_lora(chosen)
        return cast(Array, delta.numpy().reshape(-1, self.shape[1]))


def decompose_weight(weight: Array, dora_scale: Array, multiplier: float, on_output: bool) -> Array:
    """The weight with the norms that DoRA learned.

    `weight`: base plus delta, (out, in, …). `dora_scale`: (out, 1, …) if `on_output`, else (1, in, …), norms over the
    outputs.
    """
    torch.set_num_threads(1)
    # As many dimensions as the weight has, which a 1 x 1 convolution and its linear layer tell differently.
    ones = [1] * (weight.ndim - 1)
    norms = torch.from_numpy(dora_scale).reshape([-1, *ones] if on_output else [1, -1, *ones[1:]])
    merged = weight_decompose(torch.from_numpy(weight), norms, multiplier, wd_on_out=on_output, backend=BACKEND)
    return cast(Array, merged.contiguous().numpy())


@torch.no_grad()
def change_weight(algorithm: str, arrays: Mapping[str, Array], weight: Array, multiplier: float) -> Array:
    """The weight, (out, in, …), with an OFT, BOFT, GLoRA or IA3 module on it, as LyCORIS' own module makes it.

    In float32. Blocks of four dimensions are BOFT's. Without alpha, OFT has no constraint and GLoRA the scale 1.
    """
    torch.set_num_threads(1)
    lycoris_logger.setLevel(logging.WARNING)  # it tells of every module
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    (rows, columns), kernel = weight.shape[:2], cast("tuple[int, int]", weight.shape[2:])
    shape: dict[str, Any] = {"bias": False, "device": "meta"}
    conv, linear = torch.nn.Conv2d, torch.nn.Linear
    layer = conv(columns, rows, kernel, **shape) if kernel else linear(columns, rows, **shape)
    layer.weight = torch.nn.Parameter(torch.from_numpy(weight), requires_grad=False)
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    if algorithm == "IA3":
        module = IA3Module("module", layer, 1.0, train_on_input=bool(tensors["on_input"]))
        module.weight.copy_(tensors["weight"].reshape(module.weight.shape))
    elif algorithm == "GLoRA":
        names = ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight")
        parts = [tensors.get(name) for name in names]
        module = GLoRAModule.make_module_from_state_dict("module", layer, *parts, alpha)
    else:
        blocks, rescale = tensors["oft_blocks"], tensors.get("rescale")
        kind = DiagOFTModule if blocks.ndim == 3 else ButterflyOFTModule
        module = kind("module", layer, 1.0, 2, constraint=alpha, rescaled=rescale is not None)
        module.block_num, module.block_size = blocks.shape[-3:-1]
        module.oft_blocks = torch.nn.Parameter(blocks)
        if rescale is not None:
            module.rescale.copy_(rescale.reshape(module.rescale.shape))
    merged, _ = module.get_merged_weight(multiplier)
    return cast(Array, merged.contiguous().numpy())


def scale_of(tensors: Tensors, rank: int) -> float:
    """alpha / rank; 1 without alpha, or with alpha 0, which LyCORIS reads as the rank."""
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    return (alpha or rank) / rank


def find_kronecker_factors(arrays: Mapping[str, Array]) -> tuple[Array, Array, np.float32]:
    """w1 and w2 of a LoKr module, each whole, and the scale of their product.

    Each is made as lycoris-lora makes it, by a Kronecker product with the number 1.
    """
    torch.set_num_threads(1)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    first, second = ("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    one = torch.ones(1, 1)
    w1 = lokr.kron_weight(*(tensors.get(name) for name in first), one, None, None, backend=BACKEND)
    w2 = lokr.kron_weight(one, None, None, *(tensors.get(name) for name in second), backend=BACKEND)
    return w1.numpy(), w2.numpy(), np.float32(scale_of_lokr(tensors))


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
    return cast(torch.Tensor, delta.mul_(scale_of(tensors, down.shape[0])))
