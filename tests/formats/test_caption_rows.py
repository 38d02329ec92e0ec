"""What is no captions file of kwrap's is refused by name, whoever reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.caption_rows import (
    NoImages,
    read_captions_metadata,
    read_folder_sizes,
)


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
