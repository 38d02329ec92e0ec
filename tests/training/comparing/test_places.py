"""Runs, images and models that were moved: found again by digest, shown, and trained on as before."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toml
from click.testing import CliRunner
from plain_runs import make_placed_run, misbehave, train, write_base_model, write_captions

from kohaku_wrap.cli import program
from kohaku_wrap.cli.options import open_run
from kohaku_wrap.errors import UsageError
from kohaku_wrap.file_hashes import kept_sha256
from kohaku_wrap.formats.caption_rows import open_captions
from kohaku_wrap.training.comparing.places import DifferentRun, read_trainer
from kohaku_wrap.training.comparing.site_places import settle_places
from kohaku_wrap.training.data.latent_index import StoreRule
from kohaku_wrap.training.data.latent_rules import find_folder
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.networks import is_finished
from kohaku_wrap.training.starting.resume import begin_attempt, plan_resume
from kohaku_wrap.training.supervising.status import read_status
from kohaku_wrap.training.supervising.supervise import TrainerFailed
from kohaku_wrap.training.verifying.verify import verify_run

NewRun = Callable[..., Run]


def write_site(path: Path, trainer: dict[str, Any] | None = None, machine: Any = None, **paths: str) -> Path:
    """A site file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = {"engine": "builtin", "gpus": 0, "batch_per_gpu": 2, **(machine or {})}
    path.write_text(toml.dumps({"paths": paths, "machine": numbers, "trainer": trainer or {}}))
    return path


def read_files(images: Path) -> list[Path]:
    """Where the images of a folder's captions lie."""
    return [images / file for file in open_captions(images).read_all()["file"].to_pylist()]


def weights_of(run: Run) -> bytes:
    (network,) = run.networks
    return network.read_bytes()


def test_a_run_moved_and_renamed_between_kills_ends_with_the_same_bits(new_run: NewRun, tmp_path: Path) -> None:
    whole, run = make_placed_run(new_run, "whole"), make_placed_run(new_run)
    train(whole)
    misbehave(run, attempt_1={"die": "step", "at": 5}, attempt_2={"die": "step", "at": 9})
    with pytest.raises(TrainerFailed):
        train(run)
    there = tmp_path / "other disk" / "renamed"
    there.parent.mkdir()
    run.folder.rename(there)
    moved = Run(there)
    assert read_status(moved).condition == "failed"
    with pytest.raises(TrainerFailed):
        train(moved)
    again = Run(there.rename(there.with_name("renamed-again")))
    train(again)
    assert weights_of(again) == weights_of(whole)
    assert [path.name for path in again.networks] == ["first.safetensors"]
    assert is_finished(again) and read_status(again).condition == "finished"
    report = verify_run(again)
    assert report.is_proved and report.is_finished and report.attempts == 3
    assert read_trainer(again.trainer_config)["output_dir"] == str(again.checkpoints)
    final = Run(again.folder.rename(tmp_path / "archived"))
    assert read_status(final).condition == "finished" and verify_run(final).is_proved


def test_image_files_that_are_gone_are_named(new_run: NewRun, tmp_path: Path) -> None:
    run = make_placed_run(new_run, inputs={"image_files_digest": "0" * 64})
    files = read_files(tmp_path / "images")
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"picture")
    with pytest.raises(DifferentRun, match="their lengths in bytes are others"):
        plan_resume(run)
    files[7].unlink()
    with pytest.raises(DifferentRun, match=f"1 of 45 are not there: .*{files[7].name}") as refused:
        plan_resume(run)
    assert [problem.where for problem in refused.value.problems] == ["image_files"]


def test_verify_names_the_base_model_where_it_lies_now(new_run: NewRun, tmp_path: Path) -> None:
    run = make_placed_run(new_run)
    train(run)
    (tmp_path / "disk").mkdir()
    moved = (tmp_path / "base.safetensors").rename(tmp_path / "disk" / "sdxl.safetensors")
    site = write_site(tmp_path / "disk" / "site.toml", images=str(tmp_path / "images"), base_model="sdxl.safetensors")
    shown = CliRunner().invoke(program, ["verify", str(run.folder), "--site", str(site)])
    assert shown.exit_code == 0 and f"-m base={moved} " in shown.output.replace("\n", " "), shown.output


def test_a_copy_trains_into_itself(new_run: NewRun, tmp_path: Path) -> None:
    run = make_placed_run(new_run)
    misbehave(run, attempt_1={"die": "step", "at": 5})
    with pytest.raises(TrainerFailed):
        train(run)
    copy = Run(Path(shutil.copytree(run.folder, run.folder.with_name("copy"))))
    train(copy)
    assert is_finished(copy) and not is_finished(run) and not run.networks


def test_images_and_base_model_are_found_by_a_site_and_remembered(new_run: NewRun, tmp_path: Path) -> None:
    run = make_placed_run(new_run)
    misbehave(run, attempt_1={"die": "step", "at": 5}, attempt_2={"die": "step", "at": 7})
    with pytest.raises(TrainerFailed):
        train(run)
    disk = tmp_path / "disk"
    disk.mkdir()
    for file in read_files(tmp_path / "images"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"picture")
    (tmp_path / "images").rename(disk / "pictures")
    (tmp_path / "base.safetensors").rename(disk / "sdxl.safetensors")
    with pytest.raises(DifferentRun, match=r"base_model.*no such file") as refused:
        plan_resume(run)
    assert f"kwrap resume {run.folder} --site" in refused.value.next_step
    site = write_site(disk / "site.toml", images="pictures", base_model="sdxl.safetensors")
    plan = plan_resume(run, site_file=site)
    assert f"taken from {site}: images: {disk / 'pictures'}, with the same images and captions" in plan.notes
    assert f"taken from {site}: base_model: {disk / 'sdxl.safetensors'}, with the same sha256" in plan.notes
    assert any("all 45 are at" in note and "sha256 is not known" in note for note in plan.notes)
    (gone := next(iter(read_files(disk / "pictures")))).rename(disk / "gone")
    with pytest.raises(DifferentRun, match="1 of 45 are not there"):
        plan_resume(run, site_file=site)
    (disk / "gone").rename(gone)
    assert verify_run(run, site_file=site).order_checked, "a site can be named to verify before any resume"
    begin_attempt(plan)
    later = plan_resume(run)
    assert not later.differences and not [note for note in later.notes if note.startswith("taken")]
    train(run)
    assert is_finished(run) and verify_run(run).order_checked


def test_a_site_says_to_every_command_where_the_images_lie_now(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run()
    before = run.find_images()
    now = before.rename(tmp_path / "images now")
    site = tmp_path / "site.toml"
    site.write_text(f'[paths]\nimages = "{now}"\nbase_model = "m.safetensors"\nruns = "runs"\n', encoding="utf-8")
    assert open_run(str(run.folder), site).find_images() == now
    assert open_run(str(run.folder), None).find_images() == before
    other = tmp_path / "other"
    other.mkdir()
    site.write_text(site.read_text(encoding="utf-8").replace(str(now), str(other)), encoding="utf-8")
    assert open_run(str(run.folder), site).find_images() == before, "other images are none of the run's"


def test_other_images_and_models_are_not_taken(new_run: NewRun, tmp_path: Path) -> None:
    run = make_placed_run(new_run)
    write_captions(tmp_path / "disk" / "images", 45, last_tag="oldest")
    write_base_model(tmp_path / "disk" / "base.safetensors", weights="others")
    site = write_site(tmp_path / "disk" / "site.toml", images="images", base_model="base.safetensors")
    plan = plan_resume(run, site_file=site)
    told = "\n".join(plan.notes)
    assert f"not taken from {site}: images: {tmp_path / 'disk' / 'images'} has other images or captions" in told
    assert f"not taken from {site}: base_model: {tmp_path / 'disk' / 'base.safetensors'} has another sha256" in told
    begin_attempt(plan)
    assert read_trainer(run.trainer_config)["pretrained_model_name_or_path"] == str(tmp_path / "base.safetensors")
    assert "base_model" in "\n".join(plan_resume(run).notes), "said each time"


def test_numbers_of_a_site_that_keep_the_batch_are_taken(new_run: NewRun, tmp_path: Path) -> None:
    run = make_placed_run(new_run)
    machine = {"processes": 2, "workers": 3, "batch_per_gpu": 4}
    site = write_site(tmp_path / "site.toml", {"unet_lr": 0.5}, machine)
    plan = plan_resume(run, site_file=site)
    assert (plan.processes, plan.accumulation, plan.workers) == (2, 2, 3)
    told = "\n".join(plan.notes)
    assert "processes: 2, accumulation 2: still 8 images an optimizer step" in told
    assert "batch_per_gpu = 4: the run keeps 2" in told and "unet_lr = 0.5: a run keeps the options" in told
    assert plan_resume(run, processes=1, workers=0, site_file=site).processes == 1
    begin_attempt(plan)
    write_site(site, {}, machine | {"processes": 3})
    plan = plan_resume(run)
    assert (plan.processes, plan.workers) == (2, 3)
    assert any("3 processes do not divide" in note for note in plan.notes)
    (tmp_path / "none.toml").write_text("machine = 1")
    with pytest.raises(UsageError):
        plan_resume(run, site_file=tmp_path / "missing.toml")


@pytest.mark.parametrize("name", ["earlier.safetensors", "earlier [v2].safetensors"])
def test_a_network_that_is_gone_is_found_by_name_and_digest(new_run: NewRun, tmp_path: Path, name: str) -> None:
    network = tmp_path / name
    write_base_model(network, weights="network")
    locked = hashlib.sha256(kept_sha256(network).encode()).hexdigest()
    run = make_placed_run(new_run, trainer={"network_weights": str(network)}, inputs={"network_weights_sha256": locked})
    there = tmp_path / "runs" / "parent" / "checkpoints" / network.name
    there.parent.mkdir(parents=True)
    network.rename(there)
    decoy = tmp_path / network.name
    write_base_model(decoy, weights="decoy")
    decoy.rename(tmp_path / "disk.safetensors")
    site = write_site(tmp_path / "site.toml", base_model="base.safetensors")
    plan = plan_resume(run, site_file=site)
    assert f"found by its sha256: network_weights: {there}" in plan.notes
    begin_attempt(plan)
    assert read_trainer(run.trainer_config)["network_weights"] == str(there)


def test_cached_latents_are_found_by_a_site_and_remembered(new_run: NewRun, tmp_path: Path) -> None:
    run, rule = make_placed_run(new_run, inputs={"latents": str(tmp_path / "old")}), StoreRule("fp16")
    lock = toml.loads(run.lock_file.read_text())
    lock["cache"] = {"latents": True}
    run.lock_file.write_text(toml.dumps(lock))
    run, there = Run(run.folder), rule.folder_in(tmp_path / "new")
    there.mkdir(parents=True)
    site = write_site(tmp_path / "other" / "site.toml", latents=str(tmp_path / "new"))
    places = settle_places(run, site)
    assert f"taken from {site}: latents: {tmp_path / 'new'}" in places.notes
    assert find_folder(places.find_run(), rule) == there
    assert find_folder(run, rule) == rule.folder_in(tmp_path / "old")
    places.write()
    assert find_folder(run, rule) == there
    assert not any(": latents:" in note for note in settle_places(run, site).notes)
    there.rename(rule.folder_in(tmp_path))
    assert find_folder(run, rule) == rule.folder_in(tmp_path / "old")


def test_a_cache_is_copied_with_the_paths_of_today(new_run: NewRun, tmp_path: Path) -> None:
    from kohaku_wrap.config.training_data import describe_data

    images, old = tmp_path / "pictures", tmp_path / "before"
    (images / "0001").mkdir(parents=True)
    for number in (1, 2):
        (images / "0001" / f"{number}.png").write_bytes(b"x" * number)
    entries = {f"{old}/0001/{n}.png": {"caption": f"tag {n}", "resolution": [64, 64]} for n in (1, 2)}
    (images / "metadata_cache.json").write_text(json.dumps(entries))
    digests = describe_data("sd-scripts", images, {"cache_info": True})
    run = make_placed_run(new_run, inputs={**digests, "images": str(images)})
    lock = toml.loads(run.lock_file.read_text())
    lock["run"]["data"], lock["dataset"]["cache_info"] = "sd-scripts", True
    run.lock_file.write_text(toml.dumps(lock))
    dataset = {"datasets": [{"subsets": [{"image_dir": str(images), "cache_info": True}]}]}
    run.dataset_config.write_text(toml.dumps(dataset))
    away = images.rename(tmp_path / "again elsewhere")
    site = write_site(tmp_path / "site.toml", images=away.name)
    begin_attempt(plan_resume(Run(run.folder), site_file=site))
    (copy,) = run.trainer_data.rglob("metadata_cache.json")
    found = json.loads(copy.read_text())
    assert list(found) == [f"{away}/0001/{n}.png" for n in (1, 2)] and list(found.values()) == list(entries.values())
    own = toml.loads((run.trainer_data / "dataset.toml").read_text())
    assert own["datasets"][0]["subsets"][0]["image_dir"] == str(copy.parent) and copy.parent.name == away.name
    assert toml.loads(run.dataset_config.read_text())["datasets"][0]["subsets"][0]["image_dir"] == str(away)
