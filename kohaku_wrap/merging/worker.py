"""One thread of a merge: it reads pieces of the inputs, computes them and writes them at fixed places."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kohaku_wrap.formats.safetensors import BITS_OF_DTYPE
from kohaku_wrap.merging.arithmetic.deltas import Delta
from kohaku_wrap.merging.arithmetic.functions import TensorFunctions
from kohaku_wrap.merging.arithmetic.kernels import BITS_DTYPES, Kernel, Scratch, as_bits, as_numbers, widen_bytes
from kohaku_wrap.merging.arithmetic.rounding import FORMATS, Combination, round_array
from kohaku_wrap.merging.formula.calls import WeightedSum
from kohaku_wrap.merging.networks.files import Change
from kohaku_wrap.merging.open_files import Files, write_at
from kohaku_wrap.merging.pieces import CHUNK_ELEMENTS, RAW, KeyFinder, Piece, Source, Task, list_chunks
from kohaku_wrap.merging.plan import MergePlan

NUMPY_DTYPES = {"I64": np.int64, "I32": np.int32}
BYTES_OF_KIND = {name: BITS_OF_DTYPE[name] // 8 for name in (*FORMATS, RAW)}


def computed_kind(kind: str) -> str:
    """The type that a source's numbers have in memory: float8 is read as float16."""
    return "F16" if BYTES_OF_KIND[kind] == 1 else kind


def make_kernel(kinds: tuple[str, ...], weights: tuple[Any, ...], to: str, has_product: bool = False) -> Kernel:
    return Kernel(kinds, Combination.of(weights), to, has_product)


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
        self.kernel = cache(make_kernel)
        self.functions: TensorFunctions | None = None

    def do(self, task: Task, descriptor: int, data_start: int) -> None:
        """Compute a task and write it."""
        if task.piece.deltas or task.piece.terms:
            blocks = self.compute_whole(task.piece)
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
        if piece.terms:
            return self.compute_functions(piece, piece.terms, first, last, deltas, to or piece.to)
        first_row, last_row = first // piece.row_elements, last // piece.row_elements
        weights = tuple(weight for _, weight, _ in piece.deltas[: len(deltas)])
        # One product is made as it is added, and comes last.
        lazy = next((place for place, delta in enumerate(deltas) if delta.is_product), None)
        product = None
        if lazy is not None:
            product = deltas[lazy].factor_rows(first_row, last_row)
            deltas = deltas[:lazy] + deltas[lazy + 1 :]
            weights = (*weights[:lazy], *weights[lazy + 1 :], weights[lazy])
        kinds = tuple(computed_kind(source.kind) for source in piece.sources) + ("F32",) * len(weights)
        to = to or piece.to
        kernel = self.kernel(kinds, piece.coefficients + weights, to, product is not None)
        inputs = kernel.take_inputs(size, self.scratch, product)
        for source, row in zip(piece.sources, inputs.rows, strict=False):
            self.read_source(piece, source, first, row)
        for delta, row in zip(deltas, inputs.rows[len(piece.sources) :], strict=True):
            delta.fill_rows(first_row, last_row, row.view(np.float32))
        output = self.scratch.take("output", BITS_DTYPES[BYTES_OF_KIND[to]], size)
        not_finite, overflow = kernel.run(inputs, output, self.scratch)
        self.count(self.faults.inputs, piece, first, not_finite)
        self.count(self.faults.overflows, piece, first, overflow)
        return output

    def compute_functions(
        self, piece: Piece, terms: WeightedSum, first: int, last: int, deltas: list[Delta], to: str
    ) -> NDArray[Any]:
        """As compute, for a sum with functions: in float64, rounded once; `first` and `last` are of whole rows."""
        if self.functions is None or self.functions.pieces is not piece.peers:
            key = self.finder.key_at(piece.begin)
            self.functions = TensorFunctions(key, piece.peers, self.read_numbers)
        chunk = self.functions.chunk(piece, first, last)
        total = self.functions.sum(terms, chunk)
        for (_, weight, _), delta in zip(piece.deltas, deltas, strict=False):
            total += float(weight) * delta.compute_rows(first // piece.row_elements, last // piece.row_elements).ravel()
        bad_inputs = np.zeros(total.size, dtype=bool)
        for numbers in chunk.numbers.values():
            bad_inputs |= ~np.isfinite(numbers)
        rounded = total if to == "F64" else round_array(total, FORMATS[to])
        self.count(self.faults.inputs, piece, first, np.flatnonzero(bad_inputs))
        self.count(self.faults.overflows, piece, first, np.flatnonzero(~np.isfinite(rounded) & ~bad_inputs))
        return as_bits(rounded, FORMATS[to])

    def read_numbers(self, piece: Piece, first: int, last: int) -> dict[str, NDArray[Any]]:
        """What the checkpoints of a piece hold there, by name."""
        numbers = {}
        for source in piece.sources:
            kind = FORMATS[computed_kind(source.kind)]
            bits = np.empty(last - first, dtype=BITS_DTYPES[kind.size_bytes])
            self.read_source(piece, source, first, bits)
            numbers[source.name] = as_numbers(bits, kind)
        return numbers

    def read_source(self, piece: Piece, source: Source, first: int, row: NDArray[Any]) -> None:
        """Fill `row`, bits of its type or of float16 for float8, from element `first` of a piece on."""
        width = BYTES_OF_KIND[source.kind]
        if width > 1 and not source.columns:
            self.files.read(source.name, source.begin + first * width, row)
            return
        # A transposed matrix is read whole.
        begin, count = (0, piece.elements) if source.columns else (first, row.size)
        bits = self.scratch.take("source", BITS_DTYPES[width], count)
        self.files.read(source.name, source.begin + begin * width, bits)
        if source.columns:
            bits = bits.reshape(-1, source.columns).T.reshape(-1)[first : first + row.size]
        np.copyto(row, widen_bytes(bits, FORMATS[source.kind]) if width == 1 else bits)

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
            tensors[suffix] = as_numbers(bits, kind).astype(np.float32).reshape(spot.shape)
        return tensors

    def open_delta(self, network: str, change: Change) -> Delta:
        """What a module adds, from its tensors in the network's file."""
        arrays = self.read_module(network, change)
        delta = Delta(change.module.algorithm, change.kind, arrays)
        if not change.target.is_transposed:
            return delta
        norms = {name: np.atleast_2d(arrays[name].T) for name in ("dora_scale",) if name in arrays}
        return Delta("full", "weight", {"diff": delta.compute_rows(0, delta.shape[0]).T, **norms})

    def compute_whole(self, piece: Piece) -> Iterator[tuple[int, NDArray[Any]]]:
        """A whole piece, by chunks, of rows where networks change it: the first element and the bits of each."""
        if not piece.deltas:
            for first, last in list_chunks(piece):
                yield first, self.compute(piece, first, last, [])
            return
        deltas = [self.open_delta(name, change) for name, _, change in piece.deltas]
        if any(change.sets_weight for _, _, change in piece.deltas):
            yield from self.compute_dora(piece, deltas[0])
            return
        row_elements = piece.row_elements
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
        row_elements = piece.row_elements
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
