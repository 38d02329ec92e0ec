"""Posts that a training holds out: drawn by their ids alone, with the posts that are their like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.dataset.captions.groups import ROWS_A_BLOCK, draw_from_strata, find_strata
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.images.extracted import IMPORTED_FILE
from kohaku_wrap.dataset.own.images import AGAIN
from kohaku_wrap.dataset.recipe import load_dataset
from kohaku_wrap.errors import KwrapError, refusing
from kohaku_wrap.formats.caption_rows import find_captions, read_batches, read_captions_metadata
from kohaku_wrap.formats.held_out import KINDS, HeldOut
from kohaku_wrap.formats.relations import BadRelations, Relations, read_relations
from kohaku_wrap.metadata.places import NOWHERE, find_places

USUAL_DATASET = "epsilon"
"""Whose words of rating and year are looked for in captions of a dataset that cannot be read."""


def hold_out(images: Path, digest: str, wanted: int) -> HeldOut:
    """The posts of a folder's captions that are held out; `digest` as in `find_captions`. Raises NoImages."""
    about = read_captions_metadata(images, digest)
    ids = [np.empty(0, dtype=np.int64)]

    def read_blocks() -> Iterator[pa.Array]:
        for batch in read_batches(find_captions(images, digest), "id", "caption"):
            ids.append(batch.column("id").to_numpy())
            for start in range(0, len(batch), ROWS_A_BLOCK):
                yield batch.column("caption").slice(start, ROWS_A_BLOCK)

    _, strata = find_strata(read_blocks(), find_recipe(str(about.get("dataset", ""))))
    every = np.concatenate(ids)
    posts = every[draw_from_strata(every, strata, wanted)]
    return with_relatives(posts, find_relations(images, every))


def find_recipe(dataset: str) -> CaptionRecipe:
    """How the captions of a dataset are written, or those of USUAL_DATASET where it cannot be read."""
    with suppress(KwrapError, OSError):
        return load_dataset(dataset or USUAL_DATASET).caption
    return load_dataset(USUAL_DATASET).caption


def find_relations(images: Path, ids: Int64Array) -> Relations:
    """What is known of the posts of an image folder: of `kwrap caption`, or of `kwrap import`. Raises BadRelations."""
    if (path := images / IMPORTED_FILE).is_file():
        with refusing(BadRelations, f"{path}: damaged:", AGAIN, pa.ArrowException):
            table = pq.read_table(path, columns=["id", "sha256"])
        found = Relations(table["id"].to_numpy(), np.zeros(len(table), np.int64), table["sha256"].combine_chunks())
    else:
        found = read_relations(images) or Relations(ids[:0], ids[:0], pa.array([], pa.string()))
    order = np.argsort(found.ids, kind="stable")
    rows = np.append(order, NOWHERE)[find_places(found.ids[order], ids)]
    parents = np.append(found.parents, -1)[rows]
    return Relations(ids, parents, found.contents.take(pa.array(rows, mask=rows == NOWHERE)).fill_null(""))


def with_relatives(posts: Int64Array, relations: Relations) -> HeldOut:
    """The posts `posts` with their parents, children, siblings, and those that have an equal picture."""
    ids, parents = relations.ids, relations.parents
    held = np.isin(ids, posts)
    above = np.unique(parents[held & (parents > 0)])
    contents = pc.unique(relations.contents.filter(pa.array(held)))
    contents = contents.filter(pc.not_equal(contents, ""))
    found = (
        np.isin(ids, above),
        np.isin(parents, posts),
        (parents > 0) & np.isin(parents, above),
        pc.is_in(relations.contents, value_set=contents).to_numpy(zero_copy_only=False),
    )
    taken, by_kind = held.copy(), {}
    for kind, mask in zip(KINDS, found, strict=True):
        by_kind[kind] = int((mask & ~taken).sum())
        taken |= mask
    is_unknown = (parents < 0) | pc.equal(relations.contents, "").to_numpy(zero_copy_only=False)
    return HeldOut(posts, ids[taken & ~held], by_kind, int(is_unknown.sum()), len(ids))
