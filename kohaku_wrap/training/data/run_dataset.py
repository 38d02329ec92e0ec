"""The dataset of a run, opened for one attempt from the run's folder, and only if it is still the planned one."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.training.data.columns import ColumnsDataset, Tokenize
from kohaku_wrap.training.data.items import ItemOptions, read_dataset_options
from kohaku_wrap.training.data.latent_rules import open_latents, open_texts, require_same
from kohaku_wrap.training.data.run_items import check_batches
from kohaku_wrap.training.records.attempts import Attempt


def open_run_dataset(attempt: Attempt, tokenize: Tokenize | None) -> tuple[ColumnsDataset, Mapping[str, Any]]:
    """The images and captions set to start where the attempt does, and the options of its dataset.toml.

    Raises NoImages, ProblemsFound for options that this dataset lacks, DatasetChanged, NoLatents and OtherLatents.
    """
    lock = attempt.lock
    options = read_dataset_options(tomllib.loads(attempt.run.dataset_config.read_text(encoding="utf-8")))
    dataset = ColumnsDataset(
        Columns.open(Path(options["image_dir"]), lock.dataset_digest),
        ItemOptions.from_dataset_options(options, lock.joins_by_separator),
        lock.batch_per_gpu,
        lock.seed,
        lock.group,
        tokenize,
        substitute_bad_images="bad-images" in attempt.allow,
        start=(attempt.start.epoch, attempt.start.global_position),
        latents=open_latents(attempt.run),
        texts=open_texts(attempt.run),
        held_out=lock.held_out,
    )
    check_batches(dataset, lock)
    for store in (dataset.latents, dataset.texts):
        if store is not None:
            require_same(store, dataset.columns.ids, lock)
    return dataset, options
