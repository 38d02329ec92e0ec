"""`data = "sd-scripts"`: what the trainer reads is what the lock holds, whatever `captions.arrow` says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kohaku_wrap.training.comparing.places import DifferentRun
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.starting.create import create_run, plan_new_run
from kohaku_wrap.training.starting.resume import ResumePlan, plan_resume

pytestmark = [pytest.mark.sd_scripts, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def run(use_trainer: Any, world: Path, tmp_path: Path) -> Run:
    """A run that is about to train on its own copy of the world's images, by the trainer's own dataset."""
    folder = tmp_path / "world"
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("runs", "tars", "*.db"))
    cache = folder / "images" / "metadata_cache.json"
    cache.write_text(cache.read_text().replace(str(world), str(folder)))
    settings = ('kwrap.data="sd-scripts"', "effective_batch=4", "max_train_epochs=1")
    new = plan_new_run("demo", folder / "site.toml", "own", "sd-scripts", settings)
    return create_run(new, ["kwrap", "train"])


def images_of(run: Run) -> Path:
    return run.folder.parent.parent / "images"


def change_cache(run: Run, **values: Any) -> None:
    path = images_of(run) / "metadata_cache.json"
    entries = json.loads(path.read_text())
    first = min(entries)
    entries[first] = {**entries[first], **values}
    path.write_text(json.dumps(entries))


def change_option(run: Run, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, run.dataset_config.read_text(), flags=re.MULTILINE)
    assert count == 1
    run.dataset_config.write_text(text)


def plan(run: Run, *allow: str) -> ResumePlan:
    return plan_resume(Run(run.folder), allow=allow)


def test_an_untouched_run_goes_on(run: Run) -> None:
    found = plan(run)
    assert not found.differences and not found.notes


@pytest.mark.parametrize(
    ("keys", "change"),
    [
        ({"dataset"}, lambda run: change_cache(run, caption="zzz ||| zzz ||| zzz")),
        ({"images"}, lambda run: change_cache(run, resolution=[64, 64])),
        ({"images"}, lambda run: (images_of(run) / "metadata_cache.json").unlink()),
        ({"images"}, lambda run: (images_of(run) / "metadata_cache.json").write_text("{")),
        ({"cache_info", "images"}, lambda run: change_option(run, r"^cache_info = .*\n", "")),
        ({"caption_extension"}, lambda run: change_option(run, r"^caption_extension = .*", 'caption_extension = ".x"')),
        ({"image_files"}, lambda run: next(images_of(run).glob("*/*.webp")).write_bytes(b"other")),
    ],
)
def test_what_is_read_otherwise_is_refused_by_name(run: Run, keys: set[str], change: Callable[[Run], object]) -> None:
    change(run)
    with pytest.raises(DifferentRun) as refused:
        plan(run)
    assert {problem.where for problem in refused.value.problems} == keys, refused.value.message


def test_captions_that_nobody_reads_change_nothing(run: Run) -> None:
    (images_of(run) / "captions.arrow").write_bytes(b"other")
    assert not plan(run).differences


def test_moved_images_are_the_same(run: Run) -> None:
    there = images_of(run).rename(images_of(run).with_name("moved"))
    cache = there / "metadata_cache.json"
    cache.write_text(cache.read_text().replace(str(images_of(run)), str(there)))
    change_option(run, r'^image_dir = "(.*)/images"', r'image_dir = "\1/moved"')
    found = plan(run)
    assert not found.differences and any("image_dir was" in note for note in found.notes)
