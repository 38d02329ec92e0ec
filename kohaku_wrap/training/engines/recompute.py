"""The content digests of some micro-batches, made anew from the run's images and captions without its models.

Called as `python -m kohaku_wrap.training.engines.recompute RUN IMAGES` with a JSON list of [epoch, position,
substituted] on stdin, the last whether the ledger says that an image was replaced; prints a JSON list of digests, or of
texts that say why one could not be made.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.sdxl import LATENT_CHANNELS, LATENT_PIXELS
from kohaku_wrap.processes import answer
from kohaku_wrap.training.data.columns import ColumnsDataset, content_digest
from kohaku_wrap.training.data.items import BatchKey, ItemOptions, read_dataset_options
from kohaku_wrap.training.data.latent_store import SAMPLE
from kohaku_wrap.training.data.run_items import read_locked_dataset
from kohaku_wrap.training.data.torch_streams import draw_timesteps, seed_generators, step_seed
from kohaku_wrap.training.records.folder import Run

LEFT_OUT = ("noise_offset_random_strength", "ip_noise_gamma", "multires_noise_iterations", "adaptive_noise_scale")
"""Options with draws of their own before the time steps'."""


class CannotReplay(KwrapError):
    """The run draws its noise in a way that is not followed here."""


def replay_timesteps(
    latent_shape: tuple[int, ...], values: Mapping[str, Any], on_cpu: bool, draws_sample: bool = True
) -> list[int]:
    """The time steps of a batch after the draws that come before them, under the generators as they stand.

    `draws_sample`: whether the latents' sample is one of them. On a GPU that and the noise come from the device's own
    generator, so only the time steps are drawn.
    """
    if on_cpu:
        images = latent_shape[0]
        size = int(values.get("vae_batch_size") or images)
        for start in range(0, images if draws_sample else 0, size):
            torch.randn((min(size, images - start), *latent_shape[1:]))
        torch.randn(latent_shape)
        if values.get("noise_offset"):
            torch.randn((*latent_shape[:2], 1, 1))
    steps = draw_timesteps(latent_shape[0], values.get("min_timestep"), values.get("max_timestep"))
    return list(steps.tolist())


def recompute(run: Run, samples: list[list[int]]) -> list[int | str]:
    """One digest or reason a sample."""
    lock = run.lock
    # What was trained is what the lock says; the files of the run may have been edited since.
    values = lock.values
    unfollowed = [name for name in LEFT_OUT if values.get(name)]
    if unfollowed:
        raise CannotReplay(f"{', '.join(unfollowed)} draws before the time steps; --deep does not follow that")
    options = read_dataset_options(read_locked_dataset(run))
    dataset = ColumnsDataset(
        Columns.open(run.find_images(), lock.dataset_digest),
        ItemOptions.from_dataset_options(options, lock.joins_by_separator),
        lock.batch_per_gpu,
        lock.seed,
        lock.group,
        tokenize=None,
        substitute_bad_images=True,
        held_out=lock.held_out,
    )
    found: list[int | str] = []
    for epoch, position, was_substituted in samples:
        order = dataset.order.epoch(epoch)
        key = BatchKey(epoch, position, int(order.batch_of_position[position]), order.is_fill(position))
        try:
            example = dataset[key]
        except KwrapError as error:
            found.append(error.message)
            continue
        substituted = example["kwrap"]["substituted"]
        if bool(substituted) != bool(was_substituted):
            names = ", ".join(str(image) for image in substituted)
            found.append(
                f"images {names} cannot be read any more" if names else "an image that was replaced can be read now"
            )
            continue
        images, _, height, width = example["images"].shape
        seed_generators(step_seed(lock.seed, epoch, position))
        shape = (images, LATENT_CHANNELS, height // LATENT_PIXELS, width // LATENT_PIXELS)
        draws_sample = lock.table("cache").get("keep") != SAMPLE
        steps = replay_timesteps(shape, values, lock.is_on_cpu, draws_sample)
        found.append(content_digest(example["kwrap"]["content"], steps))
    return found


if __name__ == "__main__":
    answer(lambda: recompute(Run(Path(sys.argv[1]).resolve(), Path(sys.argv[2])), json.load(sys.stdin)))
