"""What the loop keeps of the micro-batch in work, and adds up over an optimizer step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class StepSums:
    """What is summed over the micro-batches of one optimizer step, first on this rank, then over all."""

    loss: float = 0.0
    """Sum of the micro-batches' losses."""

    images: int = 0
    """Images trained."""

    nan_latents: int = 0
    """Images whose latents were not numbers, which sd-scripts makes zeros."""

    substitutes: int = 0
    """Unreadable images that were replaced."""

    started: float = field(default_factory=time.monotonic)
    """When the step began."""


@dataclass
class MicroBatch:
    """What is known of the micro-batch in work."""

    facts: Mapping[str, Any]
    """Epoch, position, image ids and content, as the dataset put them."""

    learning_rate: float
    """The UNet's rate in this optimizer step."""

    timesteps: torch.Tensor | None = None
    """(images,) noise levels, on the trainer's device."""

    nan_latents: torch.Tensor | None = None
    """() count, on the trainer's device."""

    loss: torch.Tensor | None = None
    """() mean loss, on the trainer's device."""
