"""Which rules of cached latents and outputs a training has, from its options or from the lock of its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.dataset.buckets import BucketOptions
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.data.latent_index import StoreRule
from kohaku_wrap.training.data.latent_store import SAMPLE, LatentStore, RecordStore, Rule
from kohaku_wrap.training.data.text_store import TextRule, TextStore
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.lock import Lock
from kohaku_wrap.training.records.remembered import read_remembered

LATENTS, TEXTS = "latents", "text_encoders"
"""What keys of the lock's [inputs] about what is cached begin with."""


class OtherLatents(KwrapError):
    """What is cached is not what a run was made with."""


def make_rule(
    cache: Mapping[str, Any],
    values: Mapping[str, Any],
    subsets: Sequence[Mapping[str, Any]],
    vae_sha256: str,
    seed: int,
) -> Rule:
    """The rule of a training. `cache`: its table `[cache]`; `values`: the trainer's options; `subsets`: the dataset's
    options of each."""
    weights = precision_of(values)
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


def precision_of(values: Mapping[str, Any]) -> str:
    """What frozen weights are in, and what the UNet reads, by the trainer's options."""
    return {"fp16": "fp16", "bf16": "bf16"}.get(str(values.get("mixed_precision")), "fp32")


def make_text_rule(
    values: Mapping[str, Any], inputs: Mapping[str, Any], outputs: Sequence[int], engine: str, on_cpu: bool
) -> TextRule:
    """The rule of a training's text encoders. `inputs`: of the lock, of which the sha256 of model and tokenizers are
    read; `outputs`: see `TextRule`."""
    tokens, first, second, pooled = outputs
    return TextRule(
        base_model_sha256=str(inputs.get("base_model_sha256", "")),
        tokenizers_sha256=str(inputs.get("tokenizers_sha256", "")),
        # The builtin engine keeps them in fp32 on the CPU.
        computed_in="fp32" if engine == "builtin" and on_cpu else precision_of(values),
        precision=precision_of(values),
        outputs=(tokens, first, second, pooled),
    )


def text_rule_of_lock(lock: Lock) -> TextRule:
    """The rule of text encoders' outputs that a run was made with."""
    inputs = lock.table("inputs")
    return make_text_rule(lock.values, inputs, inputs[f"{TEXTS}_outputs"], lock.engine, lock.is_on_cpu)


def rule_of_lock(lock: Lock) -> Rule:
    """The rule of latents that a run was made with."""
    inputs = lock.table("inputs")
    vae = str(inputs.get("vae_sha256") or inputs.get("base_model_sha256", ""))
    return make_rule(lock.table("cache"), lock.values, lock.subsets, vae, lock.seed)


def find_folder(run: Run, rule: StoreRule) -> Path:
    """Where a run has what is cached by a rule: as its site says, else its lock, else beside its images of today."""
    own, images = Path(str(run.lock.table("inputs").get("latents", ""))), run.find_images()
    of_site = run.latents_now or Path(str(read_remembered(run).taken.get(LATENTS, own)))
    places = (of_site, own, images.with_name(f"{images.name}-latents"))
    found = (rule.folder_in(place) for place in places)
    return next((folder for folder in found if folder.is_dir()), rule.folder_in(own))


def open_latents(run: Run) -> LatentStore | None:
    """The cached latents that a run trains from; None for one that encodes its images. Raises NoLatents, BadIndex."""
    if not run.lock.table("cache").get("latents"):
        return None
    rule = rule_of_lock(run.lock)
    return LatentStore(find_folder(run, rule), rule)


def open_texts(run: Run) -> TextStore | None:
    """The cached outputs of text encoders that a run trains from; None for one that encodes its captions.

    Raises NoLatents, BadIndex.
    """
    if not run.lock.table("cache").get("text_encoders"):
        return None
    rule = text_rule_of_lock(run.lock)
    return TextStore(find_folder(run, rule), rule)


def require_same(store: RecordStore, ids: npt.NDArray[np.int64], lock: Lock, check: bool = False) -> None:
    """Raise OtherLatents unless the shards of these images are those of the lock, and what `require` raises."""
    name = TEXTS if isinstance(store, TextStore) else LATENTS
    if store.require(ids, check) != (locked := str(lock.table("inputs").get(f"{name}_digest", ""))):
        raise OtherLatents(
            f"{store.folder}: the cached {store.rule.what} are not those that the run was made with ({locked[:12]}…)",
            "Restore the shards from a backup, or start a new run.",
        )
