"""The digest of captions.arrow: in both places of the schema, whatever the rows hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kohaku_wrap.formats.caption_rows import (
    Subset,
    open_captions,
)
from kohaku_wrap.formats.caption_writer import ColumnsWriter, check_columns
from kohaku_wrap.formats.schema_notes import read_notes

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
    assert read_notes(footer.schema)["digest"] == read_notes(head.schema)["digest"] == writer.digest
    check_columns(path)
