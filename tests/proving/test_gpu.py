"""`make gpu` without a GPU: the same program on the tiny model, so that it is whole on the day a GPU is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kohaku_wrap.config.base_model import check_base_model
from kohaku_wrap.demo.base_model import load_description
from kohaku_wrap.formats.safetensors import read_header
from kohaku_wrap.proving.gpu import list_missing
from kohaku_wrap.proving.gpu_report import BEGIN, END, Measure, NoPlaceForReport, Report, fill_document
from kohaku_wrap.proving.gpu_runs import SCALES, Workplace, write_random_sdxl
from kohaku_wrap.proving.step_clock import StepClock
from kohaku_wrap.trainer.installed import find_trainer


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_command_on_a_cpu(tmp_path: Path) -> None:
    """With the real trainer where a checkout is installed, else with the builtin engine."""
    pytest.importorskip("torch", reason="it trains")
    engine = "sd-scripts" if find_trainer() else "builtin"
    command = [sys.executable, "-m", "kohaku_wrap.proving.gpu", "--folder", str(tmp_path), "--engine", engine]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu-report.json").read_text())
    found = {each["name"]: each for each in report["measures"]}
    assert report["ok"] and report["scale"] == "tiny" and report["engine"] == engine
    assert found["modules trained"]["numbers"]["modules"] > 100
    assert found["seconds a step"]["numbers"]["with_kwrap_seconds"] > 0
    assert found["host memory"]["numbers"]["peak_bytes"] > 10**8
    assert found["default kernels, two equal runs"]["numbers"]["identical"]
    skipped = found["steps skipped by the scaler, SIGKILL, resume, deterministic kernels"]["numbers"]
    assert skipped["identical"] and 0 < skipped["skipped_optimizer_steps"] <= 4
    if engine == "sd-scripts":
        assert found["seconds a step"]["numbers"]["without_kwrap_seconds"] > 0
    assert "Not measured: " in done.stdout and "this machine has no GPU" in done.stdout
    assert "two ranks over NCCL" in report["not_measured"]
    assert len(report["not_measured"]) >= 5
    table = (tmp_path / "gpu-report.md").read_text()
    assert "measure no GPU" in table and "| seconds a step |" in table


def test_what_a_machine_cannot_measure_is_named(tmp_path: Path) -> None:
    def names(scale: str, gpus: int) -> list[str]:
        missing = list(list_missing(Workplace(tmp_path, "builtin", SCALES[scale], gpus)))
        assert all(each.status == "not measured" and each.result for each in missing)
        return [each.name for each in missing]

    assert len(names("tiny", 0)) == 5
    assert names("full", 2) == []
    assert names("full", 1) == ["two ranks over NCCL"]
    assert names("tiny", 2) == ["full-size SDXL with the Epsilon preset"]


def test_the_report_stands_between_its_marks(tmp_path: Path) -> None:
    document = tmp_path / "measurements.md"
    measures = (
        Measure("seconds a step", "failed", "1.1 with, 1.0 without", "2 % overhead", {"overhead": 0.1}),
        Measure("two ranks over NCCL", "not measured", "it needs two GPUs, here: 1"),
    )
    report = Report("full", "sd-scripts", {"gpus": [{"name": "A"}], "versions": {"torch": "2.13.0"}}, measures)
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        fill_document(document, report)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert text.count(BEGIN) == 1 and "| seconds a step | **failed**: 1.1 with" in text
    assert "- two ranks over NCCL: it needs two GPUs, here: 1" in text
    assert not report.as_json()["ok"] and report.as_json()["not_measured"] == ["two ranks over NCCL"]
    document.write_text("nothing\n")
    with pytest.raises(NoPlaceForReport, match="has no place"):
        fill_document(document, report)


def test_the_shipped_document_has_the_place(tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "docs" / "measurements.md"
    copy = tmp_path / "copy.md"
    copy.write_text(shipped.read_text())
    fill_document(copy, Report("full", "builtin", {}, ()))
    assert copy.read_text() != shipped.read_text()


@pytest.mark.slow
def test_a_model_of_random_weights_is_whole(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the shapes are those of its models")
    sizes = load_description()["config"]
    path = tmp_path / "model.safetensors"
    write_random_sdxl(path, sizes)
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    check_base_model(path)
    described = {name: tuple(shape) for name, shape in load_description()["tensors"].items()}
    assert {name: spot.shape for name, spot in read_header(path).tensors.items()} == described
    written = path.stat().st_mtime_ns
    write_random_sdxl(path, sizes)
    assert path.stat().st_mtime_ns == written, "what is there is kept"


def test_steps_are_seen_in_a_log_that_grows(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with StepClock(log, lambda: [os.getpid()], on_gpu=False) as clock:
        with log.open("ab", buffering=0) as stream:
            stream.write(b"\r100%| | 4/4 [00:00<00:00, 900it/s]\n")
            for step in range(6):
                stream.write(b"\rsteps:  1%%| | %d" % step)
                time.sleep(0.05)
                stream.write(b"/6 [00:01<00:09, avr_loss=0.1]")
        deadline = time.monotonic() + 30
        while len(clock.ended_at) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        while not clock.peak_bytes and time.monotonic() < deadline:
            time.sleep(0.01)
    assert sorted(clock.ended_at) == list(range(6))
    assert list(clock.ended_at.values()) == sorted(clock.ended_at.values()), "the bar of images counts no steps"
    assert len(clock.step_seconds) == 3 and min(clock.step_seconds) > 0
    assert clock.peak_bytes > 10**6
