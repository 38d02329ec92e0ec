"""What a person wants to know of a dataset at a glance, kept beside its captions so that nobody reads them again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.dataset.captions.tokens import Lengths, choose_counter, first_lines, split_captions
from kohaku_wrap.dataset.captions.words import SEPARATOR
from kohaku_wrap.files import Progress, unheard
from kohaku_wrap.formats.caption_rows import find_captions, read_batches
from kohaku_wrap.metadata.parallel import map_in_order, usable_threads

CAPTIONS_LOOKED_AT = 100_000
"""Captions whose words are counted, spread evenly over the file; of a smaller one all are."""

LENGTHS_LOOKED_AT = 10_000
TAGS_SHOWN = 30
SCORE_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Seen:
    """What one stretch of a folder's captions adds to its summary."""

    captions: int
    """Captions looked at."""

    words: pa.DictionaryArray
    """Their words, each once a caption."""

    tokens: Int64Array
    """Tokens of each of those that were measured."""


class CaptionSummary:
    """Counts of words and lengths over the `rows` captions of a folder, which come in stretches, in any threads."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._step = max(1, rows // CAPTIONS_LOOKED_AT)
        self._counted_by, self._count_tokens = choose_counter(None)

    def look_at(self, first: int, captions: pa.Array) -> Seen:
        """The captions of the rows from `first` on, those of them that are looked at."""
        looked_at_before = -(-first // self._step)
        texts = first_lines(captions.take(np.arange(-first % self._step, len(captions), self._step)))
        measured = texts[: max(0, LENGTHS_LOOKED_AT - looked_at_before)]
        tokens = self._count_tokens(pc.replace_substring(measured, SEPARATOR, ""))
        return Seen(len(texts), words_of_captions(texts), tokens)

    def describe(self, seen: Sequence[Seen], groups: Mapping[str, Iterable[str]]) -> dict[str, Any]:
        """The summary of all stretches; `groups`: the words of quality and the like by name."""
        lengths = Lengths()
        for each in seen:
            lengths.add(each.tokens)
        uses = count_words([each.words for each in seen])
        frequent = nsmallest(TAGS_SHOWN, uses.items(), key=by_frequency)
        others = uses.items() - set(frequent)
        named = {name: {word: uses[word] for word in words if word in uses} for name, words in groups.items()}
        return {
            "images": self._rows,
            "captions_looked_at": sum(each.captions for each in seen),
            "distinct_tags": len(uses),
            "frequent_tags": frequent,
            "rare_tags": nsmallest(TAGS_SHOWN, others, key=lambda each: (each[1], each[0])),
            "words": {name: sorted(words.items(), key=by_frequency) for name, words in named.items()},
            "tokens": {
                "counted_by": self._counted_by.partition(" ")[0],
                "captions": sum(len(each.tokens) for each in seen),
                "quantiles": lengths.quantiles(),
                "longer_than": lengths.beyond_limits(),
            },
        }


def summarise_captions(
    images: Path, groups: Mapping[str, Iterable[str]], on_progress: Progress = unheard
) -> dict[str, Any]:
    """`CaptionSummary` of captions that lie in a folder.

    `on_progress` is told captions. Raises what opening the captions raises.
    """
    path = find_captions(images)
    rows = sum(batch.num_rows for batch in read_batches(path, "id"))
    summary = CaptionSummary(rows)

    def read_stretches() -> Iterator[tuple[int, pa.Array]]:
        first = 0
        for batch in read_batches(path, "caption"):
            yield first, batch.column("caption")
            first += batch.num_rows
            on_progress(first, rows)

    seen = map_in_order(lambda stretch: summary.look_at(*stretch), read_stretches(), usable_threads())
    return summary.describe(list(seen), groups)


def by_frequency(word: tuple[str, int]) -> tuple[int, str]:
    """The order of words and their numbers: frequent ones first, ties by word."""
    return -word[1], word[0]


def words_of_captions(captions: pa.Array) -> pa.DictionaryArray:
    """The words of captions, each once a caption."""
    owners, words = split_captions(captions)
    encoded = words.dictionary_encode()
    distinct = max(1, len(encoded.dictionary))
    pairs = np.sort(owners * distinct + encoded.indices.to_numpy())
    # Sorted and compared: several times faster than numpy.unique, which hashes.
    first = np.append(True, pairs[1:] != pairs[:-1])[: len(pairs)]
    return pa.DictionaryArray.from_arrays((pairs[first] % distinct).astype(np.int32), encoded.dictionary)


def count_words(words: Sequence[pa.DictionaryArray]) -> dict[str, int]:
    """How often each word stands in all of these arrays; what is empty is none."""
    if not words:
        return {}
    unified = pa.chunked_array(words).unify_dictionaries()
    names = unified.chunk(0).dictionary.to_pylist()
    counts = np.bincount(np.concatenate([each.indices.to_numpy() for each in unified.chunks]), minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True) if name and count}


def count_values(values: npt.NDArray[np.integer[Any]], names: Mapping[int, str]) -> dict[str, int]:
    """How often each value stands there, by name, in the order of the values."""
    found, counts = np.unique(values, return_counts=True)
    return {names.get(int(value), str(value)): int(count) for value, count in zip(found.tolist(), counts, strict=True)}


def describe_scores(scores: npt.NDArray[np.integer[Any]]) -> dict[str, int]:
    """Quantiles of the posts' scores; empty where none is known."""
    if not len(scores):
        return {}
    return {f"{each:.0%}": int(np.quantile(scores, each, method="nearest")) for each in SCORE_QUANTILES}
