"""A selection that holds something else than `kwrap select` writes ends in one message, never in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from kohaku_wrap.cli import program
from kohaku_wrap.dataset.images.extract import read_selected_images
from kohaku_wrap.dataset.images.extracted import SCHEMA, write_extracted
from kohaku_wrap.dataset.selection_file import BadSelection, read_about, read_selected_posts
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.relations import read_relations
from kohaku_wrap.metadata.posts import POST_SCHEMA

ABOUT = {"dataset": "demo", "caption": {}}
ROWS = {
    "id": [3, 6, 9], "rating": [0, 3, -1], "fav_count": [1, 2, 3], "score": [1, 2, 3],
    "created_at": ["2019-05-05T10:00:00.000-04:00"] * 3, "file_ext": ["png", "jpg", "webp"],
    "image_width": [40, 50, 0], "image_height": [40, 50, 0], "md5": ["0" * 32] * 3,
}  # fmt: skip


def write(path: Path, about: bytes | None = json.dumps(ABOUT).encode(), **columns: pa.Array) -> Path:
    arrays = {name: pa.array(ROWS[name], POST_SCHEMA.field(name).type) for name in POST_SCHEMA.names} | columns
    pq.write_table(pa.table(arrays).replace_schema_metadata({b"kwrap": about} if about is not None else {}), path)
    return path


ODD_COLUMNS: dict[str, dict[str, Any]] = {
    "null ids": {"id": pa.array([3, None, 9])},
    "text ids": {"id": pa.array(["3", "6", "9"])},
    "float ids": {"id": pa.array([3.0, 6.5, 9.0])},
    "negative ids": {"id": pa.array([-3, 6, 9])},
    "huge ids": {"id": pa.array([3, 6, 1 << 63], pa.uint64())},
    "ids twice": {"id": pa.array([3, 3, 9])},
    "boolean ids": {"id": pa.array([True, False, True])},
    "list ids": {"id": pa.array([[3], [6], [9]])},
    "rating 7": {"rating": pa.array([0, 7, 1], pa.int8())},
    "rating -2": {"rating": pa.array([0, -2, 1], pa.int8())},
    "rating 300": {"rating": pa.array([0, 300, 1])},
    "null ratings": {"rating": pa.array([0, None, 1], pa.int8())},
    "text ratings": {"rating": pa.array(["g", "s", "e"])},
    "huge favourites": {"fav_count": pa.array([1, 1 << 40, 3])},
    "text favourites": {"fav_count": pa.array(["1", "", "3"])},
    "number dates": {"created_at": pa.array([2019, 2020, 2021])},
    "time dates": {"created_at": pa.array([0, 1, 2], pa.timestamp("s"))},
    "binary extensions": {"file_ext": pa.array([b"png", b"\xff", b""])},
}
ODD_METADATA = [None, b"", b"[1", b"[]", b"5", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000]


@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_odd_columns(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.parquet", **ODD_COLUMNS[name])
    with pytest.raises(BadSelection) as caught:
        read_selected_posts(path)
    assert str(path) in caught.value.message and "kwrap select" in caught.value.next_step
    if name.endswith("ids") or name == "ids twice":
        with pytest.raises(BadSelection):
            read_selected_images(path)


@pytest.mark.parametrize("about", ODD_METADATA)
def test_odd_metadata(tmp_path: Path, about: bytes | None) -> None:
    with pytest.raises(BadSelection):
        read_about(write(tmp_path / "a.parquet", about))


@pytest.mark.parametrize("sizes", [["4", "5", "6"], [4.5, 5.0, 6.0], [4, None, 6], [-4, 5, 6], [4, 5, 1 << 40]])
def test_odd_sizes_are_refused_by_extract(tmp_path: Path, sizes: list[Any]) -> None:
    with pytest.raises(BadSelection, match="image_width"):
        read_selected_images(write(tmp_path / "a.parquet", image_width=pa.array(sizes)))


def test_other_types_of_the_same_values_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet",
        id=pa.array([3, 6, 9], pa.uint32()),
        rating=pa.array([0, 3, 2]),
        created_at=pa.array([None, "2019-05-05", ""], pa.large_string()),
        file_ext=pa.array(["png", None, "jpg"]).dictionary_encode(),
    )
    posts = read_selected_posts(path)
    assert posts.ids.tolist() == [3, 6, 9] and posts.years.tolist() == [0, 2019, 0]
    assert posts.extensions.to_pylist() == ["png", "", "jpg"]


def test_captions_need_neither_md5_nor_score_nor_what_a_selection_says_of_itself(
    tmp_path: Path, writer: ModuleType
) -> None:
    database = writer.write_layout(tmp_path / "a.db", writer.make_world(20))
    about = {"dataset": 5, "caption": {}, "edition": "v3", "counts": [], "seed": {}}
    odd = {"md5": pa.array([None, "0" * 32, ""]), "score": pa.array([None, 1, 2])}
    path = write(tmp_path / "odd.parquet", json.dumps(about).encode(), **odd)
    images = tmp_path / "images"
    (images / "0003").mkdir(parents=True)
    (images / "0003" / "3.png").touch()
    row = {"id": 3, "file": "0003/3.png", "width": 40, "height": 40, "size_bytes": 0, "max_pixels": 0, "rewritten": 0}
    write_extracted(images, pa.Table.from_pylist([row], schema=SCHEMA), {})
    arguments = ["caption", str(path), "--db", str(database), "--out", str(images)]
    done = CliRunner().invoke(program, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and Columns.open(images).files[0] == "0003/3.png"
    found = read_relations(images)
    assert found and found.contents.to_pylist() == [""]


def test_commands_end_in_one_message(tmp_path: Path, writer: ModuleType) -> None:
    database = writer.write_layout(tmp_path / "a.db", writer.make_world(20))
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "data-0003.tar").write_bytes(bytes(1024))
    os.mkfifo(tmp_path / "fifo.parquet")
    (tmp_path / "page.parquet").write_text("<!DOCTYPE html>")
    files = [
        write(tmp_path / "text.parquet", id=pa.array(["3", "6", "9"])),
        write(tmp_path / "null.parquet", id=pa.array([3, None, 9])),
        write(tmp_path / "about.parquet", b'{"dataset": 5, "caption": [1], "seed": {}}', id=pa.array([3.5, 4, 5])),
        tmp_path / "fifo.parquet",
        tmp_path / "page.parquet",
    ]
    for file in files:
        for arguments in (
            ["caption", file, "--db", database, "--out", tmp_path / "images"],
            ["extract", file, "--tars", tmp_path / "tars", "--out", tmp_path / "images"],
        ):
            done = subprocess.run(
                [sys.executable, "-m", "kohaku_wrap", *map(str, arguments)], capture_output=True, text=True, timeout=120
            )
            assert done.returncode in (1, 2), (arguments, done)
            assert "Traceback" not in done.stderr and "error: " in done.stderr, (arguments, done)
