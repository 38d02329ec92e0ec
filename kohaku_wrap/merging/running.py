"""A merge plan carried out: workers read, compute and write at fixed places of one new file."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kohaku_wrap.errors import Problem
from kohaku_wrap.files import Progress
from kohaku_wrap.formats.safetensors import BITS_OF_DTYPE, encode_header
from kohaku_wrap.merging.deltas import Delta
from kohaku_wrap.merging.kernels import BITS_DTYPES, Kernel, Scratch, as_numbers
from kohaku_wrap.merging.networks import Change, raise_problems
from kohaku_wrap.merging.open_files import Files, check_output, new_file, reserve_space, write_at
from kohaku_wrap.merging.pieces import CHUNK_ELEMENTS, RAW, KeyFinder, Piece, Task, cut_pieces, list_tasks
from kohaku_wrap.merging.plan import MergePlan
from kohaku_wrap.merging.rounding import FORMATS, Combination

POLL_SECONDS = 0.1
write_out = getattr(os, "fdatasync", os.fsync)
NUMPY_DTYPES = {"F64": np.float64, "I64": np.int64, "I32": np.int32}
BYTES_OF_KIND = {name: BITS_OF_DTYPE[name] // 8 for name in (*FORMATS, RAW)}


@dataclass
class Faults:
    """Elements that are not finite, by key."""

    inputs: Counter[str] = field(default_factory=Counter)
    """Because an input is not."""

    overflows: Counter[str] = field(default_factory=Counter)
    """Because the exact sum is too large for the output's type."""


class Worker:
    """One thread's buffers, and what it does with a task."""

    def __init__(self, plan: MergePlan, files: Files, finder: KeyFinder, faults: Faults, lock: threading.Lock) -> None:
        self.plan, self.files, self.finder, self.faults, self.lock = plan, files, finder, faults, lock
        self.scratch = Scratch()
        self.kernels: dict[Any, Kernel] = {}

    def do(self, task: Task, descriptor: int, data_start: int) -> None:
        """Compute a task and write it."""
        if task.piece.deltas:
            blocks = self.compute_with_deltas(task.piece)
        else:
            blocks = iter([(task.first, self.compute(task.piece, task.first, task.last, []))])
        for first, output in blocks:
            write_at(descriptor, output, data_start + task.piece.begin + first * task.piece.width)

    def compute(self, piece: Piece, first: int, last: int, deltas: list[Delta], to: str = "") -> NDArray[Any]:
        """Elements `first` to `last` of a piece, as bits in a buffer that the next call reuses.

        With `deltas`, those are whole rows.
        """
        size = last - first
        if piece.to == RAW:
            output = self.scratch.take("output", np.uint8, size)
            self.files.read(piece.sources[0].name, piece.sources[0].begin + first, output)
            return output
        row_elements = piece.elements // piece.rows
        first_row, last_row = first // row_elements, last // row_elements
        weights = tuple(weight for _, weight, _ in piece.deltas[: len(deltas)])
        # One product is made as it is added, and comes last.
        lazy = next((place for place, delta in enumerate(deltas) if delta.is_product), None)
        product = None
        if lazy is not None:
            product = deltas[lazy].factor_rows(first_row, last_row)
            deltas = deltas[:lazy] + deltas[lazy + 1 :]
            weights = (*weights[:lazy], *weights[lazy + 1 :], weights[lazy])
        kinds = tuple(source.kind for source in piece.sources) + ("F32",) * len(weights)
        to = to or piece.to
        kernel = self.kernel(kinds, piece.coefficients + weights, to, product is not None)
        inputs = kernel.take_inputs(size, self.scratch, product)
        for source, row in zip(piece.sources, inputs.rows, strict=False):
            self.files.read(source.name, source.begin + first * BYTES_OF_KIND[source.kind], row)
        for delta, row in zip(deltas, inputs.rows[len(piece.sources) :], strict=True):
            delta.fill_rows(first_row, last_row, row.view(np.float32))
        output = self.scratch.take("output", BITS_DTYPES[BYTES_OF_KIND[to]], size)
        not_finite, overflow = kernel.run(inputs, output, self.scratch)
        self.count(self.faults.inputs, piece, first, not_finite)
        self.count(self.faults.overflows, piece, first, overflow)
        return output

    def kernel(self, kinds: tuple[str, ...], weights: tuple[Any, ...], to: str, has_product: bool = False) -> Kernel:
        settings = kinds, weights, to, has_product
        known = self.kernels.get(settings)
        if known is None:
            known = self.kernels[settings] = Kernel(kinds, Combination.of(weights), to, has_product)
        return known

    def count(self, counter: Counter[str], piece: Piece, first: int, places: NDArray[Any]) -> None:
        if places.size:
            keys = Counter(self.finder.key_at(piece.begin + (first + int(place)) * piece.width) for place in places)
            with self.lock:
                counter.update(keys)

    def read_module(self, network: str, change: Change) -> dict[str, NDArray[np.float32]]:
        """A module's tensors in float32."""
        tensors = {}
        for suffix, spot in change.module.tensors.items():
            kind = FORMATS.get(spot.dtype)
            if kind is None:  # an alpha
                number = np.empty(1, dtype=NUMPY_DTYPES[spot.dtype])
                self.files.read(network, spot.begin, number)
                tensors[suffix] = number.astype(np.float32)
                continue
            bits = np.empty(spot.elements, dtype=BITS_DTYPES[kind.size_bytes])
            self.files.read(network, spot.begin, bits)
            tensors[suffix] = as_numbers(bits, kind).reshape(spot.shape)
        return tensors

    def open_delta(self, network: str, change: Change) -> Delta:
        """What a module adds, from its tensors in the network's file."""
        return Delta(change.module.algorithm, change.kind, self.read_module(network, change))

    def compute_with_deltas(self, piece: Piece) -> Iterator[tuple[int, NDArray[Any]]]:
        """A piece that networks change, by blocks of rows: the first element and the bits of each."""
        deltas = [self.open_delta(name, change) for name, _, change in piece.deltas]
        if any(change.module.has_dora and change.kind == "weight" for _, _, change in piece.deltas):
            yield from self.compute_dora(piece, deltas[0])
            return
        row_elements = piece.elements // piece.rows
        step = max(1, CHUNK_ELEMENTS // row_elements)
        first = 0
        while first < piece.rows:
            last = min(first + step, piece.rows)
            for delta in deltas:
                if delta.period:
                    last = min(last, (first // delta.period + 1) * delta.period)
            yield first * row_elements, self.compute(piece, first * row_elements, last * row_elements, deltas)
            first = last

    def compute_dora(self, piece: Piece, delta: Delta) -> Iterator[tuple[int, NDArray[Any]]]:
        """A weight whose norms the network sets: float32 arithmetic, rounded once more to the output.

        By blocks of rows where each row has its norm, else in one.
        """
        _, weight, _ = piece.deltas[0]
        row_elements = piece.elements // piece.rows
        step = max(1, CHUNK_ELEMENTS // row_elements) if delta.sets_norms_of_rows(piece.rows) else piece.rows
        kernel = self.kernel(("F32",), (Fraction(1),), piece.to)
        for first_row in range(0, piece.rows, step):
            rows = min(step, piece.rows - first_row)
            first, size = first_row * row_elements, rows * row_elements
            base = self.compute(piece, first, first + size, [], "F32").view(np.float32)
            merged = delta.decompose(base.reshape(rows, *piece.shape[1:]), piece.rows, first_row, float(weight))
            inputs = kernel.take_inputs(size, self.scratch)
            np.copyto(inputs.rows[0], merged.view(np.uint32))
            output = self.scratch.take("output", BITS_DTYPES[BYTES_OF_KIND[piece.to]], size)
            for places in kernel.run(inputs, output, self.scratch):
                self.count(self.faults.overflows, piece, first, places)
            yield first, output


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
    """Elements drawn for that, but set by DoRA, which is not rational arithmetic."""


def count_threads() -> int:
    """As many threads as processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    from kohaku_wrap.merging.verifying import verify_elements_of

    headers = {**plan.files, **plan.networks}
    check_output(output, {name: header.path for name, header in headers.items()})
    start = encode_header({tensor.key: tensor.spot for tensor in plan.tensors}, metadata)
    size_bytes = len(start) + plan.data_bytes
    pieces = cut_pieces(plan)
    faults, lock, finder = Faults(), threading.Lock(), KeyFinder(plan)
    files = Files(headers)
    try:
        with new_file(output, size_bytes) as descriptor:
            write_at(descriptor, np.frombuffer(start, dtype=np.uint8), 0)
            reserve_space(descriptor, size_bytes)
            count = min(threads or count_threads(), max(1, len(pieces) * 64))
            workers = [Worker(plan, files, finder, faults, lock) for _ in range(count)]
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


def raise_faults(plan: MergePlan, faults: Faults) -> None:
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
    options = "`--non-finite keep` and `--overflow keep` write them as they are; `--dtype fp32` holds larger numbers."
    raise_problems("the merge is not finite; nothing was written", problems, options)
