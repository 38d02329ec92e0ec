"""What a module of a network adds to a weight, in float32, by rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kohaku_wrap.merging.kernels import Product
from kohaku_wrap.merging.loops import fill_kronecker

Array = NDArray[np.float32]

STORED = {
    ("full", "weight"): "diff",
    ("full", "bias"): "diff_b",
    ("norm", "weight"): "w_norm",
    ("norm", "bias"): "b_norm",
}
"""The tensor that is the delta itself, by algorithm and by what it changes."""


class Delta:
    """The delta of one module.

    A stored difference is taken as it is, and LoKr of two whole factors is one float32 product for each number, made
    as it is added. All else is computed by lycoris-lora, whose import takes seconds.
    """

    def __init__(self, algorithm: str, kind: str, arrays: Mapping[str, Array]) -> None:
        """`arrays`: the module's tensors by the part of the key after its name. `kind`: weight or bias."""
        self.arrays = arrays
        self.period = 0
        """Rows of one block of a Kronecker product; 0 where the whole delta is at hand."""
        self.whole: Array | None = None
        if (algorithm, kind) in STORED:
            self.whole = arrays[STORED[algorithm, kind]]
        elif "lokr_w1" in arrays and "lokr_w2" in arrays:
            self.outer, self.inner = arrays["lokr_w1"], arrays["lokr_w2"]
            self.period = self.inner.shape[0]
        else:
            from kohaku_wrap.merging.factors import compute_delta

            self.whole = compute_delta(algorithm, arrays)

    def fill_rows(self, first: int, last: int, out: NDArray[Any]) -> None:
        """Write rows `first` to `last` (not included) into the flat float32 array `out`."""
        if self.period:
            product = self.factor_rows(first, last)
            fill_kronecker(product.outer, product.inner, 0, out)
        elif self.whole is not None:
            np.copyto(
                out, self.whole.reshape(self.whole.shape[0] if self.whole.ndim else 1, -1)[first:last].reshape(-1)
            )

    def factor_rows(self, first: int, last: int) -> Product:
        """Rows of a Kronecker product, still in its factors; they must lie within one block.

        kron(w1, w2)[i p + k, j q + l] = w1[i, j] w2[k, l] with (p, q) the shape of w2, and so for the kernels of a
        convolution behind each l.
        """
        block, start = divmod(first, self.period)
        inner = self.inner.reshape(self.period, -1)
        return Product(self.outer[block], inner[start : start + last - first])

    def at(self, places: NDArray[Any]) -> Array:
        """The numbers at flat places."""
        if not self.period:
            return np.asarray(self.compute_whole()[places])
        inner = self.inner.reshape(self.period, -1)
        rows, columns = np.divmod(places, self.outer.shape[1] * inner.shape[1])
        blocks, inner_rows = np.divmod(rows, self.period)
        outer_columns, inner_columns = np.divmod(columns, inner.shape[1])
        return np.asarray(self.outer[blocks, outer_columns] * inner[inner_rows, inner_columns])

    def compute_whole(self) -> Array:
        """All of it, flat."""
        if self.whole is not None:
            return self.whole.reshape(-1)
        whole = np.empty((self.outer.shape[0], self.outer.shape[1] * self.inner.size), dtype=np.float32)
        for block, rows in enumerate(whole):
            self.fill_rows(block * self.period, (block + 1) * self.period, rows)
        return whole.reshape(-1)

    def decompose(self, base: Array, multiplier: float) -> Array:
        """`base` (out, in, …) plus this delta, with the norms that DoRA learned; flat."""
        from kohaku_wrap.merging.factors import decompose_weight

        weight = base + self.compute_whole().reshape(base.shape)
        return decompose_weight(weight, self.arrays["dora_scale"], multiplier).reshape(-1)
