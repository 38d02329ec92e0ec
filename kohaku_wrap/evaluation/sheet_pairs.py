"""Judged folders compared: each two models over the pictures that both drew from the same prompt and seed."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from kohaku_wrap.evaluation.intervals import bootstrap_mean
from kohaku_wrap.evaluation.other_results import OtherResult, add_models, read_result


def compare_models(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each two of the models of a result: the paired difference with an interval, and what Fréchet distances differ by.

    A picture that is there twice counts once; one whose file does not say how it was drawn has no pair.
    """
    values: list[dict[str, float]] = [
        {each["drawn_as"]: each["value"] for each in model["judged"] if each["drawn_as"] and each["value"] is not None}
        for model in models
    ]
    found = []
    for (one, here), (two, there) in itertools.combinations(zip(models, values, strict=True), 2):
        both = sorted(here.keys() & there.keys())
        near, far = (model.get("frechet") or {} for model in (one, two))
        fits = near and far and all(near[name] == far[name] for name in ("reference_sha256", "pictures"))
        fits = fits and near["distance"] is not None
        found.append(
            {
                "from": one["title"],
                "to": two["title"],
                "pictures": len(both),
                "difference": bootstrap_mean([there[key] - here[key] for key in both]),
                "frechet_difference": far["distance"] - near["distance"] if fits else None,
            }
        )
    return found


def read_other(path: Path, kinds: Collection[str], judge: Mapping[str, Any]) -> dict[str, Any]:
    """A result of `kwrap evaluate judge` by this judge, as results describe it. Raises OtherResult."""

    def check(document: dict[str, Any]) -> None:
        if any("judged" not in model for model in document["models"]):
            raise OtherResult(
                f"{path}: of an earlier kwrap, without the value of each picture",
                f"Judge {path.parent} again: what the judge said is kept, so it takes seconds.",
            )
        judges = [[each[name] for name in ("kind", "sha256", "threshold")] for each in (judge, document["judge"])]
        if judges[0] != judges[1]:
            raise OtherResult(
                f"{path}: judged by {document['judge']['title']} ({document['judge']['kind']}), "
                "not by the same files with the same threshold",
                "Judge both folders with one judge.",
            )
        for model in document["models"]:
            compare_models([model, model])

    return read_result(path, "judge", kinds, "judged-KIND.json", check)


def lay_over(result: dict[str, Any], path: Path, kinds: Collection[str]) -> None:
    """Add the models of another result, and the pairs that they make. Raises OtherResult where nothing compares."""
    other = read_other(path, kinds, result["judge"])
    added = add_models(result, other["models"], path)
    result["pairs"] = compare_models(result["models"])
    new = {each["title"] for each in added}
    across = [pair for pair in result["pairs"] if pair["from"] not in new and pair["to"] in new]
    if not any(pair["pictures"] or pair["frechet_difference"] is not None for pair in across):
        if not any(each["value"] is not None for model in added for each in model["judged"]):
            raise OtherResult(
                f"{path}: {other['judge']['title']} gives no single number of a picture that could be compared",
                "Its Fréchet distances compare: judge both folders with the same --reference DIR.",
            )
        raise OtherResult(
            f"{path}: none of its pictures has prompt, seed, size and sampler of a picture judged now",
            "Draw both folders alike: `kwrap sample MODEL --sheet SHEET.toml --out DIR` with one sheet.",
        )
