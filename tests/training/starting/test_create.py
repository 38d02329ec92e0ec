"""`kwrap train` up to the launch: what it prints, what it makes, what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from plain_runs import HELPERS, write_base_model, write_captions

from kohaku_wrap.cli import program
from kohaku_wrap.config import training_data
from kohaku_wrap.config.run_files import digest_lock
from kohaku_wrap.config.training_data import ImagesGone
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.caption_rows import open_captions
from kohaku_wrap.trainer import requirements
from kohaku_wrap.training.comparing.places import DifferentRun
from kohaku_wrap.training.starting import create
from kohaku_wrap.training.starting.create import RunRefused, create_run, plan_new_run, require_images
from kohaku_wrap.training.starting.resume import begin_attempt, plan_resume

SITE = """
[paths]
images = "images"
base_model = "model.safetensors"
tokenizers = "tokenizers"
[machine]
{engine}
gpus = 0
processes = {processes}
batch_per_gpu = 2
"""


BATCH = "effective_batch=4"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site with captions, and images and a base model of no use."""
    write_captions(tmp_path / "images", 30)
    put_files(tmp_path / "images", list_files(tmp_path / "images"))
    write_base_model(tmp_path / "model.safetensors")
    (tmp_path / "tokenizers").mkdir()
    return write_site(tmp_path)


def list_files(images: Path) -> list[str]:
    names: list[str] = open_captions(images).read_all()["file"].to_pylist()
    return names


def put_files(images: Path, names: Iterable[str]) -> None:
    for name in names:
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes(b"some")


def write_site(folder: Path, engine: str = 'engine = "builtin"', processes: int = 1) -> Path:
    path = folder / "site.toml"
    path.write_text(SITE.format(engine=engine, processes=processes))
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(program, [str(each) for each in arguments], standalone_mode=False)


AT_ONCE = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {room!r})
import kohaku_wrap.__main__, plain_kwrap
from kohaku_wrap.training.starting import create, resume

def wait_for_both(folder):
    Path({meeting!r}, str(os.getpid())).touch()
    while len(os.listdir({meeting!r})) < 2:
        time.sleep(0.01)

create.fsync_folder = wait_for_both
resume.begin_attempt = plain_kwrap.begin_plain_attempt
kohaku_wrap.__main__.main()
"""
"""Two processes that have both made their folder before either gives it the run's name."""


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_dry_run_prints_the_command_and_makes_nothing(site: Path) -> None:
    (site.parent / "images" / "captions.arrow").unlink()
    (site.parent / "model.safetensors").unlink()
    before = files(site.parent)
    done = subprocess.run(
        [sys.executable, "-m", "kohaku_wrap", "train", "demo", "--site", str(site), "--set", BATCH, "--dry-run"],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "3"},
    )  # fmt: skip
    assert files(site.parent) == before
    words = shlex.split(done.stdout)
    assert words[:3] == ["cd", str(site.parent / "runs" / "demo"), "&&"]
    assert "OMP_NUM_THREADS=3" in words and "HF_HUB_OFFLINE=1" in words and "LYCORIS_KERNEL_BACKEND=torch" in words
    at = words.index("launch")
    assert words[at - 1].endswith("accelerate") and words[at + 1] == "--config_file"
    assert words[words.index("-m") + 1] == "kohaku_wrap.training.engines.builtin.worker"
    assert words[-2:] == ["--gradient_accumulation_steps", "2"]
    assert f"engine: builtin ({site})" in done.stderr
    missed = f"{site.parent / 'model.safetensors'}: no such file; fix paths.base_model in {site} before you train"
    assert f"warning: {missed}" in done.stderr and "paths.images" not in done.stderr


def test_the_engine_is_never_chosen_in_silence(site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KWRAP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KWRAP_SD_SCRIPTS", raising=False)
    write_site(site.parent, engine="")
    result = call("train", "demo", "--site", site, "--dry-run")
    assert isinstance(result.exception, KwrapError)
    assert "sd-scripts (the default)" in result.exception.message
    assert "kwrap trainer install" in result.exception.next_step and "--engine builtin" in result.exception.next_step
    told = json.loads(call("train", "demo", "--site", site, "--engine", "builtin", "--dry-run", "--json").stdout)
    assert (told["engine"], told["engine_origin"]) == ("builtin", "--engine")
    assert "no such engine" in str(call("train", "demo", "--site", site, "--engine", "other", "--dry-run").exception)


def test_a_trainer_that_lacks_a_package_is_refused_before_a_run_is_made(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as torchvision: it would fail at its imports, after the base model was hashed and the run was made."""
    lacking = requirements.Requirement("no_such_module", "no-such-package", "1.2.3")
    monkeypatch.setattr(requirements, "REQUIREMENTS", ())
    monkeypatch.setattr(requirements, "torchvision_requirement", lambda: lacking)
    monkeypatch.setattr(create, "find_trainer", lambda: site.parent)
    monkeypatch.setattr(create, "find_checkout", lambda: None)
    monkeypatch.setattr(create, "require_supported", lambda checkout: checkout)
    refused = call("train", "demo", "--site", site, "--engine", "sd-scripts", "--set", BATCH).exception
    assert isinstance(refused, KwrapError) and refused.exit_code == 1
    assert "sd-scripts lacks no-such-package 1.2.3" in refused.message
    assert refused.next_step.endswith("kwrap trainer install --requirements-only")
    assert not (site.parent / "runs").exists()
    run = create_run(plan_new_run("demo", site, "first", overrides=[BATCH]), ["kwrap"])
    tables = dict(run.lock.tables)
    tables["run"]["engine"] = "sd-scripts"
    run.lock.tables["digest"] = digest_lock(tables)  # type: ignore[index]  # a dict
    with pytest.raises(requirements.MissingRequirements):
        begin_attempt(plan_resume(run))


def test_a_dry_run_reads_the_captions_as_the_training_would(site: Path) -> None:
    captions = site.parent / "images" / "captions.arrow"
    texts = captions.read_bytes()
    assert texts.count(b"tag 3 |||") == 1
    captions.write_bytes(texts.replace(b"tag 3 |||", b"tug 3 |||"))
    train = ("train", "demo", "--site", site, "--set", BATCH)
    (said,) = json.loads(call(*train, "--dry-run", "--json").stdout)["absent"]
    assert said.startswith(f"{captions}: damaged: its rows have the digest") and "kwrap caption" in said
    refused = call(*train).exception
    assert isinstance(refused, KwrapError) and refused.message in said


def test_several_processes_are_started_by_torchrun(site: Path) -> None:
    write_site(site.parent, processes=2)
    told = json.loads(call("train", "demo", "--site", site, "--set", BATCH, "--dry-run", "--json").stdout)
    argv = told["argv"]
    assert "--multi_gpu" in argv and argv[argv.index("--num_processes") + 1] == "2" and argv[-1] == "1"
    assert float(told["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 3600


def test_a_run_is_made_whole(site: Path) -> None:
    new = plan_new_run("demo", site, "first", overrides=[BATCH])
    run = create_run(new, ["kwrap", "train", "demo"])
    assert files(run.folder) >= {
        "run.lock.toml", "trainer.toml", "dataset.toml", "preset.toml", "accelerate.yaml", "command.txt",
        "attempts", "states", "checkpoints", "ledger",
    }  # fmt: skip
    assert run.lock.engine == "builtin" and run.lock.group == 2 and len(run.lock.dataset_digest) == 64
    assert str(run.folder / "checkpoints") in run.trainer_config.read_text()
    first, second = (run.folder / "command.txt").read_text().splitlines()
    assert first == "kwrap train demo" and "accelerate" in second
    plan = plan_resume(run)
    assert (plan.state, plan.start_optimizer_step, plan.processes) == (None, 0, 1), "nothing differs from the lock"


def test_images_that_are_gone_are_counted_before_a_run_is_made(site: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    files = list_files(images)
    for name in files[:3]:
        (images / name).unlink()
    (images / files[0]).symlink_to(tmp_path / "away" / "a.png")
    named = f"{images}: 3 of 30 image files are not there: {', '.join(files[:3])}"
    refused = call("train", "demo", "--site", site, "--set", BATCH).exception
    assert isinstance(refused, ImagesGone) and refused.exit_code == 1
    assert refused.message == f"{named}; the first links to {tmp_path}/away/a.png"
    assert "--allow bad-images" in refused.next_step and not (tmp_path / "runs").exists()
    for words in (("train", "demo", "--dry-run"), ("plan", "demo", "--no-modules")):
        done = call(*words, "--site", site, "--set", BATCH)
        assert done.exception is None and named in done.stderr, done.stderr
    cached = ["--set", "cache.latents=true", "--set", "dataset_options.random_crop=false"]
    refused = call("cache", "demo", "--site", site, "--set", BATCH, *cached).exception
    assert isinstance(refused, ImagesGone) and named in refused.message
    require_images(plan_new_run("demo", site, "first", overrides=[BATCH]), ["bad-images"])
    for path in images.rglob("*.png"):
        path.unlink()
    with pytest.raises(ImagesGone, match="30 of 30"):
        require_images(plan_new_run("demo", site, "first", overrides=[BATCH]), ["bad-images"])
    require_images(plan_new_run("demo", site, "first", overrides=[BATCH, "cache.latents=true"]), ())


def test_of_very_many_images_some_are_looked_for(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_data, "MOST_LENGTHS", 10)
    for path in (site.parent / "images").rglob("*.png"):
        path.unlink()
    with pytest.raises(ImagesGone, match=r"10 of 10 image files that were looked for, of 30, are not there"):
        require_images(plan_new_run("demo", site, "first", overrides=[BATCH]), ())


def test_a_cache_that_names_images_that_are_gone_is_named_too(site: Path, tmp_path: Path) -> None:
    paths = [str(tmp_path / "images" / f"{number}.png") for number in range(4)]
    cache = {path: {"caption": "a", "resolution": [64, 64]} for path in paths}
    (tmp_path / "images" / "metadata_cache.json").write_text(json.dumps(cache))
    put_files(tmp_path / "images", ["2.png"])
    settings = [BATCH, "kwrap.data=sd-scripts", "cache.text_encoders=false"]
    with pytest.raises(ImagesGone, match=r"3 of 4 image files are not there: 0\.png, 1\.png, 3\.png"):
        require_images(plan_new_run("demo", site, "first", overrides=settings), ())


def test_a_failure_while_making_it_leaves_nothing(site: Path) -> None:
    (site.parent / "model.safetensors").unlink()
    result = call("train", "demo", "--site", site, "--run", "first")
    assert isinstance(result.exception, KwrapError) and "model.safetensors" in result.exception.message
    write_base_model(site.parent / "model.safetensors")
    (site.parent / "images" / "captions.arrow").write_bytes(b"not arrow")
    result = call("train", "demo", "--site", site, "--run", "first")
    assert isinstance(result.exception, KwrapError) and "captions" in result.exception.message
    runs = site.parent / "runs"
    assert not runs.exists() or not list(runs.iterdir())


def test_a_run_that_exists_is_not_started_anew(site: Path) -> None:
    run = create_run(plan_new_run("demo", site, "first"), ["kwrap"])
    result = call("train", "demo", "--site", site, "--run", "first")
    assert isinstance(result.exception, KwrapError) and result.exception.exit_code == 2
    assert f"kwrap resume {run.folder}" in result.exception.next_step
    (run.folder.parent / "second").mkdir()
    assert "not a run" in str(call("train", "demo", "--site", site, "--run", "second").exception)
    assert "not a run's name" in str(call("train", "demo", "--site", site, "--run", "../x").exception)


def test_a_locked_run_refuses_what_differs(site: Path) -> None:
    lock = create_run(plan_new_run("demo", site, "first"), ["kwrap"]).lock_file
    same: Any = create_run(plan_new_run("demo", site, "second"), ["kwrap"], locked=lock)
    assert same.name == "second"
    result = call("train", "demo", "--site", site, "--run", "third", "--locked", lock, "--set", "unet_lr=1e-3")
    assert isinstance(result.exception, KwrapError) and "values.unet_lr" in result.exception.message
    write_base_model(site.parent / "model.safetensors", "other weights")
    result = call("train", "--site", site, "--run", "third", "--locked", lock)
    assert "inputs.base_model_sha256" in str(result.exception)
    assert not (site.parent / "runs" / "third").exists()


def test_a_file_of_the_run_that_is_damaged_is_named(site: Path) -> None:
    run = create_run(plan_new_run("demo", site, "first"), ["kwrap"])
    run.trainer_config.write_text("seed = ")
    with pytest.raises(DifferentRun, match=r"trainer\.toml"):
        plan_resume(run)
    run.lock_file.write_text("[run")
    assert "not TOML" in str(call("status", run.folder).exception)


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "what",
    [b"tag 3 |||", b"0010/10.png", struct.pack("<4q", 3, 10, 17, 24), struct.pack("<4i", 64, 96, 48, 64)],
    ids=["caption", "file", "id", "width"],
)
def test_captions_with_a_flipped_bit_are_refused_before_a_run_is_made(site: Path, what: bytes) -> None:
    captions = site.parent / "images" / "captions.arrow"
    flip_bit(captions, captions.read_bytes().index(what))
    refused = call("train", "demo", "--site", site, "--set", BATCH).exception
    assert isinstance(refused, KwrapError) and f"{captions}: damaged" in refused.message
    assert "kwrap caption" in refused.next_step
    assert not (site.parent / "runs").exists()


def test_a_base_model_that_lacks_a_tensor_is_refused_before_a_run_is_made(site: Path) -> None:
    write_base_model(site.parent / "model.safetensors", without="model.diffusion_model.out.2.bias")
    arguments = ("train", "demo", "--site", site, "--set", BATCH)
    refused = call(*arguments).exception
    assert isinstance(refused, KwrapError) and refused.exit_code == 1
    assert str(call(*arguments, "--dry-run").exception) == str(refused)
    assert "the UNet lacks 1 of 1,680 tensors (model.diffusion_model.out.2.bias)" in refused.message
    assert not (site.parent / "runs").exists()
    planned = call("plan", "demo", "--site", site, "--no-modules", "--set", BATCH).exception
    assert isinstance(planned, KwrapError) and "model.diffusion_model.out.2.bias" in planned.message


@pytest.mark.slow
def test_a_model_that_is_none_is_refused_and_the_name_stays_free(site: Path) -> None:
    """The builtin engine refuses the file before its first step: exit code 1, and no run is left."""
    result = call("train", "demo", "--site", site, "--run", "first", "--restarts", 3)
    assert isinstance(result.exception, KwrapError)
    assert result.exception.exit_code == 1, result.exception.message
    assert "model.safetensors" in result.exception.message or "tokenizer" in result.exception.message
    assert not list((site.parent / "runs").iterdir())


@pytest.mark.parametrize("text", ["step", "step=0", "walking=5", "step=x", "step=nan"])
def test_time_outs_are_checked(site: Path, text: str) -> None:
    result = call("train", "demo", "--site", site, "--timeout", text, "--dry-run")
    assert isinstance(result.exception, KwrapError) and "--timeout" in result.exception.message


def test_a_lock_without_its_template_is_named(site: Path) -> None:
    lock = site.parent / "run.lock.toml"
    lock.write_text("[run]\n")
    refused = call("train", "--site", site, "--locked", lock).exception
    assert isinstance(refused, KwrapError) and f"{lock}: [run] template is missing" in refused.message


def test_a_run_refused_at_its_start_is_taken_back(site: Path) -> None:
    with pytest.raises(RunRefused, match="refused before its first step") as refused:
        run_options = ("--set", BATCH, "--run", "refused", "--json")
        raise call("train", "demo", "--site", site, *run_options).exception or AssertionError("it was trained")
    assert "kwrap resume" not in str(refused.value) and "logs" not in str(refused.value)
    assert "Nothing of the run is kept" in refused.value.next_step
    assert not (site.parent / "runs" / "refused").exists()


def test_of_two_at_once_one_trains_and_the_other_says_why_it_does_not(site: Path, tmp_path: Path) -> None:
    (tmp_path / "meeting").mkdir()
    driver = AT_ONCE.format(room=str(HELPERS), meeting=str(tmp_path / "meeting"))
    options = ["--set", BATCH, "--set", "max_train_steps=4", "--run", "r"]
    argv = [sys.executable, "-c", driver, "train", "demo", "--site", str(site), *options]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = {process.returncode: stderr for process in both for _, stderr in [process.communicate(timeout=200)]}
    assert sorted(told) == [0, 2], told
    assert "runs/r: this run exists\nGo on with it: kwrap resume " in told[2] and "Traceback" not in told[2], told[2]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["r"]
    assert json.loads((tmp_path / "runs/r/attempts/1/end.json").read_text())["kind"] == "finished"
