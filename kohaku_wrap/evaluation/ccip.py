"""CCIP scores of characters: how often pictures are taken for the character of the references.

Source: sdeval 0.0.4 (a difference strictly below the threshold) and dghs-imgutils (below or equal); both are given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.evaluation.intervals import bootstrap_mean
from kohaku_wrap.evaluation.judges import Features, Judge

HIGH = 0.9
"""Zeta's card counts characters above it."""

EXPOSURES = (0, 1, 10, 100, 1_000, 10_000)
"""Where the groups of the table of scores against exposure begin."""


@dataclass(frozen=True)
class Score:
    """How well a model draws one character."""

    score: float
    """The share of references whose difference from a picture is below the threshold, mean over the pictures."""

    score_or_equal: float
    """The same with differences of exactly the threshold."""

    upper_bound: float | None
    """The same share among the references themselves, each against the others; None for a single one."""

    upper_bound_or_equal: float | None
    """The same with differences of exactly the threshold."""

    @property
    def of_bound(self) -> float | None:
        """The score divided by the upper bound; None where that is unknown or 0."""
        return self.score / self.upper_bound if self.upper_bound else None

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "score_of_bound": self.of_bound}


def score_differences(differences: Features, references: int, threshold: float) -> Score:
    """The score from a matrix of differences whose first rows and columns are the references, then the pictures.

    Compared in float32, as the tools of the source do it.
    """
    limit = np.float32(threshold)
    bounds: list[float | None] = []
    shares = []
    for near in (differences < limit, differences <= limit):
        shares.append(float(near[references:, :references].mean(axis=1, dtype=np.float64).mean()))
        among = near[:references, :references]
        pairs = references * (references - 1)
        bounds.append(float(among.sum(dtype=np.int64) - np.trace(among.astype(np.int64))) / pairs if pairs else None)
    return Score(shares[0], shares[1], bounds[0], bounds[1])


def score_pictures(judge: Judge, references: Features, pictures: Features) -> Score:
    """The score of some pictures' features, (pictures, 768), against a character's, (references, 768)."""
    differences = judge.compare(np.concatenate([references, pictures]))
    assert judge.kind.threshold is not None
    return score_differences(differences, len(references), judge.kind.threshold)


def summarise(scores: Mapping[str, Score]) -> dict[str, Any]:
    """What one model's scores come to, over its characters."""
    raw = [score.score for score in scores.values()]
    of_bound = [score.of_bound for score in scores.values() if score.of_bound is not None]
    return {
        "characters": len(raw),
        "score": bootstrap_mean(raw),
        "score_of_bound": bootstrap_mean(of_bound),
        f"above_{HIGH}": sum(score > HIGH for score in raw),
        "curve": sorted(raw, reverse=True),
    }


def compare_models(titles: Sequence[str], scores: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Each two models over the characters that both have: wins, losses, and the paired difference with an interval."""
    found = []
    for (title, one), (other_title, two) in itertools.combinations(zip(titles, scores, strict=True), 2):
        tags = sorted(set(one) & set(two))
        apart = np.array([two[tag]["score"] - one[tag]["score"] for tag in tags])
        found.append(
            {
                "from": title,
                "to": other_title,
                "characters": len(tags),
                "wins": int((apart > 0).sum()),
                "losses": int((apart < 0).sum()),
                "ties": int((apart == 0).sum()),
                "difference": bootstrap_mean(apart),
            }
        )
    return found


def group_by_exposure(seen: npt.NDArray[np.int64], scores: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Scores against how often the character was trained: the mean by group, and the correlation of their ranks."""
    groups = []
    for begin, end in zip(EXPOSURES, (*EXPOSURES[1:], None), strict=True):
        inside = (seen >= begin) & (seen < end) if end is not None else seen >= begin
        groups.append({"from": begin, "below": end, "characters": int(inside.sum()),
                       "score": bootstrap_mean(scores[inside])})  # fmt: skip
    return {"groups": groups, "rank_correlation": correlate_ranks(seen, scores)}


def correlate_ranks(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float | None:
    """Spearman's correlation; None where one of them never changes."""
    import pandas as pd

    found = float(pd.DataFrame({"one": one, "other": other}).corr("spearman").to_numpy()[0, 1])
    return None if math.isnan(found) else found
