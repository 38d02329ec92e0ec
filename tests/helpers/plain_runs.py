"""A run that trains without models: a real folder, order, ledger, states and metrics, in milliseconds a step."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import toml

from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.file_hashes import kept_sha256
from kohaku_wrap.formats.caption_rows import read_captions_metadata
from kohaku_wrap.formats.caption_writer import ColumnsWriter
from kohaku_wrap.formats.sdxl import SDXL_SIZES, list_tensor_names
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.starting.launch import Launch
from kohaku_wrap.training.starting.resume import begin_attempt, plan_resume
from kohaku_wrap.training.supervising.supervise import RunReport, supervise_run
from kohaku_wrap.training.supervising.watch import Event, WatchOptions

HELPERS = Path(__file__).parent
WORKER = HELPERS / "plain_worker.py"
KWRAP = (sys.executable, str(HELPERS / "plain_kwrap.py"))
"""The real command, with the plain worker in place of a trainer."""

DATASET_OPTIONS = {
    "resolution": [64, 64],
    "enable_bucket": True,
    "min_bucket_reso": 32,
    "max_bucket_reso": 128,
    "bucket_reso_steps": 32,
    "batch_size": 2,
}


def write_captions(images: Path, count: int, last_tag: str = "newest") -> None:
    """The columns of `count` images of three shapes; the images themselves are not needed."""
    ids = np.arange(count, dtype=np.int64) * 7 + 3
    shapes = np.array([(64, 64), (96, 48), (48, 96)], dtype=np.int32)[ids % 3]
    files = pa.array([f"{each % 1000:04d}/{each}.png" for each in ids])
    captions = pa.array([f"1girl ||| tag {each} ||| {last_tag}" for each in ids])
    images.mkdir(parents=True, exist_ok=True)
    with (images / "captions.arrow").open("w+b") as stream, ColumnsWriter(stream, {"count": count}) as columns:
        columns.write(ids, files, shapes[:, 0], shapes[:, 1], captions)


def write_base_model(path: Path, weights: str = "weights", without: str = "") -> None:
    """A file with every tensor name of SDXL, or all but `without`, and no number in any."""
    names = [name for part in list_tensor_names(SDXL_SIZES).values() for name in part if name != without]
    spots = {name: {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for name in names}
    header = json.dumps({"__metadata__": {"weights": weights}, **spots}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def make_run(
    folder: Path, *, images: int = 45, processes: int = 1, accumulation: int = 4, epochs: int = 2, **tables: Any
) -> Run:
    """A run's folder as `kwrap train` makes it, as far as the torch-free core reads it."""
    image_folder = folder.parent.parent / "images"
    write_captions(image_folder, images)
    sizes = [((64, 64), (96, 48), (48, 96))[(each * 7 + 3) % 3] for each in range(images)]
    buckets = assign_buckets(
        [size[0] for size in sizes], [size[1] for size in sizes], BucketOptions.from_dataset_options(DATASET_OPTIONS)
    )
    batches, group = int((-(-buckets.images_of_bucket // 2)).sum()), processes * accumulation
    steps_per_epoch = -(-batches // group)
    lock: dict[str, Any] = {
        "run": {
            "name": folder.name,
            "template": "test",
            "engine": "builtin",
            "data": "kwrap",
            "seed": 31337,
            "effective_batch": group * 2,
            "batch_per_gpu": 2,
        },
        "plan": {
            "images": images,
            "batches": batches,
            "micro_batches_per_epoch": -(-batches // processes),
            "optimizer_steps_per_epoch": steps_per_epoch,
            "total_optimizer_steps": epochs * steps_per_epoch,
            "epochs": epochs,
        },
        "states": {"keep": 2, "every": 6},
        "values": {"seed": 31337, "save_every_n_steps": 2, "train_batch_size": 2},
        "dataset": {**DATASET_OPTIONS, "image_dir": str(image_folder)},
        "inputs": {"images": str(image_folder), "captions_digest": read_captions_metadata(image_folder)["digest"]},
        "machine": {"gpus": 0, "processes": processes, "workers": 0},
    }
    for name, table in tables.items():
        lock[name] = lock.get(name, {}) | table if isinstance(table, dict) else table
    for inner in ("attempts", "states", "checkpoints", "ledger"):
        (folder / inner).mkdir(parents=True)
    trainer = {"training": {"seed": 31337, "save_every_n_steps": 2, "train_batch_size": 2}}
    dataset = {
        "datasets": [
            {
                **DATASET_OPTIONS,
                "subsets": [{"image_dir": str(image_folder)}],
            }
        ]
    }
    (folder / "trainer.toml").write_text(toml.dumps(trainer), encoding="utf-8")
    (folder / "dataset.toml").write_text(toml.dumps(dataset), encoding="utf-8")
    (folder / "run.lock.toml").write_text(toml.dumps(lock), encoding="utf-8")
    return Run(folder.resolve())


def plain_launch(attempt: Attempt, launch: Launch, rank: int = 0) -> Launch:
    """The attempt's launch with the plain worker in place of accelerate and the engine."""
    return dataclasses.replace(launch, argv=(sys.executable, str(WORKER)))


def train(run: Run, restarts: int = 0, allow: tuple[str, ...] = (), **options: Any) -> tuple[RunReport, list[Event]]:
    """Supervise the run with plain workers, fast."""
    events: list[Event] = []

    def begin() -> tuple[Attempt, Launch]:
        plan = dataclasses.replace(plan_resume(run, allow=allow), bad_steps=options.get("bad_steps"))
        attempt, launch = begin_attempt(plan)
        return attempt, plain_launch(attempt, launch)

    watch = WatchOptions(restarts=restarts, first_pause_seconds=0.01, poll_seconds=0.02, **options)
    return supervise_run(run, begin, begin, watch, events.append), events


def make_placed_run(new_run: Callable[..., Run], name: str = "first", **tables: Any) -> Run:
    """A run whose files name places: its own folder, a base model, and a network to start from."""
    folder = new_run(name).folder
    run = Run(folder)
    base = folder.parent.parent / "base.safetensors"
    write_base_model(base)
    options = {"output_dir": str(run.checkpoints), "output_name": name, "pretrained_model_name_or_path": str(base)}
    document = toml.loads(run.trainer_config.read_text())
    document["model"] = options | tables.pop("trainer", {})
    run.trainer_config.write_text(toml.dumps(document))
    lock = toml.loads(run.lock_file.read_text())
    lock["values"] |= document["model"]
    lock["inputs"] |= {"base_model": str(base), "base_model_sha256": kept_sha256(base), **tables.pop("inputs", {})}
    run.lock_file.write_text(toml.dumps(lock))
    return Run(folder)


def misbehave(run: Run, **by_attempt: dict[str, Any]) -> None:
    """Tell the plain worker what to do in `attempt_1`, `attempt_2`, …, or in `every` attempt."""
    (run.folder / "misbehave.json").write_text(json.dumps(by_attempt), encoding="utf-8")
