"""The nearest low-rank or Kronecker product of a layer's change, by torch's LAPACK, in float32.

Whoever calls these has set torch to one thread, so that a sum has one order and equal inputs give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kohaku_wrap.merging.networks.factors import factorization
from kohaku_wrap.merging.plan import DEFAULT_FACTOR
from kohaku_wrap.streams import draws, stream_key

OVERSAMPLES = 10
"""More directions than asked for, in which a change is first looked at."""

ROUNDS = 2
"""How often they are turned towards its largest ones."""

BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Fit:
    """Factors that stand for a change."""

    factors: dict[str, torch.Tensor]
    """By the part of the key after the module's name, in the type of the file."""

    product: tuple[torch.Tensor, torch.Tensor]
    """Two matrices whose product, laid out as `lost` was given it, is what the factors stand for."""

    rank: int
    """Of a low-rank product; 0 for others."""


def sum_squares(numbers: torch.Tensor) -> float:
    """Of all numbers, in float64, without a copy of them all."""
    parts = torch.split(numbers.reshape(-1), BLOCK_ELEMENTS)
    return math.fsum(float(part.double().square().sum()) for part in parts)


def draw_signs(name: str, rows: int, columns: int) -> torch.Tensor:
    """A matrix of ones and minus ones that follows from `name` alone."""
    numbers = draws(stream_key("range finder", name), np.arange(rows * columns, dtype=np.uint64))
    return torch.from_numpy(np.where(numbers >> np.uint64(63), np.float32(1), np.float32(-1)).reshape(rows, columns))


def find_largest(matrix: torch.Tensor, rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values of a matrix and their vectors: (out, rank), (rank,), (rank, in).

    By a randomised range finder, seeded by `name`, or by a whole SVD where that is no more work.
    Source: Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1.
    """
    width = rank + OVERSAMPLES
    if 2 * width >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = torch.linalg.qr(matrix @ draw_signs(name, matrix.shape[1], width)).Q
        for _ in range(ROUNDS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    return left[:, :rank], values[:rank], right[:rank]


def least_rank(values: torch.Tensor, energy: float, squares: float) -> int:
    """The first singular values that hold a share of all squares; all of them where they hold less."""
    reached = torch.cumsum(values.double().square(), 0) >= energy * squares
    return int(reached.int().argmax()) + 1 if bool(reached.any()) else len(values)


def fit_low_rank(delta: torch.Tensor, rank: int, energy: float, squares: float, name: str, dtype: torch.dtype) -> Fit:
    """The best LoRA of at most `rank`; with `energy`, of the least rank that holds that share of `squares`.

    `delta`: (out, in, …). Both factors get the root of each singular value, so that neither is small in float16.
    """
    matrix = delta.reshape(delta.shape[0], -1)
    left, values, right = find_largest(matrix, min(rank, *matrix.shape), name)
    if energy:
        kept = least_rank(values, energy, squares)
        left, values, right = left[:, :kept], values[:kept], right[:kept]
    roots = values.clamp(min=0).sqrt()
    return make_lora(left * roots, roots[:, None] * right, delta.shape, dtype)


def make_lora(up: torch.Tensor, down: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> Fit:
    """kohya's tensors from factors (out, rank) and (rank, …)."""
    rank = up.shape[1]
    up, down = up.to(dtype), down.to(dtype)
    factors = {
        "lora_down.weight": down.reshape(rank, *shape[1:]),
        "lora_up.weight": up.reshape(*up.shape, *([1] * (len(shape) - 2))),
        "alpha": torch.tensor(float(rank)),
    }
    return Fit(factors, (up.float(), down.reshape(rank, -1).float()), rank)


def split_kronecker(delta: torch.Tensor, outer: tuple[int, int]) -> torch.Tensor:
    """A change with a row for each number of the first factor, as a view where that is possible.

    Source: Van Loan and Pitsianis, 1993: the nearest Kronecker product is the nearest product of rank 1 of this.
    """
    (rows, columns), (high, wide) = delta.shape[:2], outer
    parts = delta.reshape(high, rows // high, wide, columns // wide, -1).permute(0, 2, 1, 3, 4)
    return parts.reshape(high * wide, -1)


def fit_kronecker(delta: torch.Tensor, outer: tuple[int, int], dtype: torch.dtype) -> Fit:
    """The best LoKr of two whole matrices, the first of shape `outer`."""
    rows = split_kronecker(delta, outer)
    first = torch.linalg.eigh((rows @ rows.T).double()).eigenvectors[:, -1].float()
    second = first @ rows
    first = rows @ second
    first = first / torch.linalg.vector_norm(first)
    second = first @ rows
    root = torch.linalg.vector_norm(second).sqrt()
    w1, w2 = (first * root).to(dtype), (second / root).to(dtype)
    shape = (delta.shape[0] // outer[0], delta.shape[1] // outer[1], *delta.shape[2:])
    factors = {"lokr_w1": w1.reshape(outer), "lokr_w2": w2.reshape(shape), "alpha": torch.tensor(1.0)}
    return Fit(factors, (w1.float()[:, None], w2.float()[None]), 0)


def shape_of_outer(shape: Sequence[int], factor: int) -> tuple[int, int]:
    """The first matrix of a LoKr module on a weight of this shape, as LyCORIS splits it."""
    rows, columns = (factorization(size, factor or DEFAULT_FACTOR)[0] for size in shape[:2])
    return int(rows), int(columns)


def squares_lost(numbers: torch.Tensor, fit: Fit) -> float:
    """The sum of squares of what the fit does not hold; `numbers`, laid out as its product, are overwritten."""
    left, right = fit.product
    return sum_squares(numbers.addmm_(left, right, alpha=-1.0))
