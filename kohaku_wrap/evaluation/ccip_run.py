"""A CCIP evaluation from end to end: characters, prompts, pictures that are drawn, scores, one document."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.evaluation.ccip import (
    Score,
    compare_models,
    group_by_exposure,
    score_pictures,
    summarise,
)
from kohaku_wrap.evaluation.characters import INFERRED, PRESETS, Character
from kohaku_wrap.evaluation.exposure import Exposure, NoSuchTag
from kohaku_wrap.evaluation.judges import Features
from kohaku_wrap.evaluation.looking import Looker
from kohaku_wrap.evaluation.other_results import FORMAT, add_models, list_versions, read_result, refuse_differing
from kohaku_wrap.files import Progress
from kohaku_wrap.sampling.expanding import PlacedCell

COMPARED = {
    "another judge": ("judge", "sha256"),
    "another threshold": ("judge", "threshold"),
    "other prompts": ("prompts", "template"),
}
"""What two results must have in common."""


class NoCharacters(KwrapError):
    """No character has references enough."""


@dataclass(frozen=True)
class Choice:
    """Characters to score, and those that are not."""

    scored: tuple[Character, ...]
    """With references enough."""

    not_scored: tuple[Mapping[str, str], ...]
    """`tag` and `why` of each other one."""


def choose_characters(characters: Sequence[Character], least_posts: int) -> Choice:
    """Those with references enough, by tag. Raises NoCharacters where there is none."""
    scored, left = [], []
    for each in sorted(characters, key=lambda one: one.tag):
        if each.fault or each.reference_count == 0:
            left.append({"tag": each.tag, "why": each.fault or "no reference: no extracted post of it alone"})
        elif each.features is None and each.posts < least_posts:
            left.append({"tag": each.tag, "why": f"{each.posts} solo posts, {least_posts} are needed"})
        else:
            scored.append(each)
    if not scored:
        first = f": {left[0]['tag']}: {left[0]['why']}" if left else ""
        raise NoCharacters(
            f"none of {len(left):,} characters can be scored{first}",
            "Ask for fewer solo posts with --min-posts N, or give an index: --characters FOLDER.",
        )
    return Choice(tuple(scored), tuple(left))


def look_at_references(
    looker: Looker, characters: Sequence[Character], least: int, on_progress: Progress
) -> tuple[dict[str, Features], list[dict[str, str]], list[str]]:
    """The features of each character's references, the characters that are left out, and what cannot be read."""
    features: dict[str, Features] = {}
    left: list[dict[str, str]] = []
    unreadable: list[str] = []
    total, done = sum(len(each.references) for each in characters), itertools.count(1)
    for character in characters:
        if character.features is not None:
            features[character.tag] = character.features
            continue
        rows = looker.look_at_each(character.references, unreadable, lambda: on_progress(next(done), total))
        if rows and character.posts - (len(character.references) - len(rows)) >= least:
            features[character.tag] = np.stack(rows)
        else:
            left.append({"tag": character.tag, "why": f"{len(rows)} references can be read, {least} are needed"})
    return features, left, unreadable


def score_models(
    looker: Looker,
    pictures: Mapping[str, Mapping[str, Sequence[Path]]],
    references: Mapping[str, Features],
    on_progress: Progress,
) -> tuple[list[dict[str, Score]], list[str]]:
    """The scores of each model's pictures, by character, and pictures that cannot be read.

    `pictures`: by model, then by character.
    """
    total = sum(len(paths) for of_model in pictures.values() for paths in of_model.values())
    scores: list[dict[str, Score]] = []
    unreadable: list[str] = []
    done = itertools.count(1)
    for of_model in pictures.values():
        found: dict[str, Score] = {}
        for tag in sorted(set(of_model) & set(references)):
            rows = looker.look_at_each(of_model[tag], unreadable, lambda: on_progress(next(done), total))
            if rows:
                found[tag] = score_pictures(looker.judge, references[tag], np.stack(rows))
        scores.append(found)
    return scores, unreadable


def group_cells(cells: Sequence[PlacedCell], out: Path) -> dict[str, dict[str, list[Path]]]:
    """The files of the pictures, by model and character: the labels of the sheet."""
    found: dict[str, dict[str, list[Path]]] = {}
    for each in cells:
        of_model = found.setdefault(each.labels["model"], {})
        of_model.setdefault(each.labels["prompt"], []).append(out / each.cell.name)
    return found


def look_up_exposures(exposures: Sequence[Exposure | None], tags: Sequence[str]) -> list[dict[str, int | None]]:
    """How often each character was trained, by model; None where that is not known."""
    found: list[dict[str, int | None]] = []
    for exposure in exposures:
        seen: dict[str, int | None] = {}
        for tag in tags:
            try:
                seen[tag] = None if exposure is None else int(exposure.find(tag)["trained"])
            except NoSuchTag:
                seen[tag] = 0
        found.append(seen)
    return found


def compose_result(
    looker: Looker,
    choice: Choice,
    references: Mapping[str, Features],
    prompts: Mapping[str, str],
    preset: str,
    models: Sequence[tuple[str, str, int | None]],
    scores: Sequence[Mapping[str, Score]],
    seen: Sequence[Mapping[str, int | None]],
    settings: Mapping[str, Any],
    left: Sequence[Mapping[str, str]],
    unreadable: Sequence[str],
) -> dict[str, Any]:
    """The one document of an evaluation; `models`: title, identity and optimizer step of each."""
    text = json.dumps(dict(sorted(prompts.items())), ensure_ascii=True, separators=(",", ":"))
    documents = []
    for (title, identity, step), of_model, exposure in zip(models, scores, seen, strict=True):
        known = {tag: count for tag, count in exposure.items() if count is not None and tag in of_model}
        tags = sorted(known)
        against = None
        if tags:
            counts = np.array([known[tag] for tag in tags], dtype=np.int64)
            against = group_by_exposure(counts, np.array([of_model[tag].score for tag in tags]))
        documents.append(
            {
                "title": title,
                "identity": identity,
                "optimizer_step": step,
                **summarise(of_model),
                "against_exposure": against,
                "scores": {
                    tag: {**score.document(), "seen": exposure.get(tag)} for tag, score in sorted(of_model.items())
                },
            }
        )
    return {
        "format": FORMAT,
        "measure": "ccip",
        "versions": list_versions("numpy", "pillow"),
        "judge": looker.judge.describe(),
        "rule": "score: share of references whose difference is below the threshold (sdeval); "
        "score_or_equal: below or equal (imgutils)",
        "prompts": {
            "preset": preset,
            "template": PRESETS[preset],
            "note": INFERRED.get(preset, ""),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        },
        "settings": dict(settings),
        "models": documents,
        "pairs": compare_models([title for title, _, _ in models], [each["scores"] for each in documents]),
        "characters": [
            {
                "tag": each.tag,
                "series": each.series,
                "posts": each.posts,
                "references": len(references[each.tag]),
                "references_sha256": hashlib.sha256(references[each.tag].tobytes()).hexdigest(),
                "prompt": prompts[each.tag],
            }
            for each in choice.scored
            if each.tag in references
        ],
        "not_scored": [*choice.not_scored, *left],
        "unreadable": sorted(unreadable),
        "limits": "one character in each picture; CCIP was trained on 3,982 characters, which overlap the usual lists",
    }


def read_other(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """A whole result by the judge and the prompts of this call, or of another result. Raises OtherResult."""

    def check(other: dict[str, Any]) -> None:
        advice = "Only results of the same judge and prompts compare."
        refuse_differing(path, "made with", advice, about, other, COMPARED)
        list_references(other)
        for each in other["models"]:
            compare_models([each["title"]] * 2, [each["scores"]] * 2)

    return read_result(path, "ccip", ("ccip",), "ccip.json", check)


def list_references(result: Mapping[str, Any]) -> dict[str, str]:
    """By character of a result, a digest of what its pictures were compared with."""
    return {each["tag"]: each["references_sha256"] for each in result["characters"]}


def lay_over(result: dict[str, Any], path: Path) -> None:
    """Add the models of another result, with the pairs that they make. Raises OtherResult where they differ."""
    other = read_other(path, result)
    same = {tag for tag, _ in list_references(result).items() & list_references(other).items()}
    for model in other["models"]:
        model["scores"] = {tag: score for tag, score in model["scores"].items() if tag in same}
    add_models(result, other["models"], path)
    listed = result["models"]
    result["pairs"] = compare_models([each["title"] for each in listed], [each["scores"] for each in listed])
