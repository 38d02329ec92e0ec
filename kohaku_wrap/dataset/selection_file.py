"""The selection file: one row a post, with what extract and caption need of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kohaku_wrap.arrays import Int8Array, Int16Array, Int32Array, Int64Array
from kohaku_wrap.dataset.years import read_years
from kohaku_wrap.errors import KwrapError, refusing
from kohaku_wrap.files import atomic_write, describe_absence
from kohaku_wrap.formats.schema_notes import KEY, read_notes, write_notes
from kohaku_wrap.metadata.dialects import is_text
from kohaku_wrap.metadata.filters import RATINGS
from kohaku_wrap.metadata.posts import POST_SCHEMA, UNKNOWN_NUMBER

AGAIN = "Make it again with `kwrap select DATASET --db DB --out SEL.parquet`."


class BadSelection(KwrapError):
    """The file is not what `kwrap select` writes."""


@dataclass(frozen=True)
class SelectedPosts:
    """What captions need of each selected post, as columns of equal length by ascending id."""

    ids: Int64Array
    """Post ids."""

    ratings: Int8Array
    """0 … 3, -1 unknown."""

    favourites: Int32Array
    """`fav_count`; UNKNOWN_NUMBER where there is none."""

    years: Int16Array
    """Upload year as written; 0 where the date cannot be read."""

    extensions: pa.Array
    """File extensions, dictionary-encoded strings."""

    about: Mapping[str, Any]
    """How the selection came about: dataset, seed, db_digest, counts, caption."""

    def __len__(self) -> int:
        return len(self.ids)


def write_selection(path: Path, batches: Iterable[pa.RecordBatch], posts: int, about: Mapping[str, Any]) -> None:
    """Write the batches of POST_SCHEMA as the selection; `posts` rows are expected in all."""
    schema = POST_SCHEMA.with_metadata(write_notes(about))
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
        if KEY not in (file.schema_arrow.metadata or {}):
            raise BadSelection(f"{path}: a Parquet file, but not one of `kwrap select`", "Give the file that it wrote.")
        try:
            return file.metadata.num_rows, read_notes(file.schema_arrow)
        except (ValueError, RecursionError):
            raise BadSelection(
                f"{path}: what it says about itself (the metadata `kwrap`) is no JSON object", AGAIN
            ) from None


def open_selection(path: Path, needed: Sequence[str] = POST_SCHEMA.names) -> pq.ParquetFile:
    """The selection as a Parquet file with every column that is needed. Raises BadSelection."""
    if not path.is_file():
        raise BadSelection(
            f"{path}: {describe_absence(path)}",
            "Make a selection with `kwrap select DATASET --db DB --out SEL.parquet`.",
        )
    with refusing(BadSelection, f"{path}: not a selection:", AGAIN, pa.ArrowException):
        file = pq.ParquetFile(path)
    missing = [name for name in needed if name not in file.schema_arrow.names]
    if missing:
        file.close()
        raise BadSelection(f"{path}: no column {', '.join(missing)}", AGAIN)
    return file


def read_columns(path: Path, *names: str) -> pa.Table:
    """Columns of a selection, each in one piece. Raises BadSelection."""
    with refusing(BadSelection, f"{path}: damaged:", AGAIN, pa.ArrowException), open_selection(path) as file:
        return file.read(columns=list(names)).combine_chunks()


def take_numbers(path: Path, name: str, column: pa.Array | pa.ChunkedArray, least: int) -> npt.NDArray[Any]:
    """A column of whole numbers, in the type that POST_SCHEMA gives it. Raises BadSelection for anything else."""
    kind = POST_SCHEMA.field(name).type
    if not pa.types.is_integer(column.type):
        raise BadSelection(f"{path}: the column {name} holds {column.type}, not whole numbers", AGAIN)
    if column.null_count:
        raise BadSelection(f"{path}: the column {name} holds {column.null_count:,} NULL", AGAIN)
    with refusing(BadSelection, f"{path}: the column {name}:", AGAIN, pa.ArrowException):
        numbers: npt.NDArray[Any] = column.cast(kind).to_numpy()
    most = len(RATINGS) - 1 if name == "rating" else None
    if len(numbers) and (numbers.min() < least or (most is not None and numbers.max() > most)):
        wrong = numbers.min() if numbers.min() < least else numbers.max()
        limits = f"{least} … {most}" if most is not None else f"from {least} on"
        raise BadSelection(f"{path}: the column {name} holds {wrong}; there are {limits}", AGAIN)
    return numbers


def take_texts(path: Path, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A column of texts, '' for NULL. Raises BadSelection for anything else."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not is_text(kind):
        raise BadSelection(f"{path}: the column {name} holds {column.type}, not texts", AGAIN)
    return column.cast(pa.string()).fill_null("")


def read_selected_posts(path: Path, date_parser: str = "iso") -> SelectedPosts:
    """The columns that captions need, with dates already years. Raises BadSelection.

    `date_parser` as in `read_years`.
    """
    _, about = read_about(path)
    columns = ["id", "rating", "fav_count", "created_at", "file_ext"]
    ids, ratings, favourites, years, extensions = [], [], [], [], []
    with open_selection(path) as file, refusing(BadSelection, f"{path}: damaged:", AGAIN, pa.ArrowException):
        for batch in file.iter_batches(batch_size=1 << 17, columns=columns):
            ids.append(take_numbers(path, "id", batch.column("id"), least=0))
            ratings.append(take_numbers(path, "rating", batch.column("rating"), least=-1))
            favourites.append(take_numbers(path, "fav_count", batch.column("fav_count"), UNKNOWN_NUMBER))
            years.append(read_years(take_texts(path, "created_at", batch.column("created_at")), date_parser))
            extensions.append(take_texts(path, "file_ext", batch.column("file_ext")).dictionary_encode())
    all_ids = np.concatenate(ids) if ids else np.empty(0, np.int64)
    if not len(all_ids) or (all_ids[1:] <= all_ids[:-1]).any():
        raise BadSelection(f"{path}: {'not by ascending id' if len(all_ids) else 'no posts in it'}", AGAIN)
    return SelectedPosts(
        ids=all_ids,
        ratings=np.concatenate(ratings),
        favourites=np.concatenate(favourites),
        years=np.concatenate(years),
        extensions=pa.chunked_array(extensions).unify_dictionaries().combine_chunks(),
        about=about,
    )
