"""The trainer's own generators, set from stateless seeds: history, worker and rank leave no trace.

Source of the rules: what is random about an item is a function of (seed, epoch, image id), what is random about
a step of (seed, epoch, global batch position).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from kohaku_wrap.dataset.fixed_chunks import TRAIN_TIMESTEPS
from kohaku_wrap.streams import seed_of


def step_seed(seed: int, epoch: int, position: int) -> int:
    """The seed behind the latents' sample, noise and time steps of one batch."""
    return seed_of("noise", seed, epoch, position)


def seed_generators(seed: int) -> None:
    """Set Python's, numpy's and torch's global generators (every CUDA device too) to `seed`."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    torch.manual_seed(seed)


def draw_timesteps(images: int, lowest: int | None, highest: int | None) -> torch.Tensor:
    """(images,) int64 by `min_timestep` and `max_timestep`, on the CPU, so that every device draws the same."""
    lowest, highest = lowest or 0, TRAIN_TIMESTEPS if highest is None else highest
    if lowest >= highest:
        return torch.full((images,), highest)
    return torch.randint(lowest, highest, (images,), device="cpu")


@contextmanager
def keeping_generators(devices: Iterable[int] = ()) -> Iterator[None]:
    """Run a block and give the generators of Python, numpy, torch's CPU and these CUDA devices back untouched."""
    saved = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])


@contextmanager
def isolated_generators(seed: int) -> Iterator[None]:
    """Run a block under `seed` and give the caller's CPU generators back untouched.

    For loader workers and the main process alike: CUDA generators are not touched.
    """
    with keeping_generators():
        random.seed(seed)
        np.random.seed(seed & 0xFFFF_FFFF)
        torch.default_generator.manual_seed(seed)
        yield
