"""What a module of a network adds to a weight, in float32, by rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kohaku_wrap.merging.arithmetic.kernels import Product
from kohaku_wrap.merging.arithmetic.loops import fill_kronecker
from kohaku_wrap.merging.networks.modules import MADE_OF_WEIGHT

Array = NDArray[np.float32]

STORED = {("full", "weight"): "diff", ("norm", "weight"): "w_norm", ("norm", "bias"): "b_norm"}
"""The tensor that is the delta itself, by algorithm and by what it changes; other biases have diff_b."""


class Delta:
    """The delta of one module, by rows: whole in memory only where it is stored so, or DoRA sets norms of columns.

    A stored difference is taken as it is. LoKr is the product of two factors, made as it is added; where a factor is
    itself a product, and for all else, lycoris-lora computes, whose import takes seconds.
    """

    def __init__(self, algorithm: str, kind: str, arrays: Mapping[str, Array]) -> None:
        """`arrays`: the module's tensors by the part of the key after its name. `kind`: weight or bias."""
        self.algorithm, self.arrays = algorithm, arrays
        self.period = 0
        """Rows of one block of a Kronecker product; 0 for any other delta."""
        self.scale = np.float32(1)
        """What the numbers of a Kronecker product are multiplied by, rounded once more."""
        self.whole: Array | None = None
        if kind == "bias" or (algorithm, kind) in STORED:
            whole = arrays[STORED.get((algorithm, kind), "diff_b")]
            self.whole = whole.reshape(whole.shape[0] if whole.ndim else 1, -1)
        elif algorithm == "LoKr":
            if "lokr_w1" in arrays and "lokr_w2" in arrays:
                self.outer, self.inner = arrays["lokr_w1"], arrays["lokr_w2"]
            else:
                from kohaku_wrap.merging.networks.factors import find_kronecker_factors

                self.outer, self.inner, self.scale = find_kronecker_factors(arrays)
            self.period = self.inner.shape[0]
        elif algorithm not in MADE_OF_WEIGHT:
            from kohaku_wrap.merging.networks.factors import LowRank

            self.low_rank = LowRank(algorithm, arrays)

    @property
    def is_product(self) -> bool:
        """Whether factor_rows gives its numbers."""
        return bool(self.period) and self.scale == 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and numbers in a row."""
        if self.whole is not None:
            return self.whole.shape[0], self.whole.shape[1]
        if self.period:
            return self.outer.shape[0] * self.period, self.outer.shape[1] * self.inner.size // self.period
        return self.low_rank.shape

    def fill_rows(self, first: int, last: int, out: NDArray[Any]) -> None:
        """Write rows `first` to `last` (not included) into the flat float32 array `out`.

        Those of a Kronecker product must lie within one block of it.
        """
        if self.period:
            product = self.factor_rows(first, last)
            fill_kronecker(product.outer, product.inner, 0, out)
            if self.scale != 1:
                np.multiply(out, self.scale, out=out)
        elif self.whole is not None:
            np.copyto(out, self.whole[first:last].reshape(-1))
        else:
            self.low_rank.fill_rows(first, last, out)

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
        rows, columns = np.divmod(places, self.shape[1])
        numbers = np.empty(len(places), dtype=np.float32)
        row = np.empty(self.shape[1], dtype=np.float32)
        for wanted in np.unique(rows):
            self.fill_rows(wanted, wanted + 1, row)
            numbers[rows == wanted] = row[columns[rows == wanted]]
        return numbers

    def compute_rows(self, first: int, last: int) -> Array:
        """Any rows, as (rows, numbers in a row)."""
        computed = np.empty((last - first, self.shape[1]), dtype=np.float32)
        period = self.period or last
        for start in range(first - first % period, last, period):
            begin, end = max(start, first), min(start + period, last)
            self.fill_rows(begin, end, computed[begin - first : end - first].reshape(-1))
        return computed

    def sets_norms_of_rows(self, rows: int) -> bool:
        """Whether DoRA learned a norm for each of the weight's rows, not for each of its columns."""
        norms = self.arrays.get("dora_scale")
        return norms is not None and bool(norms.shape[0] == norms.size == rows)

    def decompose(self, base: Array, rows: int, first: int, multiplier: float) -> Array:
        """Rows of the weight plus this delta, with the norms that DoRA learned, or as OFT and the like make it; flat.

        `base`: from row `first` on, (some of `rows`, in, …); all of them where not each row has its norm.
        """
        from kohaku_wrap.merging.networks.factors import change_weight, decompose_weight

        if self.algorithm in MADE_OF_WEIGHT:
            return change_weight(self.algorithm, self.arrays, base, multiplier).reshape(-1)
        last = first + base.shape[0]
        weight = base + self.compute_rows(first, last).reshape(base.shape)
        norms = self.arrays["dora_scale"]
        by_row = self.sets_norms_of_rows(rows)
        return decompose_weight(weight, norms[first:last] if by_row else norms, multiplier, by_row).reshape(-1)
