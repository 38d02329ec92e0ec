"""What of the image folder is verified: extracted.parquet, and the journals of a run that has not ended."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.errors import KwrapError, UsageError, refusing
from kohaku_wrap.files import atomic_write, has_size
from kohaku_wrap.formats.schema_notes import write_notes
from kohaku_wrap.locks import take_lock

EXTRACTED_FILE = "extracted.parquet"
IMPORTED_FILE = "imported.parquet"
"""In its place where `kwrap import` made the folder."""

REPORT_FILE = "extract-report.json"
JOURNAL_FOLDER = ".extracting"
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("file", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("size_bytes", pa.int64()),
        ("max_pixels", pa.int64()),
        ("rewritten", pa.int8()),
    ]
)
"""`file` is relative to the image folder; width and height are real; `max_pixels` is 0 for the file as it came,
otherwise the limit that a smaller copy was made for; `rewritten` is 1 for a picture made anew by the rule of
`appearance`, 0 for one that did not need it, NULL where a kwrap of before that rule wrote it."""


class ExtractedUnreadable(KwrapError):
    """The record of the verified images is damaged."""


class FolderBusy(KwrapError):
    """Another extract works in the same folder."""


class OtherKind(UsageError):
    """The folder holds posts where own images belong, or the reverse: captions of one would replace the other's."""


def refuse_other_kind(images: Path, file: str) -> None:
    """Raise OtherKind for a folder with `file`, which is EXTRACTED_FILE or IMPORTED_FILE."""
    if (images / file).exists():
        what = "posts of a selection" if file == EXTRACTED_FILE else "images of your own, from `kwrap import`"
        raise OtherKind(f"{images}: holds {what}", "Give --out a folder of its own.")


@dataclass(frozen=True)
class JournalFolder:
    """The journals below an image folder, locked against a second extract."""

    path: Path
    """The folder that holds them."""

    lock: IO[bytes]
    """Held while it is open."""

    @classmethod
    def open(cls, images: Path) -> JournalFolder:
        """Make or find the journals of `images`. Raises FolderBusy."""
        path = images / JOURNAL_FOLDER
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("ab")
        if not take_lock(lock.fileno(), path / "lock"):
            lock.close()
            raise FolderBusy(f"another extract works in {images}", "Wait for it to end, or stop it.")
        return cls(path, lock)

    def close(self, finished: bool) -> None:
        """Let go of the folder; when all is in extracted.parquet (`finished`), the journals go too."""
        if finished:
            shutil.rmtree(self.path, ignore_errors=True)
        self.lock.close()

    def next_stem(self) -> Path:
        """The beginning of the names of one run's journals; later runs sort after earlier ones."""
        runs = [int(path.name.split("-")[0]) for path in self.path.glob("*.csv")]
        return self.path / f"{max(runs, default=0) + 1:06}"

    def read(self) -> pa.Table:
        """All lines of all journals, in the order of writing within each; a torn last line is left out."""
        tables = [SCHEMA.empty_table()]
        for path in sorted(self.path.glob("*.csv")):
            text = path.read_bytes()
            text = text[: text.rfind(b"\n") + 1]
            if text:
                names = SCHEMA.names[: text[: text.find(b"\n")].count(b",") + 1]
                table = pacsv.read_csv(
                    pa.py_buffer(text),
                    pacsv.ReadOptions(column_names=names),
                    convert_options=pacsv.ConvertOptions(column_types=SCHEMA),
                )
                tables.append(fit_schema(table))
        return pa.concat_tables(tables)


def read_extracted(images: Path, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
    """The rows of extracted.parquet by ascending id, none when there is no such file. Raises ExtractedUnreadable."""
    path = images / EXTRACTED_FILE
    if not path.is_file():
        return SCHEMA.empty_table()
    again = "Remove it and run `kwrap extract` again; it checks all images from the tars."
    damaged = refusing(ExtractedUnreadable, f"{path}:", again, pa.ArrowException)
    with damaged, pq.ParquetFile(path) as file:
        return fit_schema(file.read(list(columns)), columns)


def fit_schema(table: pa.Table, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
    """The columns as in SCHEMA; an earlier kwrap does not say what was rewritten. Raises what a cast raises."""
    if "rewritten" in columns and "rewritten" not in table.column_names:
        table = table.append_column("rewritten", pa.nulls(table.num_rows, pa.int8()))
    return table.select(columns).cast(pa.schema([SCHEMA.field(name) for name in columns]))


def merge_rows(earlier: pa.Table, later: pa.Table) -> pa.Table:
    """The rows of both by ascending id; of rows of one id the last. `earlier` is by ascending id already."""
    if not later.num_rows:
        return earlier
    table = pa.concat_tables([earlier, later])
    ids = table["id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    last = np.append(ids[order][1:] != ids[order][:-1], True)
    return table.take(pa.array(order[last]))


def take_ids(table: pa.Table, ids: Int64Array, invert: bool = False) -> pa.Table:
    """The rows of these ids, or of all others."""
    return table.filter(pa.array(np.isin(table["id"].to_numpy(), ids, invert=invert)))


def drop_absent_files(table: pa.Table, images: Path) -> pa.Table:
    """The rows whose file is there in its recorded size."""
    there: list[bool] = []
    for batch in table.select(["file", "size_bytes"]).to_batches():
        rows = zip(batch["file"].to_pylist(), batch["size_bytes"].to_pylist(), strict=True)
        there += (has_size(images / file, size_bytes) for file, size_bytes in rows)
    return table.filter(pa.array(there, pa.bool_()))


def write_extracted(images: Path, table: pa.Table, about: Mapping[str, Any]) -> None:
    """Write the verified images' rows, by ascending id, as extracted.parquet."""
    schema = SCHEMA.with_metadata(write_notes(about))
    with atomic_write(images / EXTRACTED_FILE, "wb") as stream:
        pq.write_table(table.cast(schema), stream, compression="zstd")
