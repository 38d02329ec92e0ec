"""A run's files: what stands in them, written whole, and nothing hashed before it must be."""

from __future__ import annotations

import dataclasses
import hashlib
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kohaku_wrap.config import render
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.render import MissingInput, compose_run, hash_inputs
from kohaku_wrap.config.site import Site
from kohaku_wrap.config.trainer_arguments import (
    describe_accelerate,
    escape_tags,
    render_literals,
    render_network_args,
    render_prompts,
)
from kohaku_wrap.planning.step_plan import plan_steps, suppose_sizes
from kohaku_wrap.steps import StepPlan

MakeSite = Callable[..., Site]
WriteCaptions = Callable[[Path, Sequence[tuple[int, int]]], None]


@pytest.fixture
def demo(make_site: MakeSite) -> tuple[Effective, Site, StepPlan]:
    site = make_site('engine = "builtin"\ngpus = 0\nbatch_per_gpu = 2\nworkers = 2')
    effective = resolve_template("demo", site, ["samples.prompts=1girl, saber (fate)", "samples.every=4"])
    return effective, site, plan_steps(effective, suppose_sizes(146, effective))


@pytest.mark.torch
def test_files_of_a_run(demo: tuple[Effective, Site, StepPlan], tmp_path: Path) -> None:
    effective, site, plan = demo
    run = compose_run(effective, site, tmp_path / "runs" / "one", "one", plan).write()
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        "trainer.toml",
        "dataset.toml",
        "preset.toml",
        "accelerate.yaml",
        "run.lock.toml",
    }
    sections = tomllib.loads((run.folder / "trainer.toml").read_text())
    flat = {key: value for table in sections.values() for key, value in table.items()}
    assert len(flat) == sum(len(table) for table in sections.values())
    assert flat == run.trainer
    assert flat["output_dir"] == str(run.folder / "checkpoints")
    assert flat["output_name"] == "one"
    assert (flat["train_batch_size"], flat["gradient_accumulation_steps"]) == (2, 8)
    assert flat["text_encoder_lr"] == [5e-5]
    assert flat["optimizer_args"] == ["weight_decay=0.1", "betas=0.9,0.95"]
    assert f"preset={run.folder / 'preset.toml'}" in flat["network_args"]
    assert "factor=8" in flat["network_args"]
    assert "dataset_class" not in flat
    dataset = tomllib.loads((run.folder / "dataset.toml").read_text())["datasets"][0]
    assert dataset["batch_size"] == 2
    assert dataset["resolution"] == [128, 128]
    [subset] = dataset["subsets"]
    assert subset["image_dir"] == str(site.paths.images)
    assert (subset["shuffle_caption"], subset["keep_tokens_separator"]) == (True, "|||")
    assert tomllib.loads((run.folder / "preset.toml").read_text()) == effective.preset
    # kwrap draws the builtin engine's pictures from its checkpoints.
    assert not any("sample" in name for name in run.trainer)
    asked = run.lock["samples"]
    assert (asked["by"], asked["prompts"]) == ("kwrap", ["1girl, saber (fate)"])
    assert (asked["width"], asked["height"], asked["steps"], asked["every"]) == (128, 128, 7, 4)


def test_accelerate_takes_the_gpus_that_the_caller_leaves() -> None:
    """Numbers in its file would win over CUDA_VISIBLE_DEVICES; doctor tries the same file as the run."""
    assert describe_accelerate(2, 2, "bf16")["gpu_ids"] == "all"
    assert "gpu_ids" not in describe_accelerate(2, 0, "no")


@pytest.mark.torch
def test_lock_holds_every_value(demo: tuple[Effective, Site, StepPlan], tmp_path: Path) -> None:
    effective, site, plan = demo
    run = compose_run(effective, site, tmp_path / "one", "one", plan).write()
    lock = tomllib.loads((tmp_path / "one" / "run.lock.toml").read_text())
    assert lock["run"]["template"] == "demo"
    assert lock["run"]["engine"] == "builtin"
    assert lock["plan"]["total_optimizer_steps"] == plan.total_optimizer_steps
    for name in effective.table.options.keys() - effective.table.dataset_options.keys():
        default = effective.table.options[name].default
        if name not in ("network_args", "optimizer_args", "lr_scheduler_args"):
            assert lock["values"].get(name) == run.trainer.get(name, default), name
    assert lock["dataset"]["caption_tag_dropout_rate"] == 0.15
    assert lock["network_args"] == effective.subtable("network_args")
    assert lock["optimizer_args"] == {"weight_decay": 0.1, "betas": [0.9, 0.95]}
    assert lock["preset"] == effective.preset
    assert "numpy" in lock["versions"]


@pytest.mark.torch
def test_composing_hashes_nothing_and_writes_nothing(
    demo: tuple[Effective, Site, StepPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    effective, site, plan = demo

    def refuse(*_arguments: object) -> str:
        raise AssertionError("hashed")

    monkeypatch.setattr(render, "sha256_of_file", refuse)
    before = sorted(tmp_path.rglob("*"))
    run = compose_run(effective, site, tmp_path / "one", "one", plan)
    assert sorted(tmp_path.rglob("*")) == before
    assert run.lock["inputs"]["base_model"] == str(site.paths.base_model)


@pytest.mark.torch
def test_inputs_are_hashed(
    demo: tuple[Effective, Site, StepPlan], write_captions: WriteCaptions, tmp_path: Path
) -> None:
    effective, site, plan = demo
    with pytest.raises(MissingInput, match="base_model"):
        hash_inputs(effective, site)
    site.paths.base_model.parent.mkdir()
    site.paths.base_model.write_bytes(b"model")
    write_captions(site.paths.images, [(1, 1)])
    read: list[int] = []
    inputs = hash_inputs(effective, site, on_bytes=read.append)
    assert inputs["base_model_sha256"] == hashlib.sha256(b"model").hexdigest()
    assert inputs["captions_digest"] == "d" * 64 and inputs["captions_dataset"] == "demo"
    assert inputs["selection_sha256"] == "5" * 64 and inputs["prompt_format"] == "<general tags>"
    assert sum(read) == 5
    lock = compose_run(effective, site, tmp_path / "one", "one", plan, inputs).write().lock
    assert lock["inputs"]["captions_digest"] == "d" * 64


@pytest.mark.torch
def test_a_failed_write_leaves_no_lock(demo: tuple[Effective, Site, StepPlan], tmp_path: Path) -> None:
    effective, site, plan = demo
    run = compose_run(effective, site, tmp_path / "one", "one", plan)
    (tmp_path / "one" / "dataset.toml").mkdir(parents=True)
    with pytest.raises(OSError):
        dataclasses.replace(run).write()
    assert not (tmp_path / "one" / "run.lock.toml").exists()
    assert not list((tmp_path / "one").glob(".*.part"))


def test_tags_are_escaped_and_weights_kept() -> None:
    assert escape_tags("1girl, saber (fate), (azuuru:1.1)") == "1girl, saber \\(fate\\), (azuuru:1.1)"
    assert escape_tags("(saber (fate):1.2),[x]") == "(saber \\(fate\\):1.2), \\[x\\]"
    assert escape_tags("saber \\(fate\\)") == "saber \\(fate\\)"


def test_prompt_file_has_one_line_a_prompt() -> None:
    samples = {
        "prompts": ["1girl", "1boy (x)", "#compass, 1girl"],
        "negative": "low quality",
        "width": 832,
        "height": 1216,
        "steps": 28,
        "guidance": 6.5,
        "seed": 3,
    }
    assert render_prompts(samples) == (
        "1girl --n low quality --w 832 --h 1216 --s 28 --l 6.5 --d 3\n"
        "1boy \\(x\\) --n low quality --w 832 --h 1216 --s 28 --l 6.5 --d 4\n"
        " #compass, 1girl --n low quality --w 832 --h 1216 --s 28 --l 6.5 --d 5\n"
    )


def test_argument_lists() -> None:
    table = {"weight_decay": 0.1, "betas": [0.9, 0.95], "decouple": True, "mode": "max", "one": [3]}
    rendered = render_literals(table)
    assert rendered == ["weight_decay=0.1", "betas=0.9,0.95", "decouple=True", "mode='max'", "one=3,"]
    assert {name: eval(value) for name, value in (item.split("=") for item in rendered)} == {
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "decouple": True,
        "mode": "max",
        "one": (3,),
    }
    # LyCORIS takes the text "False" for decompose_both as true.
    assert render_network_args({"decompose_both": False, "train_norm": False}) == ["train_norm=False"]
