"""The selection file: one row a post, with what extract and caption need of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kohaku_wrap.dataset.years import read_years
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import atomic_write
from kohaku_wrap.metadata.posts import POST_SCHEMA

METADATA_KEY = b"kwrap"


class BadSelection(KwrapError):
    """The file is not what `kwrap select` writes."""


@dataclass(frozen=True)
class SelectedPosts:
    """What captions need of each selected post, as columns of equal length by ascending id."""

    ids: npt.NDArray[np.int64]
    """Post ids."""

    ratings: npt.NDArray[np.int8]
    """0 … 3, -1 unknown."""

    favourites: npt.NDArray[np.int32]
    """`fav_count`; UNKNOWN_FAVOURITES where there is none."""

    years: npt.NDArray[np.int16]
    """Upload year as written; 0 where the date cannot be read."""

    extensions: pa.Array
    """File extensions, dictionary-encoded strings."""

    about: Mapping[str, Any]
    """How the selection came about: dataset, seed, db_digest, counts, caption."""

    def __len__(self) -> int:
        return len(self.ids)


def write_selection(path: Path, batches: Iterable[pa.RecordBatch], posts: int, about: Mapping[str, Any]) -> None:
    """Write the batches of POST_SCHEMA as the selection; `posts` rows are expected in all."""
    schema = POST_SCHEMA.with_metadata({METADATA_KEY: json.dumps(about).encode()})
    written = 0
    with (
        atomic_write(path, "wb") as stream,
        pq.ParquetWriter(
            stream, schema, compression="zstd", use_dictionary=["rating", "file_ext", "score", "fav_count"]
        ) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)
            written += batch.num_rows
        if written != posts:
            raise BadSelection(
                f"{path}: {posts:,} posts were selected but {written:,} could be read",
                "The database changed in between; run the same command again.",
            )


def read_about(path: Path) -> tuple[int, dict[str, Any]]:
    """The number of posts of a selection and how it came about. Raises BadSelection."""
    with open_selection(path) as file:
        metadata = file.schema_arrow.metadata or {}
        if METADATA_KEY not in metadata:
            raise BadSelection(f"{path}: a Parquet file, but not one of `kwrap select`", "Give the file that it wrote.")
        return file.metadata.num_rows, json.loads(metadata[METADATA_KEY])


def open_selection(path: Path) -> pq.ParquetFile:
    """The selection as a Parquet file with every column. Raises BadSelection."""
    if not path.is_file():
        raise BadSelection(
            f"{path}: no such file", "Make a selection with `kwrap select DATASET --db DB --out SEL.parquet`."
        )
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadSelection(f"{path}: not a selection: {error}", "Make it again with `kwrap select`.") from error
    missing = [name for name in POST_SCHEMA.names if name not in file.schema_arrow.names]
    if missing:
        file.close()
        raise BadSelection(f"{path}: no column {', '.join(missing)}", "Make it again with `kwrap select`.")
    return file


def read_selected_posts(path: Path, date_parser: str = "iso") -> SelectedPosts:
    """The columns that captions need, with dates already years. Raises BadSelection.

    `date_parser` as in `read_years`.
    """
    _, about = read_about(path)
    columns = ["id", "rating", "fav_count", "created_at", "file_ext"]
    ids, ratings, favourites, years, extensions = [], [], [], [], []
    with open_selection(path) as file:
        for batch in file.iter_batches(batch_size=1 << 17, columns=columns):
            ids.append(batch.column("id").to_numpy())
            ratings.append(batch.column("rating").to_numpy())
            favourites.append(batch.column("fav_count").to_numpy())
            years.append(read_years(batch.column("created_at"), date_parser))
            extensions.append(batch.column("file_ext").dictionary_encode())
    all_ids = np.concatenate(ids) if ids else np.empty(0, np.int64)
    if not len(all_ids) or (all_ids[1:] <= all_ids[:-1]).any():
        raise BadSelection(
            f"{path}: {'not by ascending id' if len(all_ids) else 'no posts in it'}",
            "Make it again with `kwrap select`.",
        )
    return SelectedPosts(
        ids=all_ids,
        ratings=np.concatenate(ratings),
        favourites=np.concatenate(favourites),
        years=np.concatenate(years),
        extensions=pa.chunked_array(extensions).unify_dictionaries().combine_chunks(),
        about=about,
    )
