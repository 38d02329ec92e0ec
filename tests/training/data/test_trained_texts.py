"""Natural-language captions as trained: drawn for each epoch and image, never split, and the tags as without them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import toml
from engine_world import DATASET_OPTIONS, SIZES, World, kwrap, train_arguments

from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.caption_rows import open_captions, read_captions_metadata
from kohaku_wrap.formats.caption_writer import ColumnsWriter
from kohaku_wrap.proving.killing import Kill, train_with_kills
from kohaku_wrap.training.data.columns import ColumnsDataset
from kohaku_wrap.training.data.items import ItemOptions
from kohaku_wrap.training.records.folder import Run

TEXT = "She wears a hat,red; it says {a|b}, 1,000 times ; end.,"
MIX = {"tags": 0.3, "text": 0.3, "both": 0.4}


def add_texts(images: Path, shares: Mapping[str, float]) -> None:
    """Write the captions of a folder again with a text for all but the first row, at the end of the prefix."""
    table = open_captions(images).read_all()
    captions = table["caption"].to_pylist()
    texts = ["", *[f"{row}: {TEXT}" for row in range(1, len(table))]]
    places = np.array([caption.index(" ||| ") for caption in captions], np.int32)
    # Another file in its place: the one that is there is mapped.
    new = images / "new.arrow"
    with new.open("w+b") as stream, ColumnsWriter(stream, {"count": len(table)}, text_shares=shares) as writer:
        numbers = (np.array(table[name]) for name in ("width", "height"))
        files, tags = table["file"].combine_chunks(), pa.array(captions)
        writer.write(np.array(table["id"]), files, *numbers, tags, pa.array(texts), places)
    new.replace(images / "captions.arrow")


def open_dataset(images: Path, seed: int = 5, **options: Any) -> ColumnsDataset:
    chosen = ItemOptions.from_dataset_options({**DATASET_OPTIONS, **options})
    return ColumnsDataset(Columns.open(images), chosen, 2, seed, 2, None)


@pytest.fixture
def images(world: World, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", str(world.images), str(tmp_path / "images")], check=True)
    return tmp_path / "images"


def test_a_text_is_whole_and_the_form_is_drawn_for_each_epoch_and_image(images: Path) -> None:
    plain = open_dataset(images)
    add_texts(images, MIX)
    dataset = open_dataset(images)
    seen: dict[int, set[str]] = {row: set() for row in range(len(SIZES))}
    for epoch in range(30):
        for row in range(len(SIZES)):
            caption, tags = dataset.draw_item(row, epoch).caption, plain.draw_item(row, epoch).caption
            text = f"{row}: {TEXT}"
            with_both = tags.replace(f"1girl, hero {row}", f"1girl, hero {row}, {text}", 1)
            form = {tags: "tags", text: "text", with_both: "both"}[caption]
            seen[row].add(form)
            assert dataset.draw_item(row, epoch) == open_dataset(images).draw_item(row, epoch)
    assert seen.pop(0) == {"tags"}, "it has no text"
    assert all(forms == {"tags", "text", "both"} for forms in seen.values())
    other = open_dataset(images, seed=6)
    assert [other.draw_item(1, epoch).caption for epoch in range(30)] != [
        dataset.draw_item(1, epoch).caption for epoch in range(30)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"enable_wildcard": True},
        {"secondary_separator": ";"},
        {"caption_prefix": "pre,", "caption_suffix": ", post"},
        {"caption_separator": " "},
        {"keep_tokens_separator": "", "keep_tokens": 1},
        {"caption_tag_dropout_rate": 0.9},
    ],
    ids=lambda options: next(iter(options)),
)
def test_no_option_of_captions_changes_a_text(options: dict[str, Any], images: Path) -> None:
    add_texts(images, {"tags": 0, "text": 0, "both": 1})
    dataset = open_dataset(images, **options)
    captions = [dataset.draw_item(row, epoch).caption for row in range(1, len(SIZES)) for epoch in range(5)]
    whole = [
        f"{row}: {TEXT}" in caption for row, caption in zip(np.repeat(range(1, len(SIZES)), 5), captions, strict=True)
    ]
    assert all(whole) or "keep_tokens" in options, "only a template that fixes nothing may drop it, and then all of it"
    assert all("hat,red" not in caption for caption, kept in zip(captions, whole, strict=True) if not kept)


def test_dropout_of_whole_captions_takes_the_text_too(images: Path) -> None:
    add_texts(images, {"tags": 0, "text": 1, "both": 0})
    dataset = open_dataset(images, caption_dropout_every_n_epochs=2)
    assert [dataset.draw_item(1, epoch).caption for epoch in range(4)] == [f"1: {TEXT}", "", f"1: {TEXT}", ""]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_with_texts_goes_on_and_is_proved(world: World, images: Path, tmp_path: Path) -> None:
    add_texts(images, MIX)
    site = tmp_path / "site.toml"
    paths = {
        "images": images,
        "runs": tmp_path / "runs",
        "base_model": world.base_model,
        "tokenizers": world.tokenizers,
    }
    machine = {"engine": "builtin", "gpus": 0, "batch_per_gpu": 2, "workers": 0}
    site.write_text(toml.dumps({"paths": {key: str(path) for key, path in paths.items()}, "machine": machine}))
    run = Run(tmp_path / "runs" / "r")
    train_with_kills(run, train_arguments(site, "r"), (Kill(0.5),), (0, 1), tmp_path)
    whole = kwrap(*train_arguments(site, "whole"))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    networks = [(tmp_path / "runs" / name / "checkpoints" / f"{name}.safetensors") for name in ("r", "whole")]
    tensors = [path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], "little") :] for path in networks]
    assert tensors[0] == tensors[1]
    verified = kwrap("verify", str(run.folder), "--deep", "3", "--json")
    assert json.loads(verified.stdout)["faults"] == [], verified.stdout
    digest = read_captions_metadata(images)["digest"]
    assert run.lock.dataset_digest == digest
    add_texts(images, {"tags": 0.5, "text": 0.1, "both": 0.4})
    changed = subprocess.run(
        [sys.executable, "-m", "kohaku_wrap", "verify", str(run.folder)], capture_output=True, text=True
    )
    assert f"the captions had the digest {digest[:12]}" in changed.stderr
