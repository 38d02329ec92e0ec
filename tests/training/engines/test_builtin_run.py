"""Whole runs of the builtin engine through `kwrap`: trained, stopped, killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import toml
from engine_world import World, await_text, flip_byte, kwrap, train_arguments
from safetensors import safe_open

from kohaku_wrap.proving.killing import Kill, train_with_kills
from kohaku_wrap.proving.likeness import Difference, compare_runs
from kohaku_wrap.training.data.run_dataset import open_run_dataset
from kohaku_wrap.training.data.run_items import DatasetChanged
from kohaku_wrap.training.records.attempts import list_attempts, read_attempt
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import RECORD
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.records.states import list_states, verify_state
from kohaku_wrap.training.supervising.ends import read_end
from kohaku_wrap.training.supervising.processes import list_processes

ROOM_BYTES = 3_300_000
"""A checkpoint has 2.2 MB, a state 3.3 MB."""


def test_a_run_trains_every_step_and_proves_it(whole: Run) -> None:
    lines = read_metrics(whole)
    assert [line["optimizer_step"] for line in lines] == list(range(1, whole.lock.total_optimizer_steps + 1))
    assert lines[0]["lr_unet"] == 0
    assert lines[-1]["lr_unet"] > lines[-1]["lr_text_encoder"] > 0
    verified = kwrap("verify", str(whole.folder), "--json")
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_the_network_is_a_kohya_lokr(whole: Run) -> None:
    with safe_open(whole.checkpoints / "whole.safetensors", framework="pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    modules = {key.partition(".")[0] for key in keys}
    assert len(modules) == 84 + 283
    assert "lora_unet_input_blocks_4_1_proj_in.lokr_w1" in keys
    assert "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha" in keys
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"])["algo"] == "lokr"
    assert len(metadata["ss_new_sd_model_hash"]) == 64
    assert metadata["sshs_model_hash"].startswith("0x")
    assert "ss_tag_frequency" not in metadata


def test_old_checkpoints_and_states_are_rotated(whole: Run) -> None:
    last = whole.lock.total_optimizer_steps
    assert [step for step, _ in list_states(whole.states)] == [last - 1, last]
    steps = sorted(path.name for path in whole.checkpoints.glob("*-step*.safetensors"))
    assert steps == [f"whole-step{step:08d}.safetensors" for step in range(last - 2, last + 1)]


def test_a_killed_run_resumes_bit_for_bit(world: World, whole: Run, tmp_path: Path) -> None:
    run = Run(world.folder / "runs" / "killed")
    train_with_kills(run, train_arguments(world.site, "killed"), (Kill(0.7),), (0, 1), tmp_path)
    likeness = compare_runs(whole, run)
    assert likeness.attempts == 2
    assert likeness.tensors > 3000


def place_in_last_record(field: str) -> int:
    """Of the field's first byte, counted from the end of a ledger file, where the record of a step comes last."""
    assert RECORD.fields is not None
    return RECORD.fields[field][1] - 2 * RECORD.itemsize


@pytest.mark.parametrize(
    ("where", "place", "words"),
    [
        ("checkpoints/whole.safetensors", -1, "1 of 1022 tensors differ"),
        ("ledger/attempt-0001-rank-000.bin", place_in_last_record("loss"), "differ in the loss"),
        ("ledger/attempt-0001-rank-000.bin", place_in_last_record("content_digest"), "differ in the content digest"),
    ],
)
def test_one_bit_is_a_difference(whole: Run, tmp_path: Path, where: str, place: int, words: str) -> None:
    shutil.copytree(whole.folder, tmp_path / "whole")
    flip_byte(tmp_path / "whole" / where, place)
    with pytest.raises(Difference, match=words):
        compare_runs(whole, Run(tmp_path / "whole"))


@pytest.mark.slow
def test_rates_are_held_against_the_schedule_of_the_lock(whole: Run, tmp_path: Path) -> None:
    """By the scheduler that the engine itself uses, in every step and group."""
    shutil.copytree(whole.folder, tmp_path / "whole")
    run = Run(tmp_path / "whole")
    lock = toml.loads(run.lock_file.read_text(encoding="utf-8"))
    for change, fault in (({"unet_lr": 3e-4}, ["rate"]), ({"lr_warmup_steps": 2}, ["rate"]), ({}, [])):
        changed = {**lock, "values": {**lock["values"], **change}}
        run.lock_file.write_text(toml.dumps(changed), encoding="utf-8")
        report = json.loads(kwrap("verify", str(run.folder), "--json").stdout)
        checks = {check["name"]: check["is_looked_at"] for check in report["checks"]}
        assert checks["rates"] and [each["kind"] for each in report["faults"]] == fault, report


def test_a_dataset_that_grew_since_the_plan_is_refused(whole: Run, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "whole")
    run = Run(tmp_path / "whole")
    lock = toml.loads(run.lock_file.read_text(encoding="utf-8"))
    lock["plan"]["batches"] -= 1
    run.lock_file.write_text(toml.dumps(lock), encoding="utf-8")
    with pytest.raises(DatasetChanged, match=f"planned for {lock['plan']['batches']}"):
        open_run_dataset(read_attempt(run, 1), None)


@pytest.mark.slow
def test_an_image_that_was_damaged_is_named_and_its_substitute_recorded(world: World, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(world.images, images)
    document = toml.loads(world.site.read_text(encoding="utf-8"))
    document["paths"] = {name: str(world.folder / place) for name, place in document["paths"].items()}
    document["paths"] |= {"images": str(images), "runs": str(tmp_path / "runs")}
    site = tmp_path / "site.toml"
    site.write_text(toml.dumps(document), encoding="utf-8")
    damaged = images / "0004" / "1004.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    failed = kwrap(*train_arguments(site, "bad", "max_train_epochs=1"))
    assert failed.returncode == 3
    assert f"{damaged}: the image cannot be read" in failed.stderr
    assert "--allow bad-images" in failed.stderr.splitlines()[-1]
    run = Run(tmp_path / "runs" / "bad")
    resumed = kwrap("resume", str(run.folder), "--allow", "bad-images")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert sum(line.get("substitutes", 0) for line in read_metrics(run)) == 1
    assert json.loads(kwrap("verify", str(run.folder), "--json").stdout)["substitutes"] == 1


@pytest.fixture
def small_disk(tmp_path: Path, mount_disk: Callable[[Path, int], None]) -> Path:
    """A disk of 48 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount_disk(folder, 48)
    return folder


@pytest.mark.slow
def test_a_full_disk_pauses_a_run_that_then_ends_as_the_whole_one(
    world: World, whole: Run, small_disk: Path, tmp_path: Path
) -> None:
    """Room is left for a checkpoint and the records, not for a state."""
    document = toml.loads(world.site.read_text(encoding="utf-8"))
    document["paths"] = {name: str(world.folder / place) for name, place in document["paths"].items()}
    document["paths"]["runs"] = str(small_disk)
    site, log = tmp_path / "site.toml", tmp_path / "kwrap.log"
    site.write_text(toml.dumps(document), encoding="utf-8")
    run, filler = Run(small_disk / "full"), small_disk / "filler"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "kohaku_wrap", *train_arguments(site, "full")]
        kwrap_process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        await_text(log, "state of optimizer step 1 saved", kwrap_process)
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - ROOM_BYTES))
        await_text(log, "the disk is full", kwrap_process)
        step, state = list_states(run.states)[-1]
        assert verify_state(state).optimizer_step == step < whole.lock.total_optimizer_steps
        filler.unlink()
        assert kwrap_process.wait(120) == 0, log.read_text()
    finally:
        kwrap_process.kill()
        kwrap_process.wait()
    assert log.read_text().count("the disk is full") == 1
    assert compare_runs(whole, run).attempts == 1


@pytest.mark.slow
def test_two_processes_join(world: World, tmp_path: Path) -> None:
    document = toml.loads(world.site.read_text(encoding="utf-8"))
    document["machine"]["processes"] = 2
    site = world.site.with_name("two.toml")
    site.write_text(toml.dumps(document), encoding="utf-8")
    result = kwrap(*train_arguments(site, "two", "max_train_epochs=1"))
    assert result.returncode == 0, result.stdout + result.stderr
    run = Run(world.folder / "runs" / "two")
    assert len(list(run.ledger.glob("*.bin"))) == 2
    assert all(line["images"] <= 4 for line in read_metrics(run))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_to_every_process_saves_a_state(world: World, tmp_path: Path, processes: int) -> None:
    # As Slurm does before a job ends, systemd when it stops a service, and a machine that shuts down.
    document = toml.loads(world.site.read_text(encoding="utf-8"))
    document["machine"] |= {"processes": processes, "workers": 2}
    site, log = world.site.with_name(f"signalled-{processes}.toml"), tmp_path / "kwrap.log"
    site.write_text(toml.dumps(document), encoding="utf-8")
    run = Run(world.folder / "runs" / f"signalled-{processes}")
    with log.open("w") as stream:
        command = [sys.executable, "-m", "kohaku_wrap", *train_arguments(site, run.name, "max_train_epochs=20")]
        kwrap_process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        await_text(log, "state of optimizer step 1 saved", kwrap_process)
        signalled = [*list_processes(run), kwrap_process.pid]
        assert len(signalled) >= 2 + 3 * processes  # supervisor, launcher, and of each rank two loader workers
        for pid in signalled:
            os.kill(pid, signal.SIGTERM)
        assert kwrap_process.wait(120) == 130
    finally:
        kwrap_process.kill()
        kwrap_process.wait()
    end = read_end(list_attempts(run)[0])
    assert end is not None and end.kind == "stopped", log.read_text()
    assert end.optimizer_step == max(step for step, _ in list_states(run.states))
    assert not list_processes(run)


def test_a_run_of_gpus_does_not_train_on_the_cpu_instead(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # A torch without CUDA, a driver that is too old, no GPU in a job: all look like this.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    document = toml.loads(world.site.read_text(encoding="utf-8"))
    document["machine"]["gpus"] = 1
    site = world.site.with_name("gpu.toml")
    site.write_text(toml.dumps(document), encoding="utf-8")
    result = kwrap(*train_arguments(site, "gpu"), "--restarts", "3")
    assert result.returncode == 1 and "torch sees 0 GPUs" in result.stderr and "gpus = 0" in result.stderr
    assert not (world.folder / "runs" / "gpu").exists(), "nothing was trained: the run is taken back"


HELD_LOADER = """
import multiprocessing

from kohaku_wrap.training.data.loader import make_loader
from kohaku_wrap.training.engines.worker import end_loader_workers

loader = make_loader([{}] * 9, list(range(9)), 2, True, 0)
next(iter(loader))
workers = multiprocessing.active_children()
end_loader_workers()
for worker in workers:
    worker.join()
"""
"""As sd-scripts ends: its accelerator still holds the loader."""


def test_loader_workers_that_heed_no_signal_keep_no_process(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", HELD_LOADER], check=True, timeout=60)


@pytest.mark.slow
def test_a_killed_rank_is_named_and_not_the_one_that_lost_it(world: World, tmp_path: Path) -> None:
    document = toml.loads(world.site.read_text(encoding="utf-8"))
    document["machine"]["processes"] = 2
    site, log = world.site.with_name("two.toml"), tmp_path / "kwrap.log"
    site.write_text(toml.dumps(document), encoding="utf-8")
    run = Run(world.folder / "runs" / "killed-rank")
    with log.open("w") as stream:
        command = [sys.executable, "-m", "kohaku_wrap", *train_arguments(site, run.name)]
        kwrap_process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        await_text(log, "state of optimizer step 1 saved", kwrap_process)
        os.kill(list_attempts(run)[0].heartbeats()[1].pid, signal.SIGKILL)
        assert kwrap_process.wait(120) == 3
    finally:
        kwrap_process.kill()
        kwrap_process.wait()
    assert "crash: rank 1: killed by SIGKILL after" in log.read_text()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("xformers=true", "xformers"),
        ("lr_scheduler=polynomial", "lr_scheduler"),
        ("mixed_precision=fp16", "needs a GPU"),
    ],
)
def test_what_it_does_not_have_is_refused_by_name(world: World, setting: str, words: str) -> None:
    result = kwrap(*train_arguments(world.site, f"refused-{words[:4]}", setting))
    assert result.returncode in (1, 2, 3)
    assert words in result.stdout + result.stderr
