"""Folders of extracted images, as fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def extract() -> Callable[..., None]:
    """`extract(selection, folder, skip=())`: an image folder as `kwrap extract` leaves it."""

    def make(selection: Path, folder: Path, skip: tuple[int, ...] = ()) -> None:
        table = pq.read_table(selection)
        rows = [row for row in table.to_pylist() if row["id"] not in skip]
        files = []
        for row in rows:
            path = folder / f"{row['id'] % 1000:04d}" / f"{row['id']}.{row['file_ext']}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + row["id"] % 30, 20), (row["id"] % 256, 3, 5)).save(path)
            files.append(path.relative_to(folder).as_posix())
        columns = {
            "id": pa.array([row["id"] for row in rows], pa.int64()),
            "file": pa.array(files, pa.string()),
            "width": pa.array([20 + row["id"] % 30 for row in rows], pa.int32()),
            "height": pa.array([20] * len(rows), pa.int32()),
            "size_bytes": pa.array([(folder / file).stat().st_size for file in files], pa.int64()),
        }
        pq.write_table(pa.table(columns), folder / "extracted.parquet")

    return make
