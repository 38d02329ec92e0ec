"""What a judge says of a folder of pictures: recall of tags, looks, broken ones, distance to other pictures."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.evaluation.intervals import bootstrap_mean
from kohaku_wrap.evaluation.judges import WORST_TO_BEST, Features, Judge, UnreadablePicture
from kohaku_wrap.evaluation.looking import Looker
from kohaku_wrap.evaluation.other_results import FORMAT, list_versions
from kohaku_wrap.evaluation.sheet_pairs import compare_models
from kohaku_wrap.files import Progress, list_below, sort_files
from kohaku_wrap.sampling.compose import words_of_prompt
from kohaku_wrap.sampling.grammar import PromptError, parse_prompt
from kohaku_wrap.sampling.pictures import PARAMETERS, NotOurs, read_record, read_texts
from kohaku_wrap.streams import draws, stream_key
from kohaku_wrap.training.records.samples import CONTACT_SHEETS, read_sheet_record
from kohaku_wrap.wording import by_numbers

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp"})
CORRUPTED = "corrupted"
OF_THE_MODEL = ("model", "prediction", "zero_terminal_snr", "tokenizers", "compute")
"""Of a cell: what may differ between pictures that are compared."""

OF_THE_DRAWING = (
    *("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Clip skip", "Denoising strength"),
    "Hires upscale",
)
"""Of the webui's text: what must not."""

MOST_REFERENCES = 2000
FEW_PICTURES = 2048
"""Below it the Fréchet distance is too large by much."""

WEAKNESS = (
    "a Fréchet distance disagrees with people on anime pictures, and is too large for few pictures: compare it only "
    "between results of the same judge, the same reference and the same number of pictures"
)


class NoPictures(KwrapError):
    """A folder without any picture."""


@dataclass(frozen=True)
class Looked:
    """One picture that a judge has looked at."""

    path: Path
    """The file."""

    row: Features
    """(outputs,) what the judge says."""

    prompt: str | None
    """What it was drawn with; None where the file does not say."""

    model: str
    """Its title on the sheet, or its hash; empty where the file does not say."""

    identity: str = ""
    """The model's hash as the file says it."""

    drawn_as: str = ""
    """A digest of prompt, seed, size and sampler: all but the model; empty where the file does not say."""


def is_picture(path: Path) -> bool:
    """Whether a file is called like a picture, and is no contact sheet and none that is being written."""
    return path.suffix.lower() in ENDINGS and not CONTACT_SHEETS.fullmatch(path.name) and not path.name.startswith(".")


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder by name, contact sheets left out. Raises NoPictures."""
    if not folder.is_dir():
        raise NoPictures(f"{folder}: no such folder", "Give the folder that `kwrap sample --out` wrote.")
    found = sort_files(filter(is_picture, folder.iterdir()))
    if not found:
        raise NoPictures(f"{folder}: no picture in it", "Draw some: `kwrap sample MODEL --prompt TEXT --out DIR`.")
    return found


def choose_references(folder: Path) -> list[Path]:
    """Pictures of a folder and of those below it, at most MOST_REFERENCES, drawn by their names. Raises NoPictures."""
    found = sort_files(filter(is_picture, list_below(folder)))
    if not found:
        raise NoPictures(f"{folder}: no picture in it or below it", "Give a folder such as the extracted images.")
    keys = np.array([stream_key(path.relative_to(folder).as_posix()) for path in found], dtype=np.uint64)
    chosen = np.argsort(draws(stream_key("frechet"), keys), kind="stable")[:MOST_REFERENCES]
    return [found[place] for place in sorted(chosen.tolist())]


def look_at_all(
    looker: Looker, paths: Sequence[Path], on_progress: Progress, sheet: Path | None = None
) -> tuple[list[Looked], list[str]]:
    """What the judge says of each picture, and messages on those that cannot be read; `sheet`: where prompts matter."""
    labels = read_sheet_record(sheet).get("pictures", {}) if sheet else {}
    found, unreadable = [], []
    for done, path in enumerate(paths, start=1):
        try:
            row = looker.look_at(path)
        except UnreadablePicture as error:
            unreadable.append(error.message)
        else:
            prompt, model, drawn_as = read_origin(path) if sheet else (None, "", "")
            named = labels.get(path.name, {})
            title = named.get("model", "") if isinstance(named, dict) else ""
            found.append(Looked(path, row, prompt, str(title or model[:10]), model, drawn_as))
        on_progress(done, len(paths))
    return found, unreadable


def read_origin(path: Path) -> tuple[str | None, str, str]:
    """The prompt, the model's hash, and a digest of all else that a picture of kwrap or of the webui says."""
    try:
        cell = read_record(path)[0].cell
    except NotOurs:
        pass
    else:
        fields = {name: value for name, value in cell.describe().items() if name not in OF_THE_MODEL}
        return cell.prompt, cell.model, digest_of(fields)
    try:
        text = read_texts(path)[0][PARAMETERS]
    except (OSError, ValueError, KeyError, SyntaxError):
        return None, "", ""
    words, _, line = text.rpartition("\nSteps: ")
    settings = dict(re.findall(r"([A-Z][A-Za-z ]+): ([^,]*)", f"Steps: {line}"))
    fields = {name: settings[name] for name in OF_THE_DRAWING if name in settings}
    drawn_as = digest_of({"words": re.sub("<lora:[^>]*>", "", words), **fields}) if "Seed" in fields else ""
    prompt = re.split(r"\nNegative prompt: |\nSteps: ", text)[0]
    return prompt, settings.get("Model hash", ""), drawn_as


def digest_of(fields: Mapping[str, Any]) -> str:
    """A sha256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def list_asked(judge: Judge, each: Looked) -> tuple[list[str], list[str]]:
    """The prompted tags that a tagger knows, and those that it does not, each once, with underscores."""
    try:
        words = words_of_prompt(parse_prompt(each.prompt or "", lenient=True))
    except PromptError:
        words = []
    tags = dict.fromkeys(word.replace(" ", "_") for word in words)
    return [tag for tag in tags if tag in judge.places], [tag for tag in tags if tag not in judge.places]


def find_recall(judge: Judge, each: Looked) -> float | None:
    """The share of the prompted tags that a tagger sees; None where it knows none of them."""
    known, _ = list_asked(judge, each)
    seen = [each.row[judge.places[tag]] >= (judge.kind.threshold or 0.0) for tag in known]
    return float(np.mean(seen)) if seen else None


def find_look(judge: Judge, each: Looked) -> float | None:
    """From 0 (worst) to 6 (masterpiece); None where the labels are others."""
    if set(judge.labels) != set(WORST_TO_BEST):
        return None
    return float(each.row.astype(np.float64) @ [float(WORST_TO_BEST.index(label)) for label in judge.labels])


def find_corruption(judge: Judge, each: Looked) -> float:
    """The share of the label that says broken. Raises KwrapError where no label does."""
    if CORRUPTED not in judge.labels:
        raise KwrapError(f"{judge.folder}: no label {CORRUPTED!r} among its labels", "Name them in judge.toml: labels.")
    return float(each.row[judge.labels.index(CORRUPTED)])


def measure_tags(judge: Judge, looked: Sequence[Looked]) -> dict[str, Any]:
    """The recall of prompted tags: of those that the tagger knows, how many it sees, by picture and by tag."""
    limit = judge.kind.threshold or 0.0
    asked: dict[str, list[float]] = {}
    strange: Counter[str] = Counter()
    for each in looked:
        known, unknown = list_asked(judge, each)
        strange.update(unknown)
        for tag in known:
            asked.setdefault(tag, []).append(float(each.row[judge.places[tag]]))
    recalls = [value for each in looked if (value := find_recall(judge, each)) is not None]
    return {
        "recall": bootstrap_mean(recalls),
        "threshold": limit,
        "pictures_without_known_tag": len(looked) - len(recalls),
        "tags": [
            {"tag": tag, "pictures": len(shares), "recall": sum(share >= limit for share in shares) / len(shares),
             "mean_share": float(np.mean(shares))}
            for tag, shares in sorted(asked.items())
        ],
        "unknown_tags": dict(sorted(strange.items())),
    }  # fmt: skip


def measure_looks(judge: Judge, looked: Sequence[Looked]) -> dict[str, Any]:
    """The mean share of each label, and from 0 (worst) to 6 (masterpiece) the mean where the labels are these."""
    rows = np.stack([each.row for each in looked]).astype(np.float64)
    shares = dict(zip(judge.labels, rows.mean(axis=0).tolist(), strict=True))
    looks = [value for each in looked if (value := find_look(judge, each)) is not None]
    return {"shares": shares, "score": bootstrap_mean(looks)}


def measure_corruption(judge: Judge, looked: Sequence[Looked]) -> dict[str, Any]:
    """Which pictures are more likely broken than not. Raises KwrapError where no label says so."""
    shares = [find_corruption(judge, each) for each in looked]
    broken = [each.path.name for each, share in zip(looked, shares, strict=True) if share >= 0.5]
    return {
        "corrupted": len(broken),
        "mean_share": bootstrap_mean(shares),
        "pictures_corrupted": sorted(broken),
    }


def measure_distance(looked: Sequence[Looked], reference: Sequence[Looked]) -> dict[str, Any]:
    """The Fréchet distance of the judge's outputs to those of other pictures, with its known weakness."""
    one, other = (np.stack([each.row for each in rows]).astype(np.float64) for rows in (looked, reference))
    few = min(len(one), len(other))
    return {
        "distance": find_frechet_distance(one, other) if few > 1 else None,
        "pictures": len(one),
        "reference_pictures": len(other),
        "reference_sha256": hashlib.sha256(np.stack([each.row for each in reference]).tobytes()).hexdigest(),
        "weakness": WEAKNESS,
        "is_few": few < FEW_PICTURES,
    }


def find_frechet_distance(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Of the normal distributions with the means and covariances of two sets of rows, at least two each.

    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982.
    """
    apart = one.mean(axis=0) - other.mean(axis=0)
    first, second = np.atleast_2d(np.cov(one, rowvar=False)), np.atleast_2d(np.cov(other, rowvar=False))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle = np.linalg.eigvalsh(root @ second @ root)
    distance = apart @ apart + np.trace(first) + np.trace(second) - 2 * np.sqrt(np.maximum(middle, 0)).sum()
    return float(max(distance, 0.0))


MEASURES = {"tagger": measure_tags, "aesthetic": measure_looks, "corruption": measure_corruption}
VALUES = {"tagger": find_recall, "aesthetic": find_look, "corruption": find_corruption}
"""What is compared picture by picture."""


def compose_result(
    judge: Judge, looked: Sequence[Looked], unreadable: Sequence[str], reference: Sequence[Looked]
) -> dict[str, Any]:
    """The one document of a judged folder: over all pictures, and by model."""
    measure = MEASURES.get(judge.kind.name)

    def describe(chosen: Sequence[Looked]) -> dict[str, Any]:
        found: dict[str, Any] = {"pictures": len(chosen)}
        if measure and chosen:
            found |= measure(judge, chosen)
        if reference and chosen:
            found["frechet"] = measure_distance(chosen, reference)
        return found

    titles = sorted({each.model for each in looked}, key=by_numbers)
    by_model: Mapping[str, list[Looked]] = {title: [each for each in looked if each.model == title] for title in titles}
    value_of = VALUES.get(judge.kind.name)
    models = [
        {
            "title": title or "unknown", "identities": sorted({each.identity for each in rows if each.identity}),
            **describe(rows),
            "judged": [
                {
                    "file": each.path.name, "drawn_as": each.drawn_as,
                    "value": value_of(judge, each) if value_of else None,
                }
                for each in rows
            ],
        }
        for title, rows in by_model.items()
    ]  # fmt: skip
    return {
        "format": FORMAT,
        "measure": judge.kind.name,
        "versions": list_versions("numpy", "pillow"),
        "judge": judge.describe(),
        "prompts_sha256": digest_of({"prompts": sorted({each.prompt or "" for each in looked})}),
        "all": describe(looked),
        "models": models,
        "pairs": compare_models(models),
        "unreadable": sorted(unreadable),
    }
