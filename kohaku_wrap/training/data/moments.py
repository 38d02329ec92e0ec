"""Mean and deviation of latents, and the sample that a step draws of them as it would of an image just encoded."""

from __future__ import annotations

from typing import Any

import torch

from kohaku_wrap.formats.sdxl import LATENT_CHANNELS


def moments_of(distribution: Any) -> torch.Tensor:
    """(n, 8, rows, columns) of diffusers' DiagonalGaussianDistribution: mean, then deviation."""
    return torch.cat([distribution.mean, distribution.std], dim=1)


def holds_moments(images: torch.Tensor) -> bool:
    """Whether a batch of what the VAE would encode holds moments in place of pixels."""
    return images.shape[1] == 2 * LATENT_CHANNELS


def sample_moments(moments: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """(n, 4, rows, columns) drawn from the generator as diffusers draws it.

    Source: DiagonalGaussianDistribution.sample.
    """
    mean, deviation = torch.chunk(moments, 2, dim=1)
    return mean + deviation * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
