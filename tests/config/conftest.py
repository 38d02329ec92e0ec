"""Sites, image sizes and caption files for the tests of config/."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from kohaku_wrap.config.site import Site, load_site
from kohaku_wrap.trainer.installed import find_trainer

CHECKOUT = find_trainer()
"""Looked up before the tests get a home of their own."""

MakeSite = Callable[..., Site]


@pytest.fixture
def make_site(tmp_path: Path) -> MakeSite:
    """A function that writes a site.toml with the given [machine] and [trainer] lines and reads it."""

    def make(machine: str = "gpus = 4\nbatch_per_gpu = 4\nworkers = 2", trainer: str = "") -> Site:
        path = tmp_path / "site.toml"
        path.write_text(f"[machine]\n{machine}\n[trainer]\n{trainer}\n", encoding="utf-8")
        return load_site(path)

    return make


@pytest.fixture
def write_captions() -> Callable[[Path, Sequence[tuple[int, int]]], None]:
    """A function that makes `IMAGES/captions.arrow` as `kwrap caption` leaves it."""
    return make_captions


def make_captions(images: Path, sizes: Sequence[tuple[int, int]]) -> None:
    images.mkdir(parents=True, exist_ok=True)
    about = {
        "digest": "d" * 64,
        "count": len(sizes),
        "dataset": "demo",
        "style": "kohaku",
        "prompt_format": "<general tags>",
        "selection_sha256": "5" * 64,
    }
    metadata = {"kwrap": json.dumps(about)}
    fields = [("id", pa.int64()), ("file", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
    schema = pa.schema([*fields, ("caption", pa.large_string())], metadata=metadata)
    columns = {
        "id": list(range(len(sizes))),
        "file": [f"{index % 1000:04d}/{index}.png" for index in range(len(sizes))],
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
        "caption": ["1girl ||| solo ||| safe"] * len(sizes),
    }
    with pa.OSFile(str(images / "captions.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema))


@pytest.fixture
def checkout() -> Path:
    """The real sd-scripts, or a skip."""
    if CHECKOUT is None:
        pytest.skip("no sd-scripts checkout; set KWRAP_SD_SCRIPTS or run kwrap trainer install")
    return CHECKOUT
