"""One module of a network: its algorithm, by the tensors that it has, and whether they fit together and on a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kohaku_wrap.formats.safetensors import TensorSpot

ANY_MODULE = ("alpha", "dora_scale", "diff_b")
ALGORITHMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "LoKr": ((), ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", *ANY_MODULE)),
    "LoHa": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2", *ANY_MODULE)),
    "LoRA": (("lora_up.weight", "lora_down.weight"), ("lora_mid.weight", *ANY_MODULE)),
    "full": (("diff",), ("diff_b", "alpha")),
    "norm": (("w_norm",), ("b_norm", "alpha")),
    "bias": (("diff_b",), ("alpha",)),
    "OFT": (("oft_blocks",), ("rescale", "alpha")),
    "GLoRA": (("a1.weight", "a2.weight", "b1.weight", "b2.weight"), ("bm.weight", "alpha")),
    "IA3": (("weight", "on_input"), ()),
}
"""For each algorithm the tensors that a module must have, and those that it may have beside them."""

MADE_OF_WEIGHT = ("OFT", "GLoRA", "IA3")
"""Algorithms whose change depends on the checkpoint's weight; OFT with blocks of four dimensions is BOFT."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Module:
    """One module of a network file."""

    name: str
    """Such as `lora_unet_input_blocks_1_0_in_layers_2`."""

    algorithm: str
    """A name in ALGORITHMS."""

    tensors: dict[str, TensorSpot]
    """Where each of its tensors lies, by the part of the key after the name."""

    @property
    def sets_weight(self) -> bool:
        """Whether what it does depends on the checkpoint's weight: DoRA, OFT, BOFT, GLoRA and IA3."""
        return "dora_scale" in self.tensors or self.algorithm in MADE_OF_WEIGHT

    def delta_size(self) -> tuple[int, int]:
        """Rows and elements of the weight's delta.

        Raises KeyError, IndexError or ValueError where the factors do not make a whole delta.
        """
        shape = {suffix: spot.shape for suffix, spot in self.tensors.items()}
        if self.algorithm == "LoKr":
            (outer_rows, outer_columns), inner = shapes_of_kron(shape)
            return outer_rows * inner[0], outer_rows * outer_columns * math.prod(inner)
        if self.algorithm == "LoHa":
            whole = shape_of_hadamard(shape)
        elif self.algorithm == "LoRA":
            whole = shape_of_lora(shape)
        else:
            whole = shape["diff" if self.algorithm == "full" else "w_norm"] or (1,)
        return whole[0], math.prod(whole)


def flatten(shape: Shape) -> Shape:
    """As a matrix: all after the first dimension in one."""
    return shape[0], math.prod(shape[1:])


def shape_of_product(left: Shape, right: Shape) -> Shape:
    """Of a product of two matrices."""
    (rows, rank), (other_rank, columns) = left, right
    if rank != other_rank or not rank:
        raise ValueError
    return rows, columns


def shape_of_tucker(core: Shape, left: Shape, right: Shape) -> Shape:
    """Of a Tucker product: `core` (rank, other rank, …), `left` (rank, rows), `right` (other rank, columns)."""
    (rank, rows), (other_rank, columns) = left, right
    if core[:2] != (rank, other_rank) or not rank * other_rank:
        raise ValueError
    return rows, columns, *core[2:]


def shapes_of_kron(shape: Mapping[str, Shape]) -> tuple[Shape, Shape]:
    """Of both factors of a LoKr module."""
    outer = shape.get("lokr_w1") or shape_of_product(shape["lokr_w1_a"], shape["lokr_w1_b"])
    if "lokr_w2" in shape:
        return outer, shape["lokr_w2"]
    left, right = shape["lokr_w2_a"], shape["lokr_w2_b"]
    if "lokr_t2" in shape:
        return outer, shape_of_tucker(shape["lokr_t2"], left, right)
    return outer, shape_of_product(left, flatten(right))


def shape_of_hadamard(shape: Mapping[str, Shape]) -> Shape:
    """Of both factors of a LoHa module, which must be alike."""
    pairs = [(shape[f"hada_w{half}_a"], shape[f"hada_w{half}_b"]) for half in (1, 2)]
    if "hada_t1" in shape or "hada_t2" in shape:
        cores = shape["hada_t1"], shape["hada_t2"]
        found = {shape_of_tucker(core, *pair) for core, pair in zip(cores, pairs, strict=True)}
    else:
        found = {shape_of_product(*pair) for pair in pairs}
    if len(found) > 1:
        raise ValueError
    return found.pop()


def shape_of_lora(shape: Mapping[str, Shape]) -> Shape:
    up, down = shape["lora_up.weight"], shape["lora_down.weight"]
    if math.prod(up[2:]) != 1:
        raise ValueError
    if "lora_mid.weight" in shape:
        return shape_of_tucker(shape["lora_mid.weight"], (up[1], up[0]), flatten(down))
    return shape_of_product(up[:2], flatten(down))


def algorithm_of(suffixes: Iterable[str]) -> str | None:
    """The algorithm whose tensors these are; None if no known one fits."""
    listed = set(suffixes)
    for algorithm, (required, further) in ALGORITHMS.items():
        is_own = required or listed.difference(ANY_MODULE)
        if is_own and listed.issuperset(required) and listed.issubset(required + further):
            return algorithm
    return None


def describe_shapes(module: Module) -> str:
    return ", ".join(f"{suffix} {list(spot.shape)}" for suffix, spot in sorted(module.tensors.items()))


def fits_weight(module: Module, weight: Shape) -> bool:
    """Whether a module whose change is made of the weight can be put on one of this shape, (out, in, …).

    Raises IndexError or ValueError where its factors do not fit together.
    """
    shape = {suffix: spot.shape for suffix, spot in module.tensors.items()}
    rows, columns = weight[0], weight[1] if len(weight) > 1 else 0
    if module.algorithm == "OFT":
        blocks = shape["oft_blocks"]
        square = len(blocks) in (3, 4) and blocks[-1] == blocks[-2] and blocks[-3] * blocks[-1] == rows
        return square and math.prod(shape.get("rescale", (rows,))) == rows
    if module.algorithm == "IA3":
        return math.prod(shape["weight"]) in (rows, columns)
    a1, a2, b1 = (flatten(shape[f"{name}.weight"]) for name in ("a1", "a2", "b1"))
    as_lora = {"b1.weight": "lora_up.weight", "b2.weight": "lora_down.weight", "bm.weight": "lora_mid.weight"}
    added = shape_of_lora({as_lora[name]: size for name, size in shape.items() if name in as_lora})
    rank = a2[0]
    alike = a1 == (columns, rank) and a2 == (rank, columns) and b1 == (rows, rank)
    return alike and flatten(added) == flatten(weight)


def is_norm_of(dora: Shape, rows: int, weight: Shape) -> bool:
    """Whether DoRA's norms are those of a weight's outputs, (rows, 1, …), or of its inputs, (1, columns, …).

    PEFT's have one dimension, and are of outputs where both could be.
    """
    by_output = dora[:1] == (rows,) and math.prod(dora) == rows
    return (
        by_output
        or dora == weight[1:2]
        or (dora[:2] == (1, *weight[1:2]) and math.prod(dora) == math.prod(weight[1:2]))
    )
