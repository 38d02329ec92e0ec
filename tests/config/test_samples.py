"""`[samples]`: who draws, what follows from the training, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kohaku_wrap.config.checks import check_effective
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.samples import settle_samples, who_draws, with_own_prompts
from kohaku_wrap.config.site import load_site
from kohaku_wrap.errors import ProblemsFound, UsageError
from kohaku_wrap.formats.caption_writer import ColumnsWriter

SITE = '[machine]\nengine = "{engine}"\ngpus = 0\nbatch_per_gpu = 2\n'


def resolve(folder: Path, engine: str, *overrides: str, template: str = "demo") -> Effective:
    (folder / "site.toml").write_text(SITE.format(engine=engine))
    return resolve_template(template, load_site(folder / "site.toml"), list(overrides))


@pytest.mark.parametrize(
    "engine,settings,who",
    [
        ("builtin", (), ""),
        ("builtin", ("samples.every=4",), "kwrap"),
        ("sd-scripts", ("samples.every=4",), "trainer"),
        ("sd-scripts", ("samples.by=kwrap",), "kwrap"),
        ("sd-scripts", ("samples.prompts=1girl", "samples.every=3"), "trainer"),
    ],
)
def test_who_draws(tmp_path: Path, engine: str, settings: tuple[str, ...], who: str) -> None:
    effective = resolve(tmp_path, engine, *settings)
    assert who_draws(effective) == who
    assert bool(settle_samples(effective)) == bool(who)


@pytest.mark.parametrize(
    "engine,settings,said",
    [
        ("builtin", ("samples.every=5",), "samples.every"),
        ("builtin", ("samples.by=trainer",), "samples.by"),
        ("builtin", ("samples.every=4", "samples.width=65"), "samples.width"),
        ("sd-scripts", ("samples.prompts=1girl",), "samples.prompts"),
        ("sd-scripts", ("samples.by=kwrap", "samples.prompts=1girl", "sample_at_first=true"), "sample_at_first"),
    ],
)
def test_what_does_nothing_is_refused(tmp_path: Path, engine: str, settings: tuple[str, ...], said: str) -> None:
    try:
        found = [problem.where for problem in check_effective(resolve(tmp_path, engine, *settings))]
    except ProblemsFound as problems:
        found = [problem.where for problem in problems.problems]
    assert said in found


@pytest.mark.parametrize("asked", ['samples.prompts=["hat, solo", "smile"]', "samples.every=4", "samples.by=trainer"])
def test_options_of_the_trainers_sampling_go_with_any_prompts(tmp_path: Path, asked: str) -> None:
    own = ("sample_sampler=euler_a", "sample_every_n_epochs=1", "sample_at_first=true")
    with pytest.raises(ProblemsFound, match=r"does nothing without samples\.by or samples\.every or samples\.prompts"):
        resolve(tmp_path, "sd-scripts", *own)
    assert not check_effective(resolve(tmp_path, "sd-scripts", *own, asked))


def test_size_and_steps_follow_the_resolution(tmp_path: Path) -> None:
    small = settle_samples(resolve(tmp_path, "builtin", "samples.every=4"))
    assert (small["width"], small["height"], small["steps"]) == (128, 128, 7)
    whole = settle_samples(resolve(tmp_path, "sd-scripts", "samples.every=4", template="epsilon"))
    assert (whole["width"], whole["height"], whole["steps"]) == (1024, 1024, 28)
    said = settle_samples(resolve(tmp_path, "builtin", "samples.every=4", "samples.width=64", "samples.seed=0"))
    assert (said["width"], said["height"], said["seed"]) == (64, 128, 0)


def test_without_captions_prompts_must_be_written(tmp_path: Path) -> None:
    effective = resolve(tmp_path, "builtin", "samples.every=4")
    with pytest.raises(UsageError, match="has no prompts"):
        with_own_prompts(effective, tmp_path / "images")
    written = resolve(tmp_path, "builtin", "samples.every=4", "samples.prompts=1girl")
    assert with_own_prompts(written, tmp_path / "images") is written


def write_captions(images: Path, captions: list[str]) -> None:
    count = len(captions)
    images.mkdir()
    sides = np.full(count, 64, np.int32)
    with (images / "captions.arrow").open("w+b") as stream, ColumnsWriter(stream, {"dataset": "not here"}) as writer:
        files = pa.array([f"{index}.png" for index in range(count)])
        writer.write(np.arange(count, dtype=np.int64), files, sides, sides, pa.array(captions))


@pytest.mark.parametrize(
    "safe,other",
    [("1girl ||| hat ||| safe", "1girl ||| hat ||| nsfw, explicit"), ("hat, rating:general", "hat, rating:explicit"),
     ("hat, rating:safe", "hat, rating:sensitive"),
     ("a ||| b ||| sensitive", "a ||| b"), ("a ||| b", "a ||| b ||| nsfw")],
)  # fmt: skip
def test_own_prompts_are_of_the_mildest_posts(tmp_path: Path, safe: str, other: str) -> None:
    """Five of forty, wherever they stand."""
    captions = [f"{safe if index % 8 == 3 else other}, n{index}" for index in range(40)]
    write_captions(tmp_path / "images", captions)
    chosen = with_own_prompts(resolve(tmp_path, "builtin", "samples.every=4"), tmp_path / "images")
    milder = [", ".join(part.strip() for part in text.replace("|||", ",").split(",")) for text in captions[3::8]]
    prompts = chosen.get("samples.prompts")
    assert len(prompts) == 4 and set(prompts) < set(milder)
    again = with_own_prompts(resolve(tmp_path, "builtin", "samples.every=4", "seed=7"), tmp_path / "images")
    assert set(again.get("samples.prompts")) < set(milder)
