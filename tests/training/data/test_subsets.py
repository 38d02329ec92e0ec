"""Subsets with repeats and options of their own: the same in the order, in plan and proof, and in sd-scripts."""

from __future__ import annotations

import random
import tomllib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from kohaku_wrap.cli import program
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.site import load_site
from kohaku_wrap.config.training_data import compose_dataset, read_training_sizes
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.planning.step_plan import plan_steps
from kohaku_wrap.training.data.columns import ColumnsDataset
from kohaku_wrap.training.data.items import BatchKey, ItemOptions, item_generator, read_dataset_options

FOLDERS = {"3_alice": 3, "1_bob": 2, "12_carol and dave": 1}
"""N_name folders and how many images each holds."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, (name, count) in enumerate(FOLDERS.items()):
        (tmp_path / "img" / name).mkdir(parents=True)
        for number in range(count):
            size = [(160, 96), (96, 160), (128, 128)][(seed + number) % 3]
            pixels = np.random.default_rng(10 * seed + number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "img" / name / f"{number}.png")
            if number:
                (tmp_path / "img" / name / f"{number}.txt").write_text(f"a, b, c, d, {number}\n")
    return tmp_path / "img"


def import_folder(argument: Path, tmp_path: Path, data: str = "kwrap") -> Effective:
    """A template on a site whose images are the imported ones."""
    result = CliRunner().invoke(program, ["import", str(argument), "--out", str(tmp_path / "images")])
    assert result.exit_code == 0, result.output
    (tmp_path / "site.toml").write_text(
        '[paths]\nimages = "images"\nbase_model = "b.safetensors"\nruns = "runs"\n'
        '[machine]\nengine = "builtin"\ngpus = 0\nbatch_per_gpu = 2\nworkers = 0\n'
    )
    overrides = [f"kwrap.data={data}", "dataset_options.keep_tokens_separator=", "dataset_options.num_repeats=2"]
    return resolve_template("demo", load_site(tmp_path / "site.toml"), overrides)


def open_dataset(effective: Effective, images: Path) -> ColumnsDataset:
    options = read_dataset_options(tomllib.loads(toml_text(compose_dataset(effective, images))))
    assert options["image_dir"] == str(images)
    return ColumnsDataset(Columns.open(images), ItemOptions.from_dataset_options(options), 2, 5, 2, None)


def count_images(dataset: ColumnsDataset) -> Counter[str]:
    """How often an epoch trains each file."""
    keys = [BatchKey(1, position, position, False) for position in range(dataset.order.batches)]
    rows = [item.row for key in keys for item in dataset.draw_batch(key)]
    return Counter(dataset.columns.files[row] for row in rows)


@pytest.mark.parametrize("data", ["kwrap", "sd-scripts"])
def test_an_epoch_trains_each_image_as_often_as_its_folder_says(folder: Path, tmp_path: Path, data: str) -> None:
    effective = import_folder(folder, tmp_path, data)
    dataset = open_dataset(effective, tmp_path / "images")
    counted = count_images(dataset)
    assert counted == {
        f"img-{name}/{number}.png": 2 * int(name.split("_")[0])
        for name, count in FOLDERS.items()
        for number in range(count)
    }
    plan = plan_steps(effective, read_training_sizes(effective, tmp_path / "images"))
    assert plan.images == counted.total() == len(dataset.entries)
    assert plan.batches == dataset.order.batches


def test_each_repeat_has_draws_of_its_own(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(import_folder(folder, tmp_path), tmp_path / "images")
    keys = [BatchKey(0, position, position, False) for position in range(dataset.order.batches)]
    items = [item for key in keys for item in dataset.draw_batch(key)]
    texts = {item.caption for item in items if dataset.columns.files[item.row] == "img-3_alice/1.png"}
    assert len(texts) > 1


def test_options_of_a_subset_are_over_the_templates(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set.toml").write_text(
        f"""
[[datasets]]
[[datasets.subsets]]
image_dir = "{folder}/3_alice"
caption_extension = ".txt"
[[datasets.subsets]]
image_dir = "{folder}/1_bob"
caption_extension = ".txt"
shuffle_caption = false
caption_prefix = "bob,"
caption_tag_dropout_rate = 0.0
"""
    )
    dataset = open_dataset(import_folder(tmp_path / "set.toml", tmp_path), tmp_path / "images")
    names = [dataset.columns.files[row] for row in range(len(dataset.columns))]
    bob, alice = names.index("1_bob/1.png"), names.index("3_alice/1.png")
    assert {dataset.draw_item(bob, epoch).caption for epoch in range(9)} == {"bob, a, b, c, d, 1"}
    assert len({dataset.draw_item(alice, epoch).caption for epoch in range(9)}) > 1


@pytest.mark.sd_scripts
def test_sd_scripts_reads_the_same_repeats_and_items(folder: Path, tmp_path: Path, sd_scripts: Any) -> None:
    """From the N_name folders itself, and from the dataset.toml and caches that an import makes of them."""
    from library import config_util

    effective = import_folder(folder, tmp_path)
    document = compose_dataset(effective, tmp_path / "images")
    theirs = config_util.generate_dreambooth_subsets_config_by_subdirs(str(folder))
    assert {(f"img-{Path(each['image_dir']).name}", 2 * each["num_repeats"]) for each in theirs} == {
        (Path(each["image_dir"]).name, each["num_repeats"]) for each in document["datasets"][0]["subsets"]
    } - {("img", 2)}
    dataset = open_dataset(effective, tmp_path / "images")
    sanitizer = config_util.ConfigSanitizer(True, True, False, True)
    document["general"] = {"caption_separator": ","}
    document["datasets"][0]["batch_size"] = 1
    blueprint = config_util.BlueprintGenerator(sanitizer).generate(document, SimpleNamespace())
    group, _ = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    their = group.datasets[0]
    their.current_epoch = 2
    their.tokenize_strategy = SimpleNamespace(tokenize=lambda text: [torch.zeros(1, 1, 77)])
    their.text_encoder_output_caching_strategy = None
    buckets = their.bucket_manager.buckets
    paths = [buckets[at.bucket_index][at.batch_index] for at in their.buckets_indices]
    images = tmp_path / "images"
    assert Counter(paths) == {str(images / file): count for file, count in count_images(dataset).items()}
    assert their.num_train_images == len(dataset.entries)
    for row in range(len(dataset.columns)):
        item = dataset.draw_item(row, 1)
        random.setstate(item_generator(5, 1, item.image_id).getstate())
        example = their[paths.index(str(dataset.columns.path_of(row)))]
        assert example["captions"] == [item.caption]
        assert torch.equal(example["images"][0], dataset.load_image(item))
