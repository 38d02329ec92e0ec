"""Deltas by rows against lycoris-lora's functional API, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lycoris.functional import locon, loha, lokr
from lycoris.functional.general import weight_decompose

from kohaku_wrap.merging.arithmetic.deltas import Delta


def draw(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("inner_shape", [(6, 5), (6, 5, 3, 3), (1, 7)])
def test_rows_of_a_kronecker_product_are_those_of_lycoris(inner_shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(3)
    arrays = {
        "lokr_w1": draw(generator, 4, 3),
        "lokr_w2": draw(generator, *inner_shape),
        "alpha": np.array([8], np.float32),
    }
    delta = Delta("LoKr", "weight", arrays)
    wanted = lokr.make_kron(torch.from_numpy(arrays["lokr_w1"]), torch.from_numpy(arrays["lokr_w2"]), 1.0).numpy()
    assert np.array_equal(compute_all(delta), wanted.reshape(-1))
    places = np.arange(wanted.size)[::3]
    assert np.array_equal(delta.at(places), wanted.reshape(-1)[places])
    last = delta.period
    rows = np.empty((last - last // 2, wanted[0].size), dtype=np.float32)
    delta.fill_rows(2 * last + last // 2, 3 * last, rows.reshape(-1))
    assert np.array_equal(rows, wanted[2 * last + last // 2 : 3 * last].reshape(rows.shape))


def compute_all(delta: Delta) -> np.ndarray:
    return delta.compute_rows(0, delta.shape[0]).reshape(-1)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_factors_that_are_products_go_through_lycoris(alpha: float) -> None:
    generator = np.random.default_rng(4)
    arrays = {
        "lokr_w1": draw(generator, 4, 4),
        "lokr_w2_a": draw(generator, 8, 3),
        "lokr_w2_b": draw(generator, 3, 6),
        "alpha": np.array([alpha], np.float32),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    w1, w2_a, w2_b = tensors["lokr_w1"], tensors["lokr_w2_a"], tensors["lokr_w2_b"]
    wanted = lokr.diff_weight(w1, None, None, None, w2_a, w2_b, None, gamma=alpha).numpy().reshape(-1)
    delta = Delta("LoKr", "weight", arrays)
    assert np.array_equal(compute_all(delta), wanted)
    assert np.array_equal(delta.at(np.array([3, 50])), wanted[[3, 50]])
    assert abs(wanted).max() > 0


ROWS, COLUMNS, RANK = 1000, 1500, 8


def draw_low_rank(kind: str) -> tuple[str, dict[str, np.ndarray], np.ndarray]:
    """A module's algorithm and tensors, and its whole delta as lycoris-lora computes it."""
    generator = np.random.default_rng(5)
    kernel = (3, 3) if "Tucker" in kind else ()
    columns = COLUMNS // 9 if kernel else COLUMNS
    core = draw(generator, RANK, RANK, *kernel) if kernel else None
    up, down = draw(generator, ROWS, RANK), draw(generator, RANK, columns)
    if kind.startswith("LoRA"):
        arrays = {"lora_up.weight": up, "lora_down.weight": down, "alpha": np.array([2], np.float32)}
        if core is not None:
            arrays |= {"lora_mid.weight": core}
        tensors = (arrays.get(f"lora_{part}.weight") for part in ("down", "up", "mid"))
        whole = locon.diff_weight(*(None if each is None else torch.from_numpy(each) for each in tensors), gamma=1.0)
        return "LoRA", arrays, (whole * 0.25).numpy()
    left = up.T.copy() if kernel else up
    arrays = {"hada_w1_a": left, "hada_w1_b": down, "hada_w2_a": left[::-1].copy(), "hada_w2_b": down[::-1].copy()}
    if core is not None:
        arrays |= {"hada_t1": core, "hada_t2": core[::-1].copy()}
    names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2")
    parts = (torch.from_numpy(arrays[name]) if name in arrays else None for name in names)
    whole = loha.diff_weight(*parts, gamma=torch.tensor(0.25))
    return "LoHa", arrays | {"alpha": np.array([2], np.float32)}, whole.numpy()


@pytest.mark.parametrize("kind", ["LoRA", "LoRA, Tucker", "LoHa", "LoHa, Tucker"])
def test_rows_of_low_rank_are_those_of_the_whole(kind: str) -> None:
    algorithm, arrays, wanted = draw_low_rank(kind)
    delta = Delta(algorithm, "weight", arrays)
    wanted = wanted.reshape(ROWS, -1)
    assert delta.shape == wanted.shape
    assert delta.low_rank.block_rows < ROWS / 3
    # To the last bits, which a product of other shape may round otherwise.
    near = 1e-6 * abs(wanted).max()
    assert abs(compute_all(delta).reshape(wanted.shape) - wanted).max() <= near
    # The same numbers, however they are asked for.
    places = np.sort(np.random.default_rng(6).permutation(wanted.size)[:50])
    assert np.array_equal(Delta(algorithm, "weight", arrays).at(places), compute_all(delta)[places])
    rows = delta.compute_rows(ROWS // 2 - 5, ROWS // 2 + 5)
    assert np.array_equal(
        rows.reshape(-1), compute_all(delta).reshape(ROWS, -1)[ROWS // 2 - 5 : ROWS // 2 + 5].reshape(-1)
    )


def test_norms_of_rows_are_set_by_blocks() -> None:
    algorithm, arrays, wanted = draw_low_rank("LoRA")
    generator = np.random.default_rng(7)
    base = draw(generator, ROWS, COLUMNS)
    norms = abs(draw(generator, ROWS, 1))
    delta = Delta(algorithm, "weight", arrays | {"dora_scale": norms})
    assert delta.sets_norms_of_rows(ROWS)
    whole = weight_decompose(torch.from_numpy(base + wanted), torch.from_numpy(norms), 0.5).numpy()
    rows = delta.decompose(base[300:350], ROWS, 300, 0.5).reshape(50, COLUMNS)
    assert abs(rows - whole[300:350]).max() <= 1e-6 * abs(whole).max()
    columns = Delta(algorithm, "weight", arrays | {"dora_scale": norms.T})
    assert not columns.sets_norms_of_rows(ROWS)
