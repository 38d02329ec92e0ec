"""What a person wants to know of a dataset at a glance, kept beside its captions so that nobody reads them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.dataset.captions.statistics import LONGEST, choose_counter, quantiles_of
from kohaku_wrap.dataset.captions.tokens import TOKEN_LIMITS
from kohaku_wrap.files import Progress
from kohaku_wrap.formats.caption_rows import find_captions, read_batches

CAPTIONS_LOOKED_AT = 100_000
"""Captions whose words are counted, spread evenly over the file; of a smaller one all are."""

LENGTHS_LOOKED_AT = 10_000
TAGS_SHOWN = 30
SCORE_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def summarise_captions(
    images: Path, groups: Mapping[str, Iterable[str]], on_progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Counts of words and lengths over the folder's captions; `groups`: the words of quality and the like by name.

    `on_progress` is told captions. Raises what opening the captions raises.
    """
    path = find_captions(images)
    rows = sum(batch.num_rows for batch in read_batches(path, "id"))
    step = max(1, rows // CAPTIONS_LOOKED_AT)
    uses: Counter[str] = Counter()
    texts: list[str] = []
    looked_at = first = 0
    for batch in read_batches(path, "caption"):
        places = np.arange(-first % step, batch.num_rows, step)
        first += batch.num_rows
        captions = batch.column("caption").take(places).to_pylist()
        looked_at += len(captions)
        on_progress(first, rows)
        texts += captions[: max(0, LENGTHS_LOOKED_AT - len(texts))]
        for caption in captions:
            words = (word.strip() for part in caption.split("|||") for word in part.split(","))
            uses.update({word for word in words if word})
    by, count = choose_counter(None)
    lengths = np.bincount(
        np.minimum(count([text.replace("|||", "") for text in texts]), LONGEST), minlength=LONGEST + 1
    )
    ranked = sorted(uses.items(), key=lambda each: (-each[1], each[0]))
    named = {name: set(words) for name, words in groups.items()}
    return {
        "images": rows,
        "captions_looked_at": looked_at,
        "distinct_tags": len(ranked),
        "frequent_tags": ranked[:TAGS_SHOWN],
        "rare_tags": sorted(ranked[TAGS_SHOWN:], key=lambda each: (each[1], each[0]))[:TAGS_SHOWN],
        "words": {name: [each for each in ranked if each[0] in words] for name, words in named.items()},
        "tokens": {
            "counted_by": by.partition(" ")[0],
            "captions": len(texts),
            "quantiles": quantiles_of(lengths),
            "longer_than": {str(limit): int(lengths[limit + 1 :].sum()) for limit in TOKEN_LIMITS},
        },
    }


def count_values(values: npt.NDArray[np.integer[Any]], names: Mapping[int, str]) -> dict[str, int]:
    """How often each value stands there, by name, in the order of the values."""
    found, counts = np.unique(values, return_counts=True)
    return {names.get(int(value), str(value)): int(count) for value, count in zip(found.tolist(), counts, strict=True)}


def describe_scores(scores: npt.NDArray[np.integer[Any]]) -> dict[str, int]:
    """Quantiles of the posts' scores; empty where none is known."""
    if not len(scores):
        return {}
    return {f"{each:.0%}": int(np.quantile(scores, each, method="nearest")) for each in SCORE_QUANTILES}
