"""A merge plan carried out: workers read, compute and write at fixed places of one new file."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kohaku_wrap.errors import Problem
from kohaku_wrap.files import Progress
from kohaku_wrap.formats.safetensors import encode_header
from kohaku_wrap.merging.networks.files import raise_problems
from kohaku_wrap.merging.open_files import Files, check_output, new_file, write_at
from kohaku_wrap.merging.pieces import KeyFinder, Task, cut_pieces, list_tasks
from kohaku_wrap.merging.plan import MergePlan
from kohaku_wrap.merging.verifying import verify_elements_of
from kohaku_wrap.merging.worker import Faults, Worker
from kohaku_wrap.processes import count_cores

POLL_SECONDS = 0.1
write_out = getattr(os, "fdatasync", os.fsync)


class Pool:
    """Threads that take tasks in turn until none is left, one fails, or the main thread is interrupted."""

    def __init__(self, tasks: Iterator[Task]) -> None:
        self.tasks = tasks
        self.lock = threading.Lock()
        self.stopped = False
        self.done_bytes = 0

    def work(self, worker: Worker, descriptor: int, data_start: int) -> None:
        while not self.stopped:
            with self.lock:
                task = next(self.tasks, None)
            if task is None:
                return
            worker.do(task, descriptor, data_start)
            with self.lock:
                self.done_bytes += (task.last - task.first) * task.piece.width

    def run(
        self, workers: list[Worker], descriptor: int, data_start: int, size_bytes: int, on_progress: Progress
    ) -> None:
        """Run to the end; an error of a worker is raised here. No thread works on when this returns or raises.

        Meanwhile this thread has the disk write what is there already, so that little is left for the end.
        """
        with ThreadPoolExecutor(len(workers)) as executor:
            try:
                pending = {executor.submit(self.work, worker, descriptor, data_start) for worker in workers}
                while pending:
                    done, pending = wait(pending, POLL_SECONDS, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    on_progress(self.done_bytes, size_bytes)
                    write_out(descriptor)
            finally:
                self.stopped = True


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote."""

    output: Path
    """The new file."""

    size_bytes: int
    """Its size, the header included."""

    faults: Faults
    """Elements that are not finite, where that was allowed."""

    verified: int
    """Elements that were computed again in rationals; 0 if that was not asked for."""

    unverified: int
    """Elements drawn for that, but set by DoRA or by functions, which are not rational arithmetic."""


def run_merge(
    plan: MergePlan,
    output: Path,
    metadata: Mapping[str, str],
    threads: int = 0,
    verify_elements: int = 0,
    on_progress: Progress = lambda done, total: None,
) -> MergeResult:
    """Write the merge to `output`: whole, checked and on disk, or not at all.

    The bytes do not depend on `threads` (0: one for each processor). `on_progress` is told bytes of the output, those
    that are verified a second time.
    Raises BadOutput, ProblemsFound for non-finite elements that are not allowed, or MismatchFound.
    """
    check_output(output, plan.headers)
    start = encode_header({tensor.key: tensor.spot for tensor in plan.tensors}, metadata)
    size_bytes = len(start) + plan.data_bytes
    pieces = cut_pieces(plan)
    faults = Faults()
    files = Files(plan.headers)
    try:
        with new_file(output, size_bytes) as descriptor:
            write_at(descriptor, np.frombuffer(start, dtype=np.uint8), 0)
            os.posix_fallocate(descriptor, 0, size_bytes)  # writes then take a third less time
            workers = make_workers(plan, files, faults, threads, len(pieces))
            total_bytes = plan.data_bytes * (2 if verify_elements else 1)
            Pool(list_tasks(pieces)).run(workers, descriptor, len(start), total_bytes, on_progress)
            raise_faults(plan, faults)
            verified = unverified = 0
            if verify_elements:
                verified, unverified = verify_elements_of(
                    workers[0],
                    pieces,
                    descriptor,
                    len(start),
                    verify_elements,
                    lambda done: on_progress(plan.data_bytes + done, total_bytes),
                )
    finally:
        files.close()
    return MergeResult(output, size_bytes, faults, verified, unverified)


def make_workers(plan: MergePlan, files: Files, faults: Faults, threads: int, pieces: int) -> list[Worker]:
    """As many as there are threads, or as there is work for."""
    lock, finder = threading.Lock(), KeyFinder(plan)
    count = min(threads or count_cores(), max(1, pieces * 64))
    return [Worker(plan, files, finder, faults, lock) for _ in range(count)]


def merge_in_memory(plan: MergePlan, threads: int = 0) -> NDArray[np.uint8]:
    """The data of the merge, byte for byte as `run_merge` writes it, in memory and in no file.

    Raises ProblemsFound for non-finite elements that are not allowed.
    """
    pieces, faults = cut_pieces(plan), Faults()
    descriptor = os.memfd_create("kwrap-merge", os.MFD_CLOEXEC)
    files = Files(plan.headers)
    try:
        os.ftruncate(descriptor, plan.data_bytes)
        workers = make_workers(plan, files, faults, threads, len(pieces))
        Pool(list_tasks(pieces)).run(workers, descriptor, 0, plan.data_bytes, lambda done, total: None)
        raise_faults(
            plan,
            faults,
            f"{' + '.join(header.path.name for header in files.headers.values())} is not finite",
            "Draw with one network at a time to find the file at fault, or give it a smaller weight.",
        )
        return np.frombuffer(mmap.mmap(descriptor, plan.data_bytes), dtype=np.uint8)
    finally:
        files.close()
        os.close(descriptor)


def raise_faults(
    plan: MergePlan,
    faults: Faults,
    headline: str = "the merge is not finite; nothing was written",
    next_step: str = "`--non-finite keep` and `--overflow keep` write them as they are; `--dtype fp32` holds larger "
    "numbers.",
) -> None:
    """Raise ProblemsFound for what the options do not allow."""
    problems = []
    if plan.options.non_finite == "fail":
        problems += [
            Problem(key, f"{count} numbers of the inputs are infinite or NaN") for key, count in faults.inputs.items()
        ]
    if plan.options.overflow == "fail":
        problems += [
            Problem(key, f"{count} results are too large for the output's type")
            for key, count in faults.overflows.items()
        ]
    raise_problems(headline, problems, next_step)
