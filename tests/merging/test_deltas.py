"""Deltas by rows against lycoris-lora's functional API, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lycoris.functional import lokr

from kohaku_wrap.merging.deltas import Delta


def draw(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("inner_shape", [(6, 5), (6, 5, 3, 3), (1, 7)])
def test_rows_of_a_kronecker_product_are_those_of_lycoris(inner_shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(3)
    arrays = {"lokr_w1": draw(generator, 4, 3), "lokr_w2": draw(generator, *inner_shape), "alpha": np.float32([8])}
    delta = Delta("LoKr", "weight", arrays)
    wanted = lokr.make_kron(torch.from_numpy(arrays["lokr_w1"]), torch.from_numpy(arrays["lokr_w2"]), 1.0).numpy()
    assert np.array_equal(delta.compute_whole(), wanted.reshape(-1))
    places = np.arange(wanted.size)[::3]
    assert np.array_equal(delta.at(places), wanted.reshape(-1)[places])
    last = delta.period
    rows = np.empty((last - last // 2, wanted[0].size), dtype=np.float32)
    delta.fill_rows(2 * last + last // 2, 3 * last, rows.reshape(-1))
    assert np.array_equal(rows, wanted[2 * last + last // 2 : 3 * last].reshape(rows.shape))


def test_low_rank_factors_go_through_lycoris() -> None:
    generator = np.random.default_rng(4)
    arrays = {
        "lokr_w1": draw(generator, 4, 4),
        "lokr_w2_a": draw(generator, 8, 2),
        "lokr_w2_b": draw(generator, 2, 6),
        "alpha": np.float32([1]),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    wanted = lokr.diff_weight(
        tensors["lokr_w1"], None, None, None, tensors["lokr_w2_a"], tensors["lokr_w2_b"], None, gamma=1.0
    )
    delta = Delta("LoKr", "weight", arrays)
    assert np.array_equal(delta.compute_whole(), wanted.numpy().reshape(-1))
    assert np.array_equal(delta.at(np.array([3, 50])), wanted.numpy().reshape(-1)[[3, 50]])
    assert abs(wanted).max() > 0
