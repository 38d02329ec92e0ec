"""The trainer's own loss of posts, by its own `process_batch`, with noise and time steps that kwrap gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device

from kohaku_wrap.training.data.whole_items import LATENT_STREAM, NOISE_STREAM, draw_normals
from kohaku_wrap.training.engines.sd_scripts.objects import named

NOISE_FUNCTION = "get_noise_noisy_latents_and_timesteps"
"""What the trainer draws noise and time steps with."""


class Measuring:
    """What the trainer's `process_batch` is called with, and what it is told for one measured batch."""

    def __init__(self, process_batch: Callable[..., Any], given: Mapping[str, Any]) -> None:
        """`given`: the arguments of a call while training."""
        self.process_batch = process_batch
        self.given = {name: value for name, value in given.items() if name != "batch"} | {"is_train": False}
        self.fixed: tuple[torch.Tensor, torch.Tensor] | None = None
        self.losses: torch.Tensor | None = None

    def list_models(self) -> list[torch.nn.Module]:
        """All modules that take part in a loss."""
        given = self.given
        return [given["unet"], given["vae"], *given["text_encoders"], given["network"]]

    def measure_posts(self, batch: dict[str, Any], ids: list[int], timesteps: tuple[int, ...]) -> torch.Tensor:
        """(posts, time steps) on the CPU: the loss of each post before weights."""
        device = self.given["accelerator"].device
        batch = dict(send_to_device(batch, device))
        spread = self.given["vae"].encode(batch["images"].to(self.given["vae_dtype"])).latent_dist
        # The trainer scales them, as it scales cached ones.
        batch["latents"] = spread.mean + spread.std * draw_normals(LATENT_STREAM, ids, 0, spread.mean)
        found = []
        try:
            for place, step in enumerate(timesteps):
                noise = draw_normals(NOISE_STREAM, ids, place, batch["latents"])
                self.fixed = noise, torch.full((len(ids),), step, device=device)
                self.process_batch(**self.given, batch=dict(batch))
                assert self.losses is not None
                found.append(self.losses.double().cpu())
        finally:
            self.fixed = self.losses = None
        return torch.stack(found, dim=1)


def noise_of_posts(draw_noise: Callable[..., Any], find: Callable[[], Measuring | None]) -> Callable[..., Any]:
    """The trainer's draw of noise and time steps, or, while posts are measured, what is fixed for them."""

    def draw(*arguments: Any, **keywords: Any) -> Any:
        measuring = find()
        if measuring is None or measuring.fixed is None:
            return draw_noise(*arguments, **keywords)
        given, (noise, timesteps) = named(draw_noise, arguments, keywords), measuring.fixed
        return noise, given["noise_scheduler"].add_noise(given["latents"], noise, timesteps), timesteps

    return draw
