"""What `verify --deep` makes anew: captions, crops and time steps of some micro-batches, from images and captions."""

from __future__ import annotations

import numpy as np

from kohaku_wrap.errors import KwrapError, refusing
from kohaku_wrap.formats.caption_rows import open_captions
from kohaku_wrap.processes import NoAnswer, ask_python
from kohaku_wrap.streams import draws, stream_key
from kohaku_wrap.training.comparing.places import read_trainer
from kohaku_wrap.training.data.latent_rules import LATENTS, TEXTS
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import SUBSTITUTE
from kohaku_wrap.training.starting.caching import ENCODE_WORKER
from kohaku_wrap.training.verifying.ledger_checks import Checker, Int64Array, Records
from kohaku_wrap.training.verifying.line_checks import Check

RECOMPUTE_WORKER = "kohaku_wrap.training.engines.recompute"

TOLERANCE = 0.05
"""Of a number, or of its size where it is beyond 1: another device or version stays far below, another image, caption
or model far above."""


class CannotRecompute(KwrapError):
    """The worker that recomputes samples could not do it."""


def check_deep(
    run: Run, checker: Checker, candidates: Int64Array, samples: int, captions_changed: bool
) -> tuple[list[Check], int]:
    """Recompute the content of some records; what came of it, and how many could be."""
    if not samples:
        return [], 0
    if run.lock.data != "kwrap":
        return [Check("deep", False, 'not possible with data = "sd-scripts"')], 0
    if captions_changed:
        why = "not possible: the captions were changed after the run"
        return [Check("deep", False, why)], 0
    chosen = choose_samples(candidates, min(samples, len(candidates)))
    digests = recompute_content(run, checker.records, chosen)
    troubles = [digest for digest in digests if isinstance(digest, str)]
    made = np.array([not isinstance(digest, str) for digest in digests], dtype=bool)
    checker.check_content(chosen[made], [digest for digest in digests if not isinstance(digest, str)])
    if troubles:
        why = f"{len(troubles):,} of {len(chosen):,} micro-batches not possible: {troubles[0]}"
        return [Check("deep", False, why)], int(made.sum())
    return [Check("deep", True, f"micro-batches recomputed: {len(chosen):,}")], len(chosen)


def check_caches(run: Run, samples: int) -> tuple[list[Check], list[str]]:
    """Encode some images and captions again, on the kind of device that the run has, and compare what is cached; what
    is not as it was."""
    cache, checks, changed = run.lock.table("cache"), [], []
    for kind, what in ((LATENTS, "images"), (TEXTS, "captions")):
        if samples and cache.get(kind):
            check, change = check_cache(run, kind, what, samples)
            checks.append(check)
            changed += change
    return checks, changed


def check_cache(run: Run, kind: str, what: str, samples: int) -> tuple[Check, list[str]]:
    """Likewise of one kind."""
    settings = {"OMP_NUM_THREADS": str(max((each.threads or 1 for each in list_attempts(run)), default=1))}
    settings |= {"CUDA_VISIBLE_DEVICES": ""} if run.lock.is_on_cpu else {}
    try:
        ids = open_captions(run.find_images(), run.lock.dataset_digest).read_all()["id"].to_numpy()
        chosen = ids[choose_samples(np.arange(len(ids)), min(samples, len(ids)))].tolist()
        trainer = read_trainer(run.trainer_config)
        request = {
            "kind": kind,
            "engine": run.lock.engine,
            "base_model": trainer["pretrained_model_name_or_path"],
            "vae": trainer.get("vae"),
            "tokenizers": trainer.get("tokenizer_cache_dir"),
            "ids": chosen,
            "latents": str(run.latents_now) if run.latents_now else None,
        }
        answer = ask_python(
            ENCODE_WORKER, run.folder, run.find_images(), request=request, added=settings, folder=run.folder
        )
    except (KwrapError, KeyError) as failed:
        return Check(kind, False, f"not possible: {str(failed).splitlines()[0]}"), []
    largest = float(answer["difference"])
    found = f"the largest difference {largest:.3g}" if largest else "bit for bit the same"
    said = f"{len(chosen):,} {what} encoded again, {found}"
    changed = [f"{kind}: {said}, of image {answer['image']}"] if largest > TOLERANCE else []
    return Check(kind, True, said), changed


def choose_samples(candidates: Int64Array, samples: int) -> Int64Array:
    """Some of the records, spread by a fixed draw, so that a second call looks at the same ones."""
    return np.sort(candidates[np.argsort(draws(stream_key("deep"), candidates))[:samples]])


def recompute_content(run: Run, records: Records, chosen: Int64Array) -> list[int | str]:
    """The content digest of each chosen record, made anew from images and captions, or why it could not be.

    Raises CannotRecompute when the worker fails as a whole.
    """
    substituted = (records.flags & SUBSTITUTE) > 0
    samples = [[int(records.epoch[each]), int(records.position[each]), int(substituted[each])] for each in chosen]
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with refusing(
        CannotRecompute, "the samples cannot be recomputed:", "Verify without --deep, or fix that.", NoAnswer
    ):
        digests: list[int | str] = ask_python(
            RECOMPUTE_WORKER, run.folder, run.find_images(), request=samples, added=settings, folder=run.folder
        )
    return digests
