"""A metadata set that was recognised: its edition, and its posts and tags as Arrow batches of any size."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.metadata.columns import SITE_ZONE
from kohaku_wrap.metadata.dialects import Dialect

API_LAYOUT = "api"
"""`layout` of tables whose tags stand in the posts' own columns."""


ROWS_A_BATCH = 1 << 16


class DatabaseDamaged(KwrapError):
    """The file began as a database or table but is cut off, overwritten or holds what cannot be."""


@dataclass(frozen=True)
class Edition:
    """What was recognised."""

    name: str
    """As `inspect` shows it."""

    layout: str
    """v0 … v3 of danbooru2023, or API_LAYOUT."""

    posts: str
    """A query of the COLUMNS of every post and its `place`; with API_LAYOUT of `tags` and `tags_N`, see `posts_sql`."""

    unique_ids: bool = False
    """Whether the table itself lets no id come twice; elsewhere the first row of an id counts."""

    typed: tuple[int, ...] = ()
    """With API_LAYOUT: the categories N of tags that have a column `tags_N`."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """With API_LAYOUT: by what is read, the column of the table."""

    lacks: Mapping[str, str] = field(default_factory=dict)
    """What the edition does not say, with a sentence each: order, zone, deleted posts, or a column."""

    zone: str = SITE_ZONE
    """In which dates without an offset are read."""

    tag_table: Path | None = None
    """A table that gives the categories of tags that have none here, and how it is read."""

    categories: Mapping[str, int] = field(default_factory=dict)
    """By the tag table's number or word, an index of TAG_TYPES."""

    has_parents: bool = False
    """Whether posts name their parents."""

    @property
    def has_tag_strings(self) -> bool:
        """Whether tags are read from the posts' own columns."""
        return self.layout == API_LAYOUT


@dataclass(frozen=True)
class Source(ABC):
    """Tables of posts that may be read, by any number of threads at once."""

    path: Path
    """The file or folder, with symbolic links followed."""

    edition: Edition
    """What it is."""

    files: tuple[Path, ...]
    """What it is made of, in order."""

    @abstractmethod
    def dialect(self, table: str) -> Dialect:
        """How the values of a table's columns are asked for."""

    @abstractmethod
    def scan(self, query: str, rows: int = ROWS_A_BATCH) -> Iterator[pa.RecordBatch]:
        """The rows of a large query as Arrow batches of at most `rows`, read without a Python object a value."""

    @abstractmethod
    def value(self, query: str) -> Any:
        """The first column of the first row of a small query, None without a row."""

    @abstractmethod
    def count_posts(self) -> int:
        """About how many rows a scan of the posts reads, without a scan."""

    @abstractmethod
    def digest(self) -> str:
        """A cheap fingerprint of the content, the same of copies."""

    def scan_numbers(self, query: str, rows: int = ROWS_A_BATCH) -> Iterator[tuple[Int64Array, ...]]:
        """The columns of each batch of a large query for whole numbers. Raises DatabaseDamaged for anything else."""
        for batch in self.scan(query, rows):
            if not batch.num_rows:
                continue
            for column, name in zip(batch.columns, batch.schema.names, strict=True):
                if not pa.types.is_integer(column.type) or column.null_count:
                    raise self.no_whole_number(name)
            yield tuple(column.to_numpy().astype(np.int64, copy=False) for column in batch.columns)

    def no_whole_number(self, column: str) -> DatabaseDamaged:
        """The error for a column of numbers that holds something else."""
        return DatabaseDamaged(
            f"{self.path}: the column {column} holds what is no whole number", "Download or copy it again."
        )


ENDS_BYTES = 1 << 16
MOST_FILES_READ = 1000


def digest_of_files(files: Sequence[Path]) -> str:
    """A fingerprint of the sizes and both ends of files in order; of very many files the names and sizes alone."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        if len(files) > MOST_FILES_READ:
            digest.update(f"{path.name}\n".encode())
            continue
        with path.open("rb") as stream:
            digest.update(stream.read(ENDS_BYTES))
            stream.seek(max(0, size - ENDS_BYTES))
            digest.update(stream.read(ENDS_BYTES))
    return digest.hexdigest()
