"""The captions file: its digest in both places of the schema, whatever the rows hold, and what is none of kwrap's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kohaku_wrap.formats.caption_rows import (
    Columns,
    ColumnsWriter,
    NoImages,
    Subset,
    check_columns,
    open_captions,
    read_about,
    read_captions_metadata,
    read_folder_sizes,
)

MANY = [Subset(f"folder {number:05d}") for number in range(20_000)]


@pytest.mark.parametrize(
    ("caption", "subsets"),
    [("1girl", ()), ("0" * 64, ()), (f"{'0' * 64} {'x' * (1 << 20)}", ()), ("1girl", MANY)],
    ids=["usual", "zeros", "long", "many subsets"],
)
def test_the_digest_stands_in_head_and_footer(tmp_path: Path, caption: str, subsets: Sequence[Subset]) -> None:
    ones = np.ones(1, dtype=np.int32)
    path = tmp_path / "captions.arrow"
    with path.open("w+b") as stream, ColumnsWriter(stream, {}, subsets) as writer:
        groups = (ones, ones - 1) if subsets else ()
        writer.write(np.ones(1, dtype=np.int64), pa.array(["a.png"]), ones, ones, pa.array([caption]), *groups)
    footer, head = open_captions(tmp_path), pa.ipc.open_stream(pa.BufferReader(path.read_bytes()[8:]))
    assert footer.read_all()["caption"].to_pylist() == [caption]
    assert read_about(footer.schema)["digest"] == read_about(head.schema)["digest"] == writer.digest
    check_columns(path)


@pytest.mark.parametrize("read", [read_captions_metadata, read_folder_sizes, Columns.open])
@pytest.mark.parametrize("about", [b"[", b'{"format": "new"}', b"\xff"])
def test_another_arrow_file_is_refused_by_name(tmp_path: Path, about: bytes, read: Callable[[Path], object]) -> None:
    table = pa.table({"id": [1]}).replace_schema_metadata({b"kwrap": about})
    with pa.OSFile(str(tmp_path / "captions.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(NoImages, match=r"captions\.arrow: not a captions file"):
        read(tmp_path)


def test_a_file_without_the_columns_is_refused_by_name(tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "captions.arrow"), "wb") as sink:
        pa.ipc.new_file(sink, pa.schema([("id", pa.int64())])).close()
    for read in (read_folder_sizes, Columns.open):
        with pytest.raises(NoImages, match=r"captions\.arrow"):
            read(tmp_path)
