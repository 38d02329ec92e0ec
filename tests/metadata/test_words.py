"""Tags out of the posts' own columns: counted by category as a plain loop counts them, and kept by post."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kohaku_wrap.metadata import spill
from kohaku_wrap.metadata.columns import TAG_TYPES
from kohaku_wrap.metadata.opening import open_metadata
from kohaku_wrap.metadata.relations import map_tag_chunks
from kohaku_wrap.metadata.tags import NO_TAG, read_tags

POSTS = 300


def make_rows(seed: int, categories: tuple[str, ...], traps: bool) -> list[dict[str, object]]:
    """Posts in no order; with traps, some twice, and their columns do not agree."""
    draw = random.Random(seed)
    rows: list[dict[str, object]] = []
    for post in draw.sample(range(1, 5 * POSTS), POSTS):
        # Some words stand in several categories, one of them most often.
        words = {word: (word + draw.choice([0, 0, 0, 1])) % 5 for word in draw.sample(range(60), draw.randrange(9))}
        typed = {
            kind: " ".join(f"w{word}" for word, own in words.items() if own == number)
            for number, kind in enumerate(TAG_TYPES)
        }
        row: dict[str, object] = {"id": post, "tag_string": " ".join(f"w{word}" for word in words)}
        row |= {f"tag_string_{kind}": typed[kind] for kind in categories}
        rows.append(row)
        if traps and draw.random() < 0.1:
            rows.append({**row, "tag_string": "later"})
        if traps and draw.random() < 0.1:
            row["tag_string"] = f"  of_no_category   {row['tag_string']} "
        if traps and draw.random() < 0.1:
            row[f"tag_string_{categories[-1]}"] = f"alone {row[f'tag_string_{categories[-1]}']}"
    return rows


@pytest.mark.parametrize("traps", [False, True])
@pytest.mark.parametrize("categories", [TAG_TYPES, TAG_TYPES[1:3]])
def test_words_are_counted_and_kept_as_a_plain_loop_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, categories: tuple[str, ...], traps: bool
) -> None:
    monkeypatch.setattr(spill, "ROWS_A_PARTITION", 400)
    rows = make_rows(len(categories), categories, traps)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "posts.parquet")
    source = open_metadata(tmp_path / "posts.parquet")

    by_kind = {
        kind: Counter(word for row in rows for word in str(row[f"tag_string_{kind}"]).split()) for kind in categories
    }
    every = Counter(word for row in rows for word in str(row["tag_string"]).split())
    known = sorted({word for counts in by_kind.values() for word in counts} | set(every if len(categories) < 5 else ()))
    ids = np.array(sorted({int(str(row["id"])) for row in rows})[::2])
    tags = read_tags(source, ids, tmp_path / "spilled")
    assert list(tags.names) == known and ("alone" in known) == traps
    for word, kind, uses in zip(tags.names, tags.types.tolist(), tags.popularity.tolist(), strict=True):
        counts = {TAG_TYPES.index(name): some[word] for name, some in by_kind.items() if some[word]}
        assert kind == min(counts, key=lambda number: (-counts[number], number), default=-1), word
        assert uses == (every[word] if len(categories) < 5 and every[word] else sum(counts.values())), word
    assert (read_tags(source).names, read_tags(source).pieces) == (tags.names, None)

    first: dict[int, str] = {}
    for row in rows:
        first.setdefault(int(str(row["id"])), str(row["tag_string"]))
    found: dict[int, list[str | None]] = {int(post): [] for post in ids}
    for chunk in map_tag_chunks(source, tags, ids, lambda one: one, 2, None):
        for place, tag in zip(chunk.posts.tolist(), chunk.tags.tolist(), strict=True):
            found[int(ids[chunk.first + place])].append(tags.names[tag] if tag != NO_TAG else None)
    assert found == {post: [word if word in known else None for word in first[post].split()] for post in found}
    assert not list((tmp_path / "spilled").iterdir())
