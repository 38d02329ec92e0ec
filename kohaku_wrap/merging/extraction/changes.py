"""A change of weights written as a network: layer by layer, in the order of the checkpoint's keys."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from kohaku_wrap.errors import KwrapError, Problem
from kohaku_wrap.files import Progress
from kohaku_wrap.formats.safetensors import BITS_OF_DTYPE, TensorSpot, encode_header
from kohaku_wrap.merging.arithmetic.deltas import STORED
from kohaku_wrap.merging.extraction.fitting import (
    Fit,
    fit_kronecker,
    fit_low_rank,
    make_lora,
    shape_of_outer,
    split_kronecker,
    squares_lost,
    sum_squares,
)
from kohaku_wrap.merging.extraction.layers import Layer, LayerFit, NetworkResult, list_layers
from kohaku_wrap.merging.networks.factors import scale_of
from kohaku_wrap.merging.networks.files import raise_problems
from kohaku_wrap.merging.networks.modules import shapes_of_kron
from kohaku_wrap.merging.open_files import Files, check_output, new_file, write_at
from kohaku_wrap.merging.pieces import KeyFinder
from kohaku_wrap.merging.plan import DEFAULT_RANK, MergePlan
from kohaku_wrap.merging.worker import Faults, Worker
from kohaku_wrap.metadata.parallel import map_in_order
from kohaku_wrap.processes import count_cores

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
HEADER_RESERVE_BYTES = 4096
"""For what is known only when all is fitted: how exact the network is, and its hash."""


class NothingToWrite(KwrapError):
    """A change that changes nothing that a network can hold."""


class Fitter:
    """One thread's worker, and what it does with a layer."""

    def __init__(self, plan: MergePlan, worker: Worker) -> None:
        self.plan, self.worker, self.options = plan, worker, plan.options

    def fit(self, layers: list[Layer]) -> list[LayerFit]:
        """The fits of layers that belong together; those without a change only beside others that have one."""
        torch.set_num_threads(1)
        fits = [self.fit_one(layer) for layer in layers]
        return fits if any(fit.squares for fit in fits) else []

    def compute(self, layer: Layer) -> torch.Tensor:
        """The layer's change: exact sums, rounded once to float32."""
        piece = layer.piece
        numbers = np.zeros(piece.elements, dtype=np.float32)
        for first, bits in self.worker.compute_whole(piece) if piece.sources or piece.deltas else ():
            numbers[first : first + bits.size] = bits.view(np.float32)
        if layer.is_transposed:
            return torch.from_numpy(numbers.reshape(layer.shape[::-1]).T.copy())
        return torch.from_numpy(numbers.reshape(layer.shape))

    def fit_one(self, layer: Layer) -> LayerFit:
        delta = self.compute(layer)
        squares = sum_squares(delta)
        is_rest = layer.kind == "bias" or len(layer.shape) < 2
        # What is not finite is refused at the end, by key.
        if not math.isfinite(squares) or not layer.name or (is_rest and self.options.rest == "skip"):
            return LayerFit(layer, "left out", 0, squares, squares, {})
        dtype = TORCH_DTYPES[layer.stored]
        if is_rest or self.options.network == "full":
            stored = delta.to(dtype)
            suffix = STORED.get(("norm" if layer.of_norm else "full", layer.kind), "diff_b")
            lost = 0.0 if stored is delta else sum_squares(delta.sub_(stored))
            return LayerFit(layer, "whole", 0, squares, lost, {suffix: stored})
        if self.options.network == "lokr":
            outer = self.outer_of(layer)
            fit = fit_kronecker(delta, outer, dtype) if squares else no_kronecker(delta, outer, dtype)
            return LayerFit(layer, "LoKr", 0, squares, squares_lost(split_kronecker(delta, outer), fit), fit.factors)
        rank = self.options.rank or DEFAULT_RANK
        joined = self.join_networks(layer, dtype)
        fit = joined or fit_low_rank(delta, rank, self.options.energy, squares, layer.name, dtype)
        lost = squares_lost(delta.reshape(delta.shape[0], -1), fit)
        return LayerFit(layer, "LoRA", fit.rank, squares, lost, fit.factors)

    def outer_of(self, layer: Layer) -> tuple[int, int]:
        """The shape of LoKr's first matrix: as asked, else as in the networks that are added, else LyCORIS' for 8."""
        modules = [change.module for _, _, change in layer.piece.deltas]
        if modules and not self.options.factor and all(module.algorithm == "LoKr" for module in modules):
            outer, _ = shapes_of_kron({suffix: spot.shape for suffix, spot in modules[0].tensors.items()})
            return outer[0], outer[1]
        return shape_of_outer(layer.shape, self.options.factor)

    def join_networks(self, layer: Layer, dtype: torch.dtype) -> Fit | None:
        """LoRA modules side by side, whose ranks add up; None where others are added, or the rank would be too much."""
        added = layer.piece.deltas
        modules = [change.module for _, _, change in added]
        plain = all(m.algorithm == "LoRA" and "lora_mid.weight" not in m.tensors for m in modules)
        if not modules or layer.piece.sources or not plain or self.options.energy:
            return None
        rank = sum(module.tensors["lora_down.weight"].shape[0] for module in modules)
        if rank > (self.options.rank or rank):
            return None
        ups, downs = [], []
        for network, coefficient, change in added:
            arrays = self.worker.read_module(network, change)
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            up, down = tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"]
            ups.append(up * (float(coefficient) * scale_of(tensors, down.shape[0])))
            downs.append(down.reshape(down.shape[0], -1))
        return make_lora(torch.cat(ups, 1), torch.cat(downs), layer.shape, dtype)


def no_kronecker(delta: torch.Tensor, outer: tuple[int, int], dtype: torch.dtype) -> Fit:
    """LoKr of a layer that does not change, in a fused tensor whose other parts do."""
    columns = delta.numel() // (outer[0] * outer[1])
    shape = (delta.shape[0] // outer[0], delta.shape[1] // outer[1], *delta.shape[2:])
    factors = {"lokr_w1": torch.zeros(outer, dtype=dtype), "lokr_w2": torch.zeros(shape, dtype=dtype)}
    product = torch.zeros(outer[0] * outer[1], 1), torch.zeros(1, columns)
    return Fit({**factors, "alpha": torch.tensor(1.0)}, product, 0)


class Fitters:
    """A fitter for each thread that fits layers."""

    def __init__(self, plan: MergePlan, files: Files, faults: Faults) -> None:
        self.plan, self.files, self.faults = plan, files, faults
        self.lock, self.finder, self.local = threading.Lock(), KeyFinder(plan), threading.local()

    def fit(self, layers: list[Layer]) -> list[LayerFit]:
        """The fits of layers that belong together, by the fitter of the calling thread."""
        if not hasattr(self.local, "fitter"):
            worker = Worker(self.plan, self.files, self.finder, self.faults, self.lock)
            self.local.fitter = Fitter(self.plan, worker)
        fitter: Fitter = self.local.fitter
        return fitter.fit(layers)


def write_network(
    plan: MergePlan,
    output: Path,
    metadata: Mapping[str, str],
    threads: int = 0,
    on_progress: Progress = lambda done, total: None,
) -> NetworkResult:
    """Write the change that a plan computes as a network: whole and on disk, or not at all.

    The bytes do not depend on `threads`. `on_progress` is told numbers of the change. The data begin where the
    longest header would end, since ranks by energy are known only at the end.
    Raises BadOutput, ProblemsFound for non-finite numbers, or NothingToWrite.
    """
    check_output(output, plan.headers)
    groups = list_layers(plan)
    total = sum(layer.piece.elements for group in groups for layer in group)
    start, limit = reserve_header(groups, plan, metadata)
    result, faults, files = NetworkResult(output), Faults(), Files(plan.headers)
    spots: dict[str, TensorSpot] = {}
    digest, position, done = hashlib.sha256(), 0, 0
    try:
        with new_file(output, limit) as descriptor:
            fitted = map_in_order(Fitters(plan, files, faults).fit, groups, threads or count_cores())
            for group, fits in zip(groups, fitted, strict=True):
                for name, tensor in named_tensors(fits):
                    bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
                    write_at(descriptor, bits, start + position)
                    digest.update(bits.data)
                    dtype = next(word for word, each in TORCH_DTYPES.items() if each == tensor.dtype)
                    spots[name] = TensorSpot(dtype, tuple(tensor.shape), position, position + bits.size)
                    position += bits.size
                result.unchanged += len(group) - len(fits)
                result.fits += [LayerFit(fit.layer, fit.form, fit.rank, fit.squares, fit.lost, {}) for fit in fits]
                done += sum(layer.piece.elements for layer in group)
                on_progress(done, total)
            refuse_faults(faults, result)
            if not spots:
                raise NothingToWrite(
                    "the formula changes nothing that a network can hold", "Are both files the same? See --dry-run."
                )
            said = {**metadata, "kwrap.relative_error": f"{result.error:.3e}", "sshs_model_hash": digest.hexdigest()}
            write_at(descriptor, np.frombuffer(encode_header(spots, said, start), dtype=np.uint8), 0)
    finally:
        files.close()
    result.size_bytes = start + position
    return result


def refuse_faults(faults: Faults, result: NetworkResult) -> None:
    """Raise ProblemsFound for a change that is not finite, or that the type of the network cannot hold."""
    found = {**faults.inputs, **faults.overflows}
    problems = [Problem(key, f"{count} numbers are infinite, NaN or too large") for key, count in found.items()]
    problems += [
        Problem(fit.layer.key, f"too large for {fit.layer.stored}")
        for fit in result.fits
        if fit.layer.key not in found and not math.isfinite(fit.lost)
    ]
    raise_problems(
        "the change is not finite; nothing was written",
        problems,
        'A network cannot hold such numbers: `--dtype fp32` holds larger ones, only("…", …) leaves a tensor out.',
    )


def named_tensors(fits: list[LayerFit]) -> Iterator[tuple[str, torch.Tensor]]:
    for fit in fits:
        for suffix, tensor in fit.tensors.items():
            yield f"{fit.layer.name}.{suffix}", tensor


def reserve_header(groups: list[list[Layer]], plan: MergePlan, metadata: Mapping[str, str]) -> tuple[int, int]:
    """Where the data begin, and how large the file can become, in bytes."""
    spots: dict[str, TensorSpot] = {}
    size_bytes = 0
    for layer in (layer for group in groups for layer in group):
        size_bytes += largest_size(layer, plan) * BITS_OF_DTYPE[layer.stored] // 8
        for suffix in ("lora_down.weight", "lora_up.weight", "alpha", "a"):
            spots[f"{layer.name}.{suffix}"] = TensorSpot(layer.stored, (*layer.shape, 10**6), 10**13, 10**13)
    start = len(encode_header(spots, metadata)) + HEADER_RESERVE_BYTES
    return start, start + size_bytes


def largest_size(layer: Layer, plan: MergePlan) -> int:
    """As many numbers as a layer's tensors can have."""
    if plan.options.network != "lora" or len(layer.shape) < 2:
        return layer.piece.elements + 1024
    joined = sum(change.module.tensors["lora_down.weight"].shape[0] for _, _, change in layer.piece.deltas
                 if change.module.algorithm == "LoRA")  # fmt: skip
    rank = max(plan.options.rank or DEFAULT_RANK, joined)
    return rank * (layer.shape[0] + math.prod(layer.shape[1:])) + 2
