"""Which rule of cached latents a training has, from its options or from the lock of its run."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.config.run_files import DATASET_FILE, merge_subsets
from kohaku_wrap.dataset.buckets import BucketOptions
from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound
from kohaku_wrap.training.data.latent_store import SAMPLE, LatentStore, Rule
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.lock import Lock


class OtherLatents(KwrapError):
    """The cached latents are not those that a run was made with."""


def make_rule(
    cache: Mapping[str, Any],
    values: Mapping[str, Any],
    subsets: Sequence[Mapping[str, Any]],
    vae_sha256: str,
    seed: int,
) -> Rule:
    """The rule of a training. `cache`: its table `[cache]`; `values`: the trainer's options; `subsets`: the dataset's
    options of each.

    Raises ProblemsFound where the images of a training are not the same each time.
    """
    problems = [
        Problem(name, "cannot go with [cache] latents: each time the image is another one")
        for name in ("random_crop", "color_aug")
        if any(each.get(name) for each in subsets)
    ]
    if problems:
        raise ProblemsFound("[cache]", problems, "Leave these options out, or [cache] latents.")
    weights = {"fp16": "fp16", "bf16": "bf16"}.get(str(values.get("mixed_precision")), "fp32")
    interpolations = [str(each.get("resize_interpolation") or "") for each in subsets]
    return Rule(
        vae_sha256=vae_sha256,
        vae_precision="fp32" if values.get("no_half_vae") else weights,
        keep=cache["keep"],
        precision=cache["precision"],
        seed=seed if cache["keep"] == SAMPLE else 0,
        flips=any(each.get("flip_aug") for each in subsets),
        sizes=asdict(BucketOptions.from_dataset_options(subsets[0])),
        interpolations=tuple(interpolations) if any(interpolations) else (),
    )


def rule_of_lock(lock: Lock) -> Rule:
    """The rule that a run was made with."""
    inputs = lock.table("inputs")
    vae = str(inputs.get("vae_sha256") or inputs.get("base_model_sha256", ""))
    subsets = merge_subsets(tomllib.loads(lock.files[DATASET_FILE]))
    return make_rule(lock.table("cache"), lock.values, subsets, vae, lock.seed)


def find_latents(run: Run) -> Path:
    """The folder of the run's cached latents: where the lock says, else beside its images where those lie now."""
    own, images = Path(str(run.lock.table("inputs").get("latents", ""))), run.find_images()
    name = rule_of_lock(run.lock).folder_in(own).name
    places = (own, images.with_name(f"{images.name}-latents"))
    return next((place / name for place in places if (place / name).is_dir()), own / name)


def open_latents(run: Run) -> LatentStore | None:
    """The cached latents that a run trains from; None for one that encodes its images. Raises NoLatents, BadIndex."""
    if not run.lock.table("cache").get("latents"):
        return None
    return LatentStore(find_latents(run), rule_of_lock(run.lock))


def require_same(store: LatentStore, ids: npt.NDArray[np.int64], lock: Lock, check: bool = False) -> None:
    """Raise OtherLatents unless the shards of these images are those of the lock, and what `require` raises."""
    if store.require(ids, check) != (locked := str(lock.table("inputs").get("latents_digest", ""))):
        raise OtherLatents(
            f"{store.folder}: the cached latents are not those that the run was made with ({locked[:12]}…)",
            "Restore the shards from a backup, or start a new run.",
        )
