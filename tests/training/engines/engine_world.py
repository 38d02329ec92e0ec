"""What a tiny world for both engines is made of: pictures in two shapes, their captions, dataset options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

SIZES = ((150, 140), (96, 170), (130, 131), (101, 180), (140, 150), (64, 64), (90, 160))
"""Seven images; at an area of 64x64 they make two shapes, and one of them has to grow."""

CAPTION = "1girl, hero {} ||| red hair, blue eyes, hat, long dress, tag {}, smile, sky ||| best quality, safe"

DATASET_OPTIONS = {
    "resolution": [64, 64],
    "enable_bucket": True,
    "min_bucket_reso": 32,
    "max_bucket_reso": 128,
    "bucket_reso_steps": 32,
    "shuffle_caption": True,
    "caption_tag_dropout_rate": 0.3,
    "keep_tokens_separator": "|||",
}


@dataclass(frozen=True)
class World:
    """Where everything lies."""

    folder: Path
    """Holds images, base, site.toml and runs."""

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def base_model(self) -> Path:
        return self.folder / "base" / "model.safetensors"

    @property
    def tokenizers(self) -> Path:
        return self.folder / "base" / "tokenizers"

    @property
    def site(self) -> Path:
        return self.folder / "site.toml"


def write_images(folder: Path, sizes: Sequence[tuple[int, int]] = SIZES) -> None:
    """Noise pictures with ids 1001, 1002, … and their captions.arrow."""
    random = np.random.default_rng(0)
    rows = []
    for index, (width, height) in enumerate(sizes):
        post = 1001 + index
        name = f"{post % 1000:04d}/{post}.png"
        pixels = random.integers(0, 256, (height, width, 4 if index == 2 else 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
        rows.append((post, name, width, height, CAPTION.format(index, index)))
    columns = list(zip(*rows, strict=True))
    table = pa.table(
        {
            "id": pa.array(columns[0], pa.int64()),
            "file": pa.array(columns[1], pa.string()),
            "width": pa.array(columns[2], pa.int32()),
            "height": pa.array(columns[3], pa.int32()),
            "caption": pa.array(columns[4], pa.large_string()),
        }
    ).replace_schema_metadata({"kwrap": json.dumps({"digest": "0" * 64, "count": len(rows)})})
    with pa.OSFile(str(folder / "captions.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
