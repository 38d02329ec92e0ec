"""What a run's own validation came to, laid out as `kwrap evaluate loss` lays out models."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from kohaku_wrap.dataset.captions.groups import Grouping
from kohaku_wrap.errors import UsageError, command_line
from kohaku_wrap.evaluation.held_out import TOLERANCE, compare_pair, describe_losses, describe_posts, list_losses
from kohaku_wrap.evaluation.other_results import FORMAT, list_versions
from kohaku_wrap.training.records.evaluations import Evaluation, read_evaluations
from kohaku_wrap.training.records.folder import Run

RULE = (
    "the trainer's own loss of the prediction, before weights of time steps; noise, sample of the latents and time "
    "steps follow from the post alone; captions whole, no flip, crop in the middle; the network as it was at that step"
)


class NothingMeasured(UsageError):
    """The run has no evaluation of held-out posts."""


def choose_evaluations(run: Run, steps: Collection[int] | None) -> list[Evaluation]:
    """Those at some optimizer steps, or all. Raises NothingMeasured with those there are."""
    found = list(read_evaluations(run))
    if not found:
        why = "no posts are held out" if run.lock.held_out is None else "nothing was measured yet"
        raise NothingMeasured(
            f"run {run.name}: {why} ([validation] of its template)",
            f"Measure its networks on other posts: {command_line('evaluate', 'loss', run.folder, '--images')} IMAGES.",
        )
    chosen = [each for each in found if steps is None or each.optimizer_step in steps]
    if len(chosen) < len(steps or ()):
        there = ", ".join(f"{each.optimizer_step:,}" for each in found)
        missing = sorted(set(steps or ()) - {each.optimizer_step for each in chosen})
        raise NothingMeasured(f"run {run.name}: nothing was measured at step {missing[0]:,}", f"There are: {there}.")
    return chosen


def compose_validation(run: Run, chosen: list[Evaluation], groups: Grouping) -> dict[str, Any]:
    """The document of `loss.json`, with an evaluation in the place of a model; pairs are neighbours, and first to last.

    Raises NothingMeasured where the evaluations are of different posts or time steps.
    """
    first = chosen[0]
    if any(each.timesteps != first.timesteps or not np.array_equal(each.posts, first.posts) for each in chosen):
        raise NothingMeasured(
            f"run {run.name}: its evaluations are of different posts", "Name some: --checkpoints N,M."
        )
    alike = run.lock.table("validation").get("relatives", 0)
    titles = [f"{run.name} after optimizer step {each.optimizer_step:,}" for each in chosen]
    losses = [each.losses for each in chosen]
    places = [(place, place + 1) for place in range(len(chosen) - 1)]
    places += [(0, len(chosen) - 1)] if len(chosen) > 2 else []
    held_out = f"taken out of the training of run {run.name}, with {alike:,} that are their like"
    return {
        "format": FORMAT,
        "measure": "loss",
        "versions": {**list_versions(), "torch": first.about["torch"]},
        "rule": RULE,
        "posts": describe_posts(first.posts, run.lock.dataset_digest, held_out, losses),
        "settings": {
            "timesteps": list(first.timesteps), "dataset_options": {**run.lock.table("dataset"), "image_dir": ""},
            "max_token_length": run.lock.values.get("max_token_length"),
            "compute": {name: first.about[name] for name in ("engine", "device", "dtype", "batch")},
            "tokenizers": str(run.lock.table("inputs").get("tokenizers_sha256", "")),
            "tolerance_of_another_batch": TOLERANCE,
        },
        "models": [
            {
                "title": title, "identity": each.about["key"], "optimizer_step": each.optimizer_step,
                "attempt": each.about["attempt"], "processes": each.about["processes"],
                **describe_losses(each.losses, each.timesteps, groups), "losses": list_losses(each.losses),
            }
            for title, each in zip(titles, chosen, strict=True)
        ],
        "pairs": [compare_pair((titles[one], titles[two]), (losses[one], losses[two])) for one, two in places],
    }  # fmt: skip
