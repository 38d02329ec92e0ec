"""Validation in real runs: nothing of the training changes, and the numbers are those of the network alone."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import toml
import torch
from engine_world import SIZES, World, kwrap, train_arguments, write_images

from kohaku_wrap.dataset.buckets import BucketOptions
from kohaku_wrap.evaluation.intervals import bootstrap_mean
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.training.data.captions import CaptionOptions
from kohaku_wrap.training.data.columns import ColumnsDataset
from kohaku_wrap.training.data.items import ItemOptions
from kohaku_wrap.training.data.whole_items import draw_normals, draw_whole, load_whole
from kohaku_wrap.training.engines.validating import leaving_no_trace
from kohaku_wrap.training.records.evaluations import Evaluation, evaluation_file, read_evaluations
from kohaku_wrap.training.records.folder import Run

VALIDATION = (
    "validation.posts=3", "validation.every=1", "validation.timesteps=2", "validation.batch=2", "max_train_epochs=0",
    "max_train_steps=2", "lr_warmup_steps=0", "states.keep=9",
)  # fmt: skip


def test_a_block_leaves_no_trace() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2))
    model.train()
    model[1].eval()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = random.random(), np.random.rand(), float(torch.rand(1))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    threads = torch.get_num_threads()
    with pytest.raises(KeyError), leaving_no_trace([model], torch.device("cpu")):
        assert not model.training and not model[0].training and torch.get_num_threads() == 1
        assert not model(torch.ones(1, 2)).requires_grad
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        raise KeyError
    assert (random.random(), np.random.rand(), float(torch.rand(1))) == wanted
    assert model.training and model[0].training and not model[1].training and torch.get_num_threads() == threads


def test_posts_are_whole_and_still_whatever_is_drawn_in_training(world: World) -> None:
    captions = CaptionOptions(shuffle_caption=True, caption_dropout_rate=0.9, keep_tokens_separator="|||")
    buckets = BucketOptions.from_dataset_options({"resolution": [64, 64], "enable_bucket": True, "min_bucket_reso": 32,
                                                  "max_bucket_reso": 128, "bucket_reso_steps": 32})  # fmt: skip
    options = ItemOptions(captions, buckets, flip_aug=True, random_crop=True)
    dataset = ColumnsDataset(Columns.open(world.images), options, 1, 0, 1, None)
    item = draw_whole(dataset, 1)
    assert item.caption.startswith("1girl, hero 1, red hair") and not item.flipped
    assert item.crop == tuple(side // 2 for side in dataset.spare_of(1))
    example, unreadable = load_whole(dataset, [1, 3])
    assert unreadable == [False, False] and example["images"].shape[0] == 2
    assert torch.equal(example["images"], load_whole(dataset, [1, 3])[0]["images"])
    one = draw_normals("s", [7, 8], 0, torch.zeros(2, 4))
    assert torch.equal(one[1], draw_normals("s", [8, 9], 0, torch.zeros(2, 4))[0])


@pytest.fixture(scope="module")
def larger(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world with 35 images, of which some can be held out."""
    copy = World(tmp_path_factory.mktemp("larger"))
    write_images(copy.images, SIZES * 5)
    paths = {"images": str(copy.images), "base_model": str(world.base_model), "tokenizers": str(world.tokenizers),
             "runs": str(copy.folder / "runs")}  # fmt: skip
    machine = {"engine": "builtin", "gpus": 0, "batch_per_gpu": 2, "workers": 0}
    copy.site.write_text(toml.dumps({"paths": paths, "machine": machine}), encoding="utf-8")
    return copy


def evaluations(run: Run) -> dict[int, Evaluation]:
    return {each.optimizer_step: each for each in read_evaluations(run)}


def bits(evaluation: Evaluation) -> bytes:
    return evaluation.losses.tobytes()


@pytest.fixture(scope="module")
def whole(larger: World) -> Run:
    """Two optimizer steps with an evaluation before, between and after."""
    done = kwrap(*train_arguments(larger.site, "whole", *VALIDATION))
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(larger.folder / "runs" / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_loss_falls_and_the_interval_lies_below_0(whole: Run) -> None:
    found = evaluations(whole)
    assert sorted(found) == [0, 1, 2] and all(np.isfinite(each.losses).all() for each in found.values())
    assert found[0].losses.shape == (3, 2)
    interval = bootstrap_mean((found[2].losses - found[0].losses).mean(axis=1))
    assert interval is not None and interval["high"] < 0
    report = json.loads(kwrap("verify", str(whole.folder), "--json").stdout)
    assert report["proved"] and any(each["name"] == "held out" and each["is_looked_at"] for each in report["checks"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_bits_after_a_resume_on_two_processes_and_in_a_longer_run(whole: Run) -> None:
    before = evaluations(whole)
    assert kwrap("resume", str(whole.folder), "--step", "1").returncode == 0
    again = evaluations(whole)
    assert again[1].about["attempt"] == 1, "what is there is not measured again"
    assert again[2].about["attempt"] == 2 and bits(again[2]) == bits(before[2])
    evaluation_file(whole, 1).unlink()
    resumed = kwrap("resume", str(whole.folder), "--step", "1", "--processes", "2")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    on_two = evaluations(whole)
    assert on_two[1].about["processes"] == 2 and on_two[1].about["attempt"] == 3
    assert bits(on_two[1]) == bits(before[1])
    longer = kwrap("extend", str(whole.folder), "--steps", "1")
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert sorted(evaluations(whole)) == [0, 1, 2, 3]
    assert json.loads(kwrap("verify", str(whole.folder), "--json").stdout)["proved"]


@pytest.mark.slow
@pytest.mark.sd_scripts
@pytest.mark.timeout(900)
def test_both_engines_measure_the_same_network_alike(larger: World, whole: Run, use_trainer: Any) -> None:
    arguments = train_arguments(larger.site, "trainer", *VALIDATION, "max_train_steps=1")
    done = kwrap(*arguments, "--engine", "sd-scripts")
    assert done.returncode == 0, done.stdout + done.stderr
    found = evaluations(Run(larger.folder / "runs" / "trainer"))
    assert sorted(found) == [0, 1]
    np.testing.assert_allclose(found[0].losses, evaluations(whole)[0].losses, rtol=1e-4)
    assert (found[1].losses - found[0].losses).mean() < 0
