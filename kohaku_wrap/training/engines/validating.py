"""Validation while a run trains: the loss of held-out posts, measured so that nothing of the training changes.

The same code for every engine; an engine gives `measure_posts`, with its own conditions and loss.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import distributed

from kohaku_wrap.dataset.fixed_chunks import cut_chunks, list_timesteps
from kohaku_wrap.training.data.columns import ColumnsDataset
from kohaku_wrap.training.data.torch_streams import keeping_generators
from kohaku_wrap.training.data.whole_items import load_whole
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.evaluations import Evaluation, Losses, evaluation_file, read_evaluation

MeasurePosts = Callable[[dict[str, Any], list[int], tuple[int, ...]], torch.Tensor]
"""A batch, the ids of its posts and the time steps, to the loss of each post at each step on the CPU."""

THREADS_ON_CPU = 1
"""Pinned: sums over other numbers of threads are rounded in another order."""


class Validation:
    """Which held-out posts are measured, and after which optimizer steps."""

    def __init__(self, attempt: Attempt, rank: int, device: torch.device, dataset: ColumnsDataset, dtype: str) -> None:
        held_out, lock = attempt.lock.held_out, attempt.lock
        assert held_out is not None
        table = lock.table("validation")
        self.attempt, self.rank, self.device, self.dataset = attempt, rank, device, dataset
        self.every, self.batch = int(table["every"]), int(table["batch"])
        self.posts = held_out.posts
        self.timesteps = tuple(list_timesteps(int(table["timesteps"])))
        rows = np.searchsorted(dataset.columns.ids, self.posts)
        self.chunks = cut_chunks(rows, dataset.buckets, self.batch)
        self.about = {
            "engine": lock.engine,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": dtype,
            "batch": self.batch,
            "torch": torch.__version__,
            "trainer_commit": lock.trainer_commit,
        }
        facts = [self.about, lock.options_digest, table["digest"], lock.dataset_digest, self.timesteps]
        self.key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @classmethod
    def of(
        cls, attempt: Attempt, rank: int, device: torch.device, dataset: ColumnsDataset, dtype: str
    ) -> Validation | None:
        """That of the run; None where nothing is held out."""
        return cls(attempt, rank, device, dataset, dtype) if attempt.lock.held_out is not None else None

    def is_due(self, optimizer_steps: int, is_last: bool) -> bool:
        """Whether the posts are to be measured now: at the run's start, every so many steps and at its end, once."""
        is_first = optimizer_steps == self.attempt.run.first_optimizer_step
        if not self.every or not (is_first or is_last or optimizer_steps % self.every == 0):
            return False
        with suppress(OSError, ValueError):
            kept = read_evaluation(evaluation_file(self.attempt.run, optimizer_steps))
            return bool(kept.about.get("key") != self.key)
        return True

    def measure(self, optimizer_steps: int, measure_posts: MeasurePosts, beat: Callable[[], None]) -> Evaluation:
        """Measure this rank's part of the chunks and put all parts together; every rank calls it."""
        begun, places = time.monotonic(), {row: place for place, row in enumerate(self.rows())}
        losses = np.zeros((len(self.posts), len(self.timesteps)))
        for chunk in self.chunks[self.rank :: self.attempt.processes]:
            # Every forward has the same number of rows: with another one the last bits are others.
            filled = [*chunk, *[chunk[-1]] * (self.batch - len(chunk))]
            example, unreadable = load_whole(self.dataset, filled)
            ids = [int(self.dataset.columns.ids[row]) for row in filled]
            found = measure_posts(example, ids, self.timesteps).double().numpy()
            found[unreadable] = np.nan
            losses[[places[row] for row in chunk]] = found[: len(chunk)]
            beat()
        about = {
            **self.about,
            "key": self.key,
            "attempt": self.attempt.number,
            "processes": self.attempt.processes,
            "seconds": round(time.monotonic() - begun, 3),
        }
        return Evaluation(optimizer_steps, self.posts, self.timesteps, self.join_ranks(losses), about)

    def rows(self) -> list[int]:
        """Of the posts in the dataset's columns, ascending."""
        return sorted(row for chunk in self.chunks for row in chunk)

    def join_ranks(self, losses: Losses) -> Losses:
        """The losses of all ranks: each has zeros where others measured, so that the sum rounds nothing."""
        if self.attempt.processes == 1:
            return losses
        total = torch.from_numpy(losses).to(self.device)
        distributed.all_reduce(total)
        return np.asarray(total.cpu().numpy())


@contextmanager
def leaving_no_trace(models: Iterable[torch.nn.Module], device: torch.device) -> Iterator[None]:
    """Measure in a block; random states, the mode of every module and the threads are afterwards as before."""
    threads, roots = torch.get_num_threads(), list(models)
    modes = [(module, module.training) for root in roots for module in root.modules()]
    try:
        for root in roots:
            root.eval()
        if device.type == "cpu":
            torch.set_num_threads(THREADS_ON_CPU)
        with keeping_generators(range(torch.cuda.device_count() if device.type == "cuda" else 0)), torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        for module, mode in modes:
            module.training = mode
