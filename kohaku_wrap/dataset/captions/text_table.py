"""Natural-language captions by id, out of Parquet files of any row order, in little memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.dataset.captions.tokens import TOKEN_LIMITS
from kohaku_wrap.dataset.counts import Counts
from kohaku_wrap.errors import UsageError, refusing
from kohaku_wrap.files import open_regular
from kohaku_wrap.formats.caption_writer import bytes_of
from kohaku_wrap.metadata.places import NOWHERE, find_places

ID_COLUMNS = ("id", "post_id", "image_id")
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "description")
"""Names of columns of captions, here and in tables that are imported."""

LINE_ENDS = r"[\x00-\x1f\x7f\x{85}\x{2028}\x{2029}]+"
"""And other signs that would end a line somewhere."""

SEPARATORS = r"\|{3,}"
ROWS_A_BATCH = 1 << 14
WIDEST_READ = 1 << 25
"""Bytes that are read at once where the wanted texts lie close to each other."""


class NoTexts(UsageError):
    """A file of texts cannot be read as one."""


@dataclass
class TextCounts(Counts):
    """What was counted of the texts of posts."""

    with_text: int = 0
    """Posts that have one."""

    line_ends: int = 0
    """Texts whose line ends became spaces."""

    separators: int = 0
    """Texts whose ||| became |."""

    tight_commas: int = 0
    """Texts with a comma that is not followed by one space, which plain sd-scripts puts there as between tags."""

    over: Int64Array = field(default_factory=lambda: np.zeros(3, dtype=np.int64))
    """Captions with tags and text that are longer than each of the trainers' limits."""

    def as_document(self, asked: bool) -> dict[str, int]:
        """The counts by name; none where no texts were asked for."""
        if not asked:
            return {}
        limits = {f"over_{limit}_tokens": int(n) for limit, n in zip(TOKEN_LIMITS, self.over.tolist(), strict=True)}
        return {**{name: count for name, count in vars(self).items() if name != "over"}, **limits}


@dataclass(frozen=True)
class TextTable:
    """The texts in a file without a name, found by id."""

    path: Path
    """What they were read from."""

    ids: Int64Array
    """(texts,) ascending, each once."""

    starts: Int64Array
    """(texts,) where each begins in the file."""

    lengths: Int64Array
    """(texts,) in bytes."""

    stream: IO[bytes]
    """The file."""

    repeated: int
    """Rows whose id an earlier row has; they are not used."""

    def texts_of(self, ids: Int64Array) -> tuple[pa.Array, TextCounts]:
        """(ids,) their texts on one line each, empty where there is none, and what was changed. For any thread."""
        places = find_places(self.ids, ids)
        there = np.flatnonzero(places != NOWHERE)
        starts, lengths = np.zeros((2, len(ids)), dtype=np.int64)
        starts[there], lengths[there] = self.starts[places[there]], self.lengths[places[there]]
        return clean_texts(self._read(starts, lengths))

    def _read(self, starts: Int64Array, lengths: Int64Array) -> pa.Array:
        used = np.flatnonzero(lengths)
        descriptor, bounds = self.stream.fileno(), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        first, last = (starts[used].min(), (starts + lengths)[used].max()) if len(used) else (0, 0)
        spans = list(zip(starts[used].tolist(), lengths[used].tolist(), strict=True))
        if last - first <= WIDEST_READ:
            near = memoryview(os.pread(descriptor, int(last - first), int(first)))
            data = b"".join(near[at - first : at - first + size] for at, size in spans)
        else:
            data = b"".join(os.pread(descriptor, size, at) for at, size in spans)
        array = pa.StringArray.from_buffers(len(lengths), pa.py_buffer(bounds), pa.py_buffer(data))
        try:
            array.validate(full=True)
        except pa.ArrowInvalid:
            raise NoTexts(f"{self.path}: a text is not UTF-8", "Write the file again, its texts as strings.") from None
        return array


def clean_texts(texts: pa.Array) -> tuple[pa.Array, TextCounts]:
    """Each on one line, without what separates the parts of a caption, and what was counted."""
    counts = TextCounts()
    texts = pc.utf8_trim_whitespace(texts)
    for name, pattern, instead in (("line_ends", LINE_ENDS, " "), ("separators", SEPARATORS, "|")):
        found = pc.sum(pc.match_substring_regex(texts, pattern)).as_py() or 0
        setattr(counts, name, found)
        texts = pc.replace_substring_regex(texts, pattern, instead) if found else texts
    texts = pc.utf8_trim_whitespace(texts)
    counts.with_text = pc.sum(pc.not_equal(texts, "")).as_py() or 0
    counts.tight_commas = pc.sum(pc.match_substring_regex(texts, r",(\S|\s\s|\s*$)|^,|\s,")).as_py() or 0
    return texts, counts


def read_text_table(path: Path, column: str, folder: Path) -> TextTable:
    """The texts of a Parquet file, or of all those in a folder; `folder`: for the file that keeps them meanwhile.

    Of rows with one id the first counts. Raises NoTexts.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise NoTexts(f"{path}: no Parquet file in this folder", "Give --text a Parquet file with id and text.")
    folder.mkdir(parents=True, exist_ok=True)
    stream = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as the table)
    ids, lengths = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for one in files:
        for some_ids, texts in read_batches(one, column):
            ids.append(some_ids)
            lengths.append(pc.binary_length(texts).to_numpy().astype(np.int64))
            stream.write(bytes_of(texts))
    stream.flush()
    every, sizes = np.concatenate(ids), np.concatenate(lengths)
    distinct, first = np.unique(every, return_index=True)
    starts = np.cumsum(sizes) - sizes
    return TextTable(path, distinct, starts[first], sizes[first], stream, len(every) - len(distinct))


def read_batches(path: Path, column: str) -> Iterator[tuple[Int64Array, pa.Array]]:
    """Ids and texts of the rows that have both. Raises NoTexts."""
    with refusing(
        NoTexts, f"{path}: cannot be read", "Give a Parquet file with whole-number ids and texts.", pa.ArrowException
    ):
        file = pq.ParquetFile(open_regular(path))
        names = file.schema_arrow.names
        id_name, text_name = find_column(path, names, ID_COLUMNS, ""), find_column(path, names, TEXT_COLUMNS, column)
        for batch in file.iter_batches(ROWS_A_BATCH, columns=[id_name, text_name]):
            both = batch.filter(pc.and_(pc.is_valid(batch[id_name]), pc.is_valid(batch[text_name])))
            yield both[id_name].cast(pa.int64()).to_numpy(), both[text_name].cast(pa.string())


def find_column(path: Path, names: list[str], known: tuple[str, ...], wanted: str) -> str:
    """The one column that is meant. Raises NoTexts."""
    there = [name for name in names if name == wanted] if wanted else [name for name in known if name in names]
    if len(there) == 1 or (there and known == ID_COLUMNS):
        return there[0]
    if there:
        raise NoTexts(
            f"{path}: texts stand in {' and in '.join(there)}, and one is meant",
            f"Say which: --text-column {there[0]}.",
        )
    lacking = f"column {wanted}" if wanted else f"column named {', '.join(known)}"
    raise NoTexts(
        f"{path}: no {lacking}; its columns: {', '.join(names)}",
        "Name the columns id and text, or give --text-column NAME.",
    )
