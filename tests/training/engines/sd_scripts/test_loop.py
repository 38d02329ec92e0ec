"""What kwrap counts inside the trainer's loop, without the trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the loop's counts are tensors")


@pytest.mark.parametrize("vae_batch_size", [1, 2, 3, 4])
def test_nan_latents_of_every_part_of_a_batch_are_counted(vae_batch_size: int) -> None:
    from kohaku_wrap.training.engines.sd_scripts.loop import Loop, MicroBatch

    class Noting(Loop):
        def train(self) -> Any:
            """Nothing is trained here."""

    loop: Any = Noting.__new__(Noting)
    loop.fired = set()
    loop.micro_batch = MicroBatch({})
    latents = torch.zeros(4, 4, 2, 2)
    latents[0, 1, 0, 0] = latents[2] = math.nan
    for part in torch.split(latents, vae_batch_size):
        loop.note_latents(part)
    assert int(loop.micro_batch.nan_latents) == 2
