"""The real trainer on a tiny SDXL: killed, resumed, the same to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
from safetensors import safe_open

from kohaku_wrap.proving.likeness import compare_runs
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.metrics import read_metrics


def copy_run(run: Run, name: str) -> Run:
    """A second run of another name with the same files, as if it had been trained there."""
    folder = run.folder.with_name(name)
    shutil.copytree(run.folder, folder)
    for path in [*folder.glob("*.toml")]:
        path.write_text(path.read_text().replace(str(run.folder), str(folder)).replace(f'"{run.name}"', f'"{name}"'))
    for path in (folder / "checkpoints").glob(f"{run.name}*"):
        path.rename(path.with_name(name + path.name.removeprefix(run.name)))
    return Run(folder)


@pytest.mark.sd_scripts
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_resumed_run_ends_as_the_whole_one(use_trainer: Any, kwrap: Callable[..., str], whole: Run) -> None:
    """Accumulation that does not divide the batches, second epoch, other loader workers, Lion8bit, both encoders."""
    steps, per_epoch = whole.lock.total_optimizer_steps, whole.lock.count.optimizer_steps_per_epoch
    resume_at = per_epoch + 1
    assert resume_at < steps
    assert whole.lock.values["optimizer_type"] == "Lion8bit"
    assert whole.lock.batches % whole.lock.group

    resumed = copy_run(whole, "resumed")
    kwrap("resume", str(resumed.folder), "--step", str(resume_at), "--workers", "0")
    likeness = compare_runs(whole, resumed)
    assert likeness.optimizer_steps == steps
    assert likeness.attempts == 2
    assert likeness.repeated == (steps - resume_at) * whole.lock.group
    assert {line["skipped_images_loaded"] for line in read_metrics(resumed)} == {0}

    with safe_open(resumed.checkpoints / "resumed.safetensors", "np") as network:
        metadata, names = network.metadata(), list(network.keys())
    assert metadata["ss_tag_frequency"] == "{}"
    assert metadata["kwrap_captions_digest"]
    assert any(name.startswith("lora_te1") for name in names)
    assert any(name.startswith("lora_unet") for name in names)
