"""The loss of models on posts at fixed time steps, by several processes that share chunks, and what it comes to."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.dataset.captions.groups import GROUPS, Grouping
from kohaku_wrap.errors import KwrapError, UsageError
from kohaku_wrap.evaluation.intervals import bootstrap_mean
from kohaku_wrap.evaluation.other_results import FORMAT, add_models, list_versions, read_result, refuse_differing
from kohaku_wrap.files import Progress
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.processes import ask_in_lines
from kohaku_wrap.sampling.cells import Compute
from kohaku_wrap.sampling.expanding import KnownModel
from kohaku_wrap.training.data.items import UNUSED_BY_TRAINING
from kohaku_wrap.training.records.evaluations import Losses, average
from kohaku_wrap.training.records.folder import Run

WORKER = "kohaku_wrap.evaluation.workers.measure_loss"
TOLERANCE = 1e-4
"""Relative: what another batch, device or number of threads may change of a mean."""

MOST_COMPARED = 12
"""Models that are compared each with each; of more, those of two results at the same optimizer step."""


COMPARED = {
    "other posts": ("posts", "ids_sha256"), "other captions": ("posts", "captions_digest"),
    "other time steps": ("settings", "timesteps"), "other dataset options": ("settings", "dataset_options"),
    "other tokenizers": ("settings", "tokenizers"), "another length of captions": ("settings", "max_token_length"),
}  # fmt: skip
"""What two results must have in common."""

NOT_OF_WHOLE_POSTS = UNUSED_BY_TRAINING | {
    "num_repeats", "flip_aug", "random_crop", "caption_dropout_rate", "caption_dropout_every_n_epochs"
}  # fmt: skip
"""Dataset options in which two results may differ: a post that is measured whole is the same with any of them."""


class CannotMeasure(KwrapError):
    """A process that measures could not."""


class TrainedPosts(UsageError):
    """Posts that the run has trained, which are not held out."""


@dataclass(frozen=True)
class LossJob:
    """What is measured, but for the model."""

    columns: Columns
    """The posts' captions and pictures."""

    rows: Sequence[int]
    """Of the posts, ascending."""

    chunks: Sequence[Sequence[int]]
    """The same rows, each chunk of one bucket."""

    dataset_options: Mapping[str, Any]
    """Of training, as sd-scripts names them."""

    joins_by_separator: bool
    """The commit's rule for captions."""

    max_token_length: int | None
    """Of captions."""

    tokenizers: tuple[Path, Path]
    """Both folders."""

    tokenizers_digest: str
    """Of both."""

    timesteps: Sequence[int]
    """Of 1000."""

    compute: Compute
    """How it is computed."""

    out: Path
    """Where chunks are kept."""

    def key(self, known: KnownModel) -> str:
        """Of all that decides the numbers of a model."""
        facts = {
            "format": FORMAT, "model": known.identity, "captions": self.columns.digest,
            "prediction": asdict(known.prediction) | {"source": ""}, "options": dict(self.dataset_options),
            "joins": self.joins_by_separator, "tokens": self.max_token_length, "tokenizers": self.tokenizers_digest,
            "timesteps": list(self.timesteps), "compute": asdict(self.compute),
            "chunks": [list(each) for each in self.chunks],
        }  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def files(self, known: KnownModel) -> list[Path]:
        """Where each chunk's losses are kept."""
        folder = self.out / ".losses" / self.key(known)
        return [folder / f"chunk-{number:06d}.npy" for number in range(len(self.chunks))]

    def describe(self, known: KnownModel, files: Sequence[Path], index: int, processes: int) -> dict[str, Any]:
        """The part of one process as JSON."""
        return {
            "model": known.model.describe(),
            "prediction": known.prediction.kind,
            "zero_terminal_snr": known.prediction.zero_terminal_snr,
            "images": str(self.columns.folder),
            "captions_digest": self.columns.digest,
            "dataset_options": dict(self.dataset_options),
            "joins_by_separator": self.joins_by_separator,
            "max_token_length": self.max_token_length,
            "tokenizers": [str(path) for path in self.tokenizers],
            "timesteps": list(self.timesteps),
            "batch": self.compute.batch,
            "device": self.compute.device,
            "index": index,
            "dtype": {"fp32": "no"}.get(self.compute.dtype, self.compute.dtype),
            "threads": self.compute.threads,
            "chunks": [
                [str(path), list(rows)]
                for number, (path, rows) in enumerate(zip(files, self.chunks, strict=True))
                if number % processes == index
            ],
        }


def measure_losses(job: LossJob, known: KnownModel, processes: int, on_progress: Progress) -> Losses:
    """(posts, time steps) in the order of the rows, NaN for a picture that cannot be read. Raises CannotMeasure."""
    files = job.files(known)
    waiting = sum(not path.is_file() for path in files)
    count = min(processes, waiting)
    settings = {
        "OMP_NUM_THREADS": str(job.compute.threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", **({"CUDA_VISIBLE_DEVICES": ""} if job.compute.device == "cpu" else {}),
    }  # fmt: skip
    jobs = [job.describe(known, files, index, count) for index in range(count)]
    failed = CannotMeasure, "the loss cannot be measured", "What was measured is kept: fix that, run it again."
    with closing(ask_in_lines(WORKER, jobs, settings, *failed)) as answers:
        for done, _ in enumerate(answers, start=len(files) - waiting + 1):
            on_progress(done, len(files))
    on_progress(len(files), len(files))
    place = {row: number for number, row in enumerate(job.rows)}
    losses = np.full((len(job.rows), len(job.timesteps)), np.nan)
    for path, rows in zip(files, job.chunks, strict=True):
        losses[[place[row] for row in rows]] = found = np.load(path, allow_pickle=False)
        if np.isnan(found).any():  # measured again next time: the picture may be put right until then
            path.unlink()
    return losses


def choose_rows(run: Run | None, columns: Columns, leaves_out: bool, allows: bool) -> npt.NDArray[np.int64]:
    """(posts,) rows of the posts that the run does not train, or of all. Raises TrainedPosts where some are trained."""
    rows = np.arange(len(columns))
    if run is None or allows:
        return rows
    own = Columns.open(run.find_images(), run.lock.dataset_digest).ids
    trained = np.isin(columns.ids, own[~run.lock.held_out.mark(own)] if run.lock.held_out else own)
    if trained.any() and (trained.all() or not leaves_out):
        first = columns.ids[trained][0]
        left = "" if trained.all() else "--leave-out-trained takes the others, or "
        raise TrainedPosts(
            f"{int(trained.sum()):,} of {len(columns):,} posts are in the dataset of run {run.name}, the first is "
            f"{first}: their loss would say how well they are remembered",
            f"Give images that the run does not train; {left}--allow-trained takes all, which the result then says.",
        )
    return rows[~trained]


def describe_losses(losses: Losses, timesteps: Sequence[int], groups: Grouping) -> dict[str, Any]:
    """The mean, and that of each time step and group with its number of posts."""
    whole = np.isfinite(losses).all(axis=1)
    by_group: dict[str, Any] = {}
    for name in GROUPS:
        words = np.array(groups.words[name])
        by_group[name] = {
            word: {"posts": int((whole & (words == word)).sum()), "loss": average(losses[whole & (words == word)])}
            for word in sorted(set(words.tolist()))
        }
    return {
        "posts": int(whole.sum()),
        "loss": average(losses[whole]),
        "interval": bootstrap_mean(losses[whole].mean(axis=1)),
        "by_timestep": {str(step): average(losses[whole, place]) for place, step in enumerate(timesteps)},
        "by_group": by_group,
    }


def compare_pair(titles: tuple[str, str], losses: tuple[Losses, Losses]) -> dict[str, Any]:
    """The paired difference of two models over posts that both have, with a bootstrap interval."""
    apart = (losses[1] - losses[0]).mean(axis=1)
    apart = apart[np.isfinite(apart)]
    return {"from": titles[0], "to": titles[1], "posts": len(apart), "difference": bootstrap_mean(apart)}


def compare_losses(titles: Sequence[str], losses: Sequence[Losses]) -> list[dict[str, Any]]:
    """Each two models."""
    return [
        compare_pair(names, pair)
        for names, pair in zip(itertools.combinations(titles, 2), itertools.combinations(losses, 2), strict=True)
    ]


def list_losses(losses: Losses) -> list[list[float | None]]:
    """As JSON has them: None for what is no number."""
    return [[None if np.isnan(value) else value for value in row] for row in losses.tolist()]


def describe_posts(
    ids: npt.NDArray[np.int64], captions_digest: str, held_out: str, losses: Sequence[Losses]
) -> dict[str, Any]:
    """What was measured on; `held_out`: what is known of whether it was trained."""
    odd = ~np.isfinite(np.stack(losses)).all(axis=(0, 2)) if losses else np.zeros(len(ids), dtype=bool)
    return {
        "count": len(ids), "captions_digest": captions_digest, "held_out": held_out,
        "ids_sha256": hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest(),
        "ids": ids.tolist(), "unreadable": ids[odd].tolist(),
    }  # fmt: skip


def describe_settings(job: LossJob) -> dict[str, Any]:
    """What was measured, and how."""
    return {
        "timesteps": list(job.timesteps), "dataset_options": dict(job.dataset_options),
        "max_token_length": job.max_token_length, "compute": asdict(job.compute),
        "tokenizers": job.tokenizers_digest, "chunks": len(job.chunks),
        "tolerance_of_another_batch": TOLERANCE,
    }  # fmt: skip


def describe_job(job: LossJob) -> dict[str, Any]:
    """What is known before anything is measured, as a result has it."""
    ids = job.columns.ids[list(job.rows)]
    return {"posts": describe_posts(ids, job.columns.digest, "", ()), "settings": describe_settings(job)}


def compose_result(
    job: LossJob, models: Sequence[tuple[KnownModel, str]], losses: Sequence[Losses], groups: Grouping,
    held_out: str,
) -> dict[str, Any]:  # fmt: skip
    """The one document; `models`: each with its title; `held_out`: what is known of the posts."""
    return {
        "format": FORMAT,
        "measure": "loss",
        "versions": list_versions("torch", "diffusers", "transformers", "numpy"),
        "rule": "mean squared error of the prediction, without weights; noise, sample of the latents and time steps "
        "follow from the post alone; captions whole, no flip, crop in the middle; networks as they are baked",
        "posts": describe_posts(job.columns.ids[list(job.rows)], job.columns.digest, held_out, losses),
        "settings": describe_settings(job),
        "models": [
            {
                "title": title, "identity": known.identity, "optimizer_step": known.model.optimizer_step,
                "prediction": known.prediction.kind, **describe_losses(each, job.timesteps, groups),
                "losses": list_losses(each),
            }
            for (known, title), each in zip(models, losses, strict=True)
        ],
        "pairs": compare_losses([title for _, title in models], losses),
    }  # fmt: skip


def keep_deciding(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result with those of its dataset options that decide what a post is."""

    def keep(options: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in options.items() if name not in NOT_OF_WHOLE_POSTS}
        return kept | {name: [keep(each) for each in kept[name]] for name in ("later_subsets",) if name in kept}

    settings = result.get("settings", {})
    return {**result, "settings": {**settings, "dataset_options": keep(settings.get("dataset_options", {}))}}


def read_other(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """A whole result on the posts, and with the settings, of a job or of another result. Raises OtherResult."""
    advice = "Only results on the same posts compare; for a MODEL --template says whose dataset options hold."
    shape = about["posts"]["count"], len(about["settings"]["timesteps"])

    def check(other: dict[str, Any]) -> None:
        refuse_differing(path, "measured on", advice, keep_deciding(about), keep_deciding(other), COMPARED)
        for model in other["models"]:
            if read_losses(model).shape != shape or "optimizer_step" not in model:
                raise ValueError("another form")

    return read_result(path, "loss", ("loss",), "loss.json", check)


def read_losses(model: Mapping[str, Any]) -> Losses:
    """(posts, time steps) as `list_losses` listed them."""
    rows = [[np.nan if value is None else value for value in row] for row in model["losses"]]
    return np.array(rows, dtype=np.float64)


def lay_over(result: dict[str, Any], path: Path) -> None:
    """Add the models of another result, and the pairs that they make. Raises OtherResult where they differ."""
    other = read_other(path, result)
    own = len(result["models"])
    add_models(result, other["models"], path)
    listed = result["models"]
    losses, names = [read_losses(each) for each in listed], [each["title"] for each in listed]
    if len(listed) <= MOST_COMPARED:
        result["pairs"] = compare_losses(names, losses)
        return
    for one, two in itertools.product(range(own), range(own, len(listed))):
        if listed[one]["optimizer_step"] == listed[two]["optimizer_step"]:
            result["pairs"].append(compare_pair((names[one], names[two]), (losses[one], losses[two])))
