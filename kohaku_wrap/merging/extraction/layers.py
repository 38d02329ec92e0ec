"""The layers that a change is written for, and what became of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kohaku_wrap.formats.network_names import Target
from kohaku_wrap.merging.pieces import Piece, cut_tensor
from kohaku_wrap.merging.plan import MergePlan, TensorPlan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Layer:
    """The weight or bias of one module, as a change of it is computed."""

    name: str
    """Of the network's module; empty where no network names the tensor."""

    kind: str
    """`weight` or `bias`."""

    key: str
    """Of the checkpoint's tensor."""

    piece: Piece
    """How its numbers are computed, in float32."""

    shape: tuple[int, ...]
    """Of the module: (out, in, kernel…), or (out,)."""

    is_transposed: bool
    """Whether the checkpoint's matrix lies the other way."""

    stored: str
    """The type of the network's tensors."""

    of_norm: bool
    """Whether the module is a norm: its weight has one dimension."""


@dataclass(frozen=True)
class LayerFit:
    """What became of one layer."""

    layer: Layer
    """The layer."""

    form: str
    """LoRA, LoKr, `whole`, or `left out`."""

    rank: int
    """Of LoRA; 0 for other forms."""

    squares: float
    """Sum of the squares of its change."""

    lost: float
    """Sum of the squares of what the network's tensors, as stored, differ from it."""

    tensors: dict[str, torch.Tensor] = field(repr=False)
    """By the part of the key after the name."""

    @property
    def error(self) -> float:
        """Relative: the norm of what is lost by the norm of the change."""
        return math.sqrt(self.lost / self.squares) if self.squares else 0.0


@dataclass
class NetworkResult:
    """What was written."""

    output: Path
    """The file."""

    size_bytes: int = 0
    """Its size."""

    fits: list[LayerFit] = field(default_factory=list)
    """Every layer that changes, without its tensors."""

    unchanged: int = 0
    """Layers that do not change and are not in the file."""

    @property
    def error(self) -> float:
        """Relative, over all that changes, what was left out included."""
        squares = math.fsum(fit.squares for fit in self.fits)
        return math.sqrt(math.fsum(fit.lost for fit in self.fits) / squares) if squares else 0.0


def list_layers(plan: MergePlan) -> list[list[Layer]]:
    """The layers that the formula can change: together those of one tensor, and those of one norm."""
    named: dict[str, list[tuple[str, str, Target]]] = {}
    norms = set()
    spots = {tensor.key: tensor.spot for tensor in plan.tensors}
    for name, kinds in plan.targets.items():
        for kind, target in kinds.items():
            named.setdefault(target.key, []).append((name, kind, target))
            if kind == "weight" and target.key in spots and len(spots[target.key].shape) < 2:
                norms.add(name)
    groups: dict[str, list[Layer]] = {}
    for tensor in plan.tensors:
        places = named.get(tensor.key, [("", "weight", Target(tensor.key))])
        pieces = list(cut_tensor(plan, tensor, max(target.parts for _, _, target in places))) if tensor.stored else []
        for name, kind, target in places if pieces else []:
            shape, piece = shape_of_layer(tensor, target), pieces[target.part]
            layer = Layer(name, kind, tensor.key, piece, shape, target.is_transposed, tensor.stored, name in norms)
            groups.setdefault(name if name in norms else tensor.key, []).append(layer)
    return list(groups.values())


def shape_of_layer(tensor: TensorPlan, target: Target) -> tuple[int, ...]:
    shape = tensor.spot.shape[::-1] if target.is_transposed else tensor.spot.shape
    return (shape[0] // target.parts, *shape[1:]) if shape else (1,)


def describe_fits(fits: list[LayerFit]) -> list[dict[str, Any]]:
    """The fits as JSON: module, kind, form, rank, norm of the change, relative error."""
    return [
        {
            "module": fit.layer.name or fit.layer.key,
            "kind": fit.layer.kind,
            "form": fit.form,
            "rank": fit.rank,
            "norm": math.sqrt(fit.squares),
            "error": fit.error,
        }
        for fit in fits
    ]
