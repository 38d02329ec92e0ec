"""Batches by key, in this process or in loader workers, with the errors of a worker told as they are."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.streams import seed_of
from kohaku_wrap.training.data.items import BatchKey

Example = dict[str, Any]


class DeliveredErrors(Dataset[Any]):
    """The dataset with expected errors returned instead of raised: torch would turn them into text on the way."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: BatchKey) -> Example | KwrapError:
        try:
            example: Example = self.dataset[key]
            return example
        except KwrapError as error:
            return error


def give_back(example: Any) -> Any:
    """The collation of one batch: nothing to do."""
    return example


def quieten_worker(_worker: int) -> None:
    """One thread a loader worker: the workers themselves are the parallelism. Signals to stop are the rank's alone.

    Slurm and systemd send them to every process of a job, torchrun to a rank's whole group: a rank that lost its loader
    workers could not finish its step. They end with the rank, which they look for.
    """
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def make_loader(
    dataset: Dataset[Any], sampler: Sampler[BatchKey], workers: int, persistent: bool, seed: int
) -> DataLoader[Any]:
    """A loader of whole batches; its own seed is not drawn from the global generator, which would move it."""
    return DataLoader(
        DeliveredErrors(dataset),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        collate_fn=give_back,
        persistent_workers=persistent and workers > 0,
        worker_init_fn=quieten_worker,
        generator=torch.Generator().manual_seed(seed_of("loader", seed)),
    )


def iterate_examples(loader: DataLoader[Any]) -> Iterator[Example]:
    """The loader's batches; raises the first error that a batch met."""
    for example in loader:
        if isinstance(example, KwrapError):
            raise example
        yield example
