"""The evaluations of `[validation]` while a run trains: how many, of how many forwards, and how long they take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kohaku_wrap.config.effective import Effective
from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.dataset.fixed_chunks import cut_chunks
from kohaku_wrap.formats.caption_rows import ImageSizes
from kohaku_wrap.steps import StepPlan

FORWARDS_A_TRAINED_ROW = 3
"""A forward and a backward of two, of the network alone: what a measured row is a part of."""


@dataclass(frozen=True)
class ValidationPlan:
    """What `[validation]` makes of a training."""

    posts: int
    """Posts whose loss is measured."""

    relatives: int
    """Posts that are not trained either, as they are their like."""

    evaluations: int
    """Before the first step, every so many steps, and after the last one; none where `every` is 0."""

    forwards: int
    """Of the UNet, all evaluations together."""

    rows: int
    """Images of each forward."""

    seconds: float | None
    """Of all evaluations, where a step's time is known: a row as a third of a trained one."""


def plan_validation(
    effective: Effective, plan: StepPlan, images: ImageSizes, seconds_per_step: float | None
) -> ValidationPlan | None:
    """The evaluations of a training; None where none are asked for, or it is not known of which posts."""
    if images.measured is None:
        return None
    options = BucketOptions.from_dataset_options(effective.subtable("dataset_options", with_defaults=True))
    buckets = assign_buckets(images.widths, images.heights, options)
    rows = int(effective.get("validation.batch"))
    chunks = len(cut_chunks(np.flatnonzero(images.measured), buckets, rows))
    total, every = plan.total_optimizer_steps, int(effective.get("validation.every"))
    evaluations = len({0, *range(every, total + 1, every), total}) if every else 0
    forwards = evaluations * chunks * int(effective.get("validation.timesteps"))
    seconds = None
    if seconds_per_step is not None:
        seconds = seconds_per_step * forwards * rows / (plan.effective_batch * FORWARDS_A_TRAINED_ROW)
    posts = int(images.measured.sum())
    relatives = int((np.broadcast_to(images.repeats, images.measured.shape) == 0).sum()) - posts
    return ValidationPlan(posts, relatives, evaluations, forwards, rows, seconds)
