"""The loss on posts that were not trained: which posts, the same bits however it is computed, and what it comes to."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from plain_runs import make_run

from kohaku_wrap.cli import run_program
from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.dataset.captions.groups import draw_posts, group_posts
from kohaku_wrap.dataset.fixed_chunks import cut_chunks, list_timesteps
from kohaku_wrap.dataset.recipe import load_dataset
from kohaku_wrap.demo.base_model import write_base_model
from kohaku_wrap.evaluation.held_out import (
    LossJob,
    TrainedPosts,
    choose_rows,
    compare_losses,
    describe_job,
    measure_losses,
    read_other,
)
from kohaku_wrap.evaluation.other_results import OtherResult
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.caption_writer import ColumnsWriter
from kohaku_wrap.formats.predictions import Prediction
from kohaku_wrap.sampling.cells import Compute
from kohaku_wrap.sampling.checkpoints import Model
from kohaku_wrap.sampling.expanding import KnownModel
from kohaku_wrap.training.data.captions import CaptionOptions, keep_whole

RECIPE = load_dataset("epsilon").caption
OPTIONS = {
    "resolution": [64, 64], "enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128,
    "bucket_reso_steps": 32,
    "shuffle_caption": True, "caption_tag_dropout_rate": 0.5, "keep_tokens_separator": "|||", "flip_aug": True,
}  # fmt: skip


def write_columns(folder: Path, captions: list[str], first: int = 1) -> Columns:
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.arange(first, first + len(captions), dtype=np.int64)
    sides = np.full(len(ids), 64, dtype=np.int32)
    with (folder / "captions.arrow").open("w+b") as stream, ColumnsWriter(stream, {}) as writer:
        writer.write(ids, pa.array([f"{each}.png" for each in ids]), sides, sides, pa.array(captions))
    return Columns.open(folder)


def test_posts_are_drawn_by_rating_and_year_and_unknown_is_a_stratum(tmp_path: Path) -> None:
    words = ["safe, newest"] * 60 + ["nsfw, explicit, newest"] * 30 + ["hat"] * 10
    captions = [f"1girl ||| smile, {number} ||| {each}" for number, each in enumerate(words)]
    columns = write_columns(tmp_path, captions)
    rows = draw_posts(columns, np.arange(100), 20, RECIPE)
    groups = group_posts(columns, rows.tolist(), RECIPE).words
    assert Counter(zip(groups["rating"], groups["year"], strict=True)) == {
        ("safe", "newest"): 12, ("explicit", "newest"): 6, ("unknown", "unknown"): 2,
    }  # fmt: skip
    assert rows.tolist() == sorted(rows.tolist())
    # A function of the ids: the same posts of a folder that has more.
    assert draw_posts(columns, np.arange(100), 20, RECIPE).tolist() == rows.tolist()
    assert draw_posts(columns, np.arange(100), 500, RECIPE).tolist() == list(range(100))


def test_chunks_are_of_one_bucket_and_hold_every_post_once() -> None:
    shapes = np.random.default_rng(1).choice([64, 96, 48], (50, 2))
    buckets = assign_buckets(shapes[:, 0], shapes[:, 1], BucketOptions.from_dataset_options(OPTIONS))
    chunks = cut_chunks(np.arange(0, 50, 2), buckets, 4)
    assert sorted(row for chunk in chunks for row in chunk) == list(range(0, 50, 2))
    assert all(len(set(buckets.bucket_of_image[chunk].tolist())) == 1 and len(chunk) <= 4 for chunk in chunks)


def test_time_steps_are_the_middles_of_equal_parts() -> None:
    assert list_timesteps(9) == [55, 166, 277, 388, 500, 611, 722, 833, 944]
    assert list_timesteps(1) == [500]


def test_captions_are_whole() -> None:
    shuffled = CaptionOptions(shuffle_caption=True, keep_tokens_separator="|||", caption_dropout_rate=0.9)
    assert keep_whole("1girl, a ||| b,  c ||| safe", shuffled) == "1girl, a, b, c, safe"
    assert keep_whole("a ||| b", CaptionOptions()) == "a ||| b"
    assert keep_whole("{a|b}, c\nd", replace(shuffled, enable_wildcard=True, caption_prefix="p,")) == "p, a, c"
    all_dropped = replace(
        shuffled, caption_dropout_rate=1.0, caption_dropout_every_n_epochs=1, caption_tag_dropout_rate=1.0
    )
    assert keep_whole("1girl, a ||| b,  c ||| safe", all_dropped) == "1girl, a, b, c, safe"
    braces = CaptionOptions(enable_wildcard=True)
    assert keep_whole("{{a|b}}, {c|d}", braces) == "{a|b}, c", "as process_caption has it, whatever it draws"


def test_posts_that_the_run_trains_are_refused_or_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "r", images=4)
    ids = Columns.open(run.find_images()).ids
    both = write_columns(tmp_path / "both", ["a"] * 8, first=int(ids[0]) - 4)
    with pytest.raises(TrainedPosts, match=rf"1 of 8 posts are in the dataset of run r, the first is {ids[0]}"):
        choose_rows(run, both, False, False)
    assert both.ids[choose_rows(run, both, True, False)].tolist() == [each for each in both.ids if each not in ids]
    assert len(choose_rows(run, both, False, True)) == len(choose_rows(None, both, False, False)) == 8
    assert not len(choose_rows(run, write_columns(tmp_path / "none", []), False, False))
    with pytest.raises(TrainedPosts, match="4 of 4"):
        choose_rows(run, Columns.open(run.find_images()), True, False)


def test_a_planted_shift_gives_an_interval_without_0() -> None:
    draw = np.random.default_rng(6)
    easy = draw.gamma(4, 0.05, (300, 9))
    (pair,) = compare_losses(["a", "b"], [easy, easy - 0.002 + draw.normal(0, 0.005, easy.shape)])
    assert pair["difference"]["high"] < 0 and pair["posts"] == 300
    easy[7] = np.nan
    assert compare_losses(["a", "b"], [easy, easy])[0]["posts"] == 299


@pytest.fixture(scope="module")
def job(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> LossJob:
    """Seven posts of the embedded world at two time steps, two a forward."""
    images = tmp_path_factory.mktemp("held") / "images"
    shutil.copytree(extracted / "images", images)
    columns = Columns.open(images)
    buckets = assign_buckets(columns.widths, columns.heights, BucketOptions.from_dataset_options(OPTIONS))
    rows = list(range(7))
    folders = tuple(sorted((extracted / "base" / "tokenizers").iterdir(), key=lambda path: "laion" in path.name))
    assert len(folders) == 2
    return LossJob(
        columns, rows, cut_chunks(np.array(rows), buckets, 2), OPTIONS, False, 75, (folders[0], folders[1]), "t",
        [300, 700], Compute(batch=2), images.parent / "out",
    )  # fmt: skip


@pytest.fixture(scope="module")
def known(extracted: Path) -> KnownModel:
    return KnownModel(Model(extracted / "base" / "model.safetensors"), "m", Prediction("epsilon", False, ""))


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.timeout(900)
def test_the_same_bits_on_one_process_and_two_and_after_a_part_is_lost(job: LossJob, known: KnownModel) -> None:
    losses = measure_losses(job, known, 1, lambda done, total: None)
    assert losses.shape == (7, 2) and np.isfinite(losses).all() and (losses > 0).all()
    job.files(known)[1].unlink()
    assert np.array_equal(measure_losses(job, known, 1, lambda done, total: None), losses)
    # Neighbours leave no trace either: the same posts in other chunks, by two processes.
    turned = replace(job, chunks=[chunk[::-1] for chunk in reversed(job.chunks)], out=job.out.with_name("turned"))
    assert np.array_equal(measure_losses(turned, known, 2, lambda done, total: None), losses)
    # Another batch changes last bits at most.
    alone = replace(job, chunks=[[row] for row in job.rows], compute=Compute(batch=1), out=job.out.with_name("alone"))
    assert np.allclose(measure_losses(alone, known, 1, lambda done, total: None), losses, rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.timeout(900)
def test_an_unreadable_picture_is_no_number_and_changes_no_other(job: LossJob, known: KnownModel) -> None:
    losses = measure_losses(job, known, 1, lambda done, total: None)
    path = job.columns.path_of(3)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    elsewhere = replace(job, out=job.out.with_name("broken"))
    broken = measure_losses(elsewhere, known, 1, lambda done, total: None)
    path.write_bytes(whole)
    assert np.isnan(broken[3]).all()
    assert np.array_equal(np.delete(broken, 3, axis=0), np.delete(losses, 3, axis=0))
    assert np.array_equal(measure_losses(elsewhere, known, 1, lambda done, total: None), losses), "put right, it counts"


def test_options_that_change_no_whole_post_do_not_part_two_results(job: LossJob, tmp_path: Path) -> None:
    """A run's options are those of its lock, a template's its own: its batch size is only in the lock."""

    def write(tokens: int = 75, **options: object) -> None:
        other = describe_job(replace(job, max_token_length=tokens, dataset_options={**job.dataset_options, **options}))
        (tmp_path / "loss.json").write_text(json.dumps({"format": 1, "measure": "loss", "models": [model], **other}))

    losses = np.zeros((len(job.rows), len(job.timesteps))).tolist()
    model = {"title": "other", "optimizer_step": None, "losses": losses}
    write(batch_size=4, num_repeats=3, flip_aug=True, later_subsets=[{"batch_size": 4}])
    here = describe_job(replace(job, dataset_options={**job.dataset_options, "later_subsets": [{"batch_size": 1}]}))
    assert read_other(tmp_path / "loss.json", here)["models"] == [model]
    write(tokens=225)
    with pytest.raises(OtherResult, match="measured on another length of captions"):
        read_other(tmp_path / "loss.json", describe_job(job))
    write(caption_prefix="safe")
    with pytest.raises(OtherResult, match="measured on other dataset options"):
        read_other(tmp_path / "loss.json", describe_job(job))


def start(*words: object) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "kohaku_wrap", "evaluate", "loss", *map(str, words)]
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.timeout(900)
def test_killed_and_called_again_two_models_have_the_same_result(extracted: Path, tmp_path: Path) -> None:
    write_base_model(tmp_path, seed=7)
    words = [extracted / "base" / "model.safetensors", tmp_path / "model.safetensors", "--images", extracted / "images",
             "--tokenizers", extracted / "base" / "tokenizers", "--template", "demo", "--posts", 6, "--timesteps", 2,
             "--device", "cpu"]  # fmt: skip
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(*words, "--out", undisturbed, "--jobs", 2).wait() == 0
    process = start(*words, "--out", killed)
    while process.poll() is None and len(list(killed.rglob("chunk-*.npy"))) < 2:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(*words, "--out", killed).wait() == 0
    result = read(killed)
    assert result == read(undisturbed)
    assert [model["posts"] for model in result["models"]] == [6, 6]
    means = [np.mean(model["losses"]) for model in result["models"]]
    assert [model["loss"] for model in result["models"]] == pytest.approx(means)
    (pair,) = result["pairs"]
    assert math.isclose(pair["difference"]["mean"], means[1] - means[0], abs_tol=1e-12)
    assert sum(group["posts"] for group in result["models"][0]["by_group"]["rating"].values()) == 6


def read(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "loss.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{world}/base/model.safetensors", "--images", "{world}/none"], "not there"),
        (["{world}/base/model.safetensors", "--checkpoints", "all"], "--checkpoints is of a run"),
        (["{world}/base/model.safetensors", "--against", "{world}/demo.json"], "no result of `kwrap evaluate loss`"),
        (["{world}/base/model.safetensors", "--against", "{tmp}/loss.json"], "loss.json: measured on other posts"),
        (["nothing"], "nothing: no such run"),
    ],
)
def test_what_cannot_be_measured_is_one_message(
    words: list[str], message: str, extracted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loss.json").write_text('{"format": 1, "measure": "loss", "models": [{"title": "other"}], "posts": {}}')
    given = [word.format(world=extracted, tmp=tmp_path) for word in words]
    images = [] if "--images" in given else ["--images", str(extracted / "images")]
    assert run_program(["evaluate", "loss", *given, *images, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "refused before anything was measured"
