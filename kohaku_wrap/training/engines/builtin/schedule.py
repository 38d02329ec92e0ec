"""The schedule of the rates, made as sd-scripts makes it; beside the network, as verify needs it without a model."""

from __future__ import annotations

from typing import Any

import torch

from kohaku_wrap.trainer.builtin_options import BuiltinOptions
from kohaku_wrap.training.records.chapters import Cycle


def create_schedule(optimizer: torch.optim.Optimizer, options: BuiltinOptions, cycle: Cycle) -> Any:
    """The rate over the updates of a cycle, by transformers; the same on any number of processes."""
    from transformers import get_scheduler

    return get_scheduler(
        options.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=options.warmup_optimizer_steps(cycle.optimizer_steps) if cycle.has_warmup else 0,
        num_training_steps=cycle.optimizer_steps,
    )
