"""A merge worked out: what every tensor of the output is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from kohaku_wrap.formats.network_names import Target
from kohaku_wrap.formats.safetensors import Header, TensorSpot
from kohaku_wrap.merging.formula.calls import Call, WeightedSum
from kohaku_wrap.merging.formula.coefficients import Formula
from kohaku_wrap.merging.networks.files import Change

DEFAULT_RANK = 32
DEFAULT_FACTOR = 8


@dataclass(frozen=True)
class MergeOptions:
    """What to do where the files leave a choice."""

    like: str = ""
    """The name or path of the anchor; empty for the formula's first model."""

    vae_from: str = ""
    """The name or path of the model whose VAE is taken; empty for the anchor's."""

    parts: str = ""
    """The parts that the formula is for, such as `unet` or `unet,te2`; the others are the anchor's. Empty for all."""

    merge_vae: bool = False
    """Whether the formula also applies to the VAE."""

    prediction: str = ""
    """What the output is marked to predict: eps or v; empty for what its models do."""

    dtype: str = ""
    """One of FLOAT_DTYPES for all floating tensors; empty for the anchor's types."""

    missing: str = "fail"
    """A model with weight lacks a key: fail, anchor (copy the anchor's tensor) or zero (count it as 0)."""

    shapes: str = "fail"
    """Shapes differ: fail, or anchor (copy the anchor's tensor)."""

    unmatched: str = "fail"
    """A network has a module that no key takes, or of an unknown kind: fail, or skip (leave it out and count it)."""

    sums: str = "warn"
    """The coefficients of a tensor do not sum to 1: warn or fail."""

    non_finite: str = "fail"
    """An input is infinite or not a number: fail, or keep."""

    overflow: str = "fail"
    """A result is too large for the output's type: fail, or keep the infinity."""

    layout: str = ""
    """What lists of numbers in blocks(…) are of: sdxl, which empty means, or sd15."""

    network: str = ""
    """The formula is a change, and is written as a network of this kind: lora, lokr or full; empty for a checkpoint."""

    rank: int = 0
    """Of a LoRA module at most; 0 for that of the networks where they can be joined, else DEFAULT_RANK."""

    energy: float = 0.0
    """The share of a change's squared numbers that a LoRA module must hold; its rank is the least that does."""

    factor: int = 0
    """Of a LoKr module: rows and columns of its first matrix, as LyCORIS counts; 0 for DEFAULT_FACTOR."""

    rest: str = "keep"
    """What the kind of network cannot hold (norms, biases): keep whole in the network, or skip."""


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor of the output is made."""

    key: str
    """Its name."""

    spot: TensorSpot
    """Its place in the output."""

    sources: tuple[str, ...]
    """The names of the checkpoints that are read; one for a copy, none for an empty marker that is added."""

    coefficients: tuple[Fraction, ...]
    """One for each source, 0 for what stands inside functions alone; empty for a copy of the bytes."""

    changes: tuple[tuple[str, Fraction, Change], ...] = ()
    """Networks that change it: name, coefficient and module."""

    stored: str = ""
    """For a change that becomes a network: the type of its tensors there; else empty."""

    calls: tuple[tuple[Call, Fraction], ...] = ()
    """Functions that it is made of, whose checkpoints are among the sources, and their coefficients."""

    @property
    def sum(self) -> WeightedSum:
        """What is computed, without networks."""
        weighted = zip(self.sources, self.coefficients, strict=False)
        return WeightedSum(tuple((name, value) for name, value in weighted if value), (), self.calls)


@dataclass(frozen=True)
class MergePlan:
    """A whole merge, ready to run."""

    formula: Formula
    """What to compute."""

    files: dict[str, Header]
    """The checkpoints by name."""

    networks: dict[str, Header]
    """The networks by name."""

    anchor: str
    """The checkpoint that gives key set, types and VAE."""

    tensors: tuple[TensorPlan, ...]
    """In the order of the output's data."""

    options: MergeOptions
    """As asked."""

    decisions: tuple[str, ...] = ()
    """What was decided where the files left a choice, one line each."""

    prediction: str = ""
    """What the output predicts, epsilon or v; empty where no file says it."""

    combinations: dict[WeightedSum, int] = field(default_factory=dict)
    """How many tensors each sum of coefficients is used for."""

    targets: Mapping[str, Mapping[str, Target]] = field(default_factory=dict)
    """By the name that a network gives a layer, what its weight and bias are; only where the plan has networks."""

    @property
    def headers(self) -> dict[str, Header]:
        """All inputs by name: the checkpoints, then the networks."""
        return {**self.files, **self.networks}

    @property
    def data_bytes(self) -> int:
        """The size of the output without its header."""
        return max((tensor.spot.end for tensor in self.tensors), default=0)


def estimate_formats(plan: MergePlan) -> dict[str, tuple[int, int]]:
    """For each type of the output, how many tensors and bytes it has."""
    table: dict[str, tuple[int, int]] = {}
    for tensor in plan.tensors:
        count, size = table.get(tensor.spot.dtype, (0, 0))
        table[tensor.spot.dtype] = count + 1, size + tensor.spot.size_bytes
    return table


def read_bytes_of(plan: MergePlan) -> int:
    """How much of the checkpoints is read."""
    return sum(plan.files[name].tensors[tensor.key].size_bytes for tensor in plan.tensors for name in tensor.sources)
