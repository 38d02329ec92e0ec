"""A tiny world for both engines: pictures in two shapes, their captions, options, and `kwrap` as a process in it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from kohaku_wrap.formats.caption_writer import ColumnsWriter

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


SETTINGS = (
    "effective_batch=4",
    "max_train_epochs=2",
    "save_every_n_steps=1",
    "save_last_n_steps=2",
    "save_precision=float",
    "max_token_length=150",
    "states.keep=2",
    "dataset_options.resolution=[64, 64]",
    "dataset_options.min_bucket_reso=32",
    "dataset_options.max_bucket_reso=128",
)


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
    with (folder / "captions.arrow").open("w+b") as stream, ColumnsWriter(stream, {"count": len(rows)}) as writer:
        for start in range(0, len(rows), 3):
            ids, files, widths, heights, captions = zip(*rows[start : start + 3], strict=True)
            writer.write(
                np.array(ids, np.int64),
                pa.array(files),
                np.array(widths, np.int32),
                np.array(heights, np.int32),
                pa.array(captions),
            )


def train_arguments(site: Path, name: str, *settings: str) -> tuple[str, ...]:
    chosen = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return ("train", "demo", "--site", str(site), "--run", name, *chosen)


def kwrap(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kohaku_wrap", *arguments], capture_output=True, text=True, check=False
    )


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def await_text(log: Path, words: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while words not in log.read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
