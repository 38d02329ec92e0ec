"""A merge plan cut into pieces of one kind each, in the order of the output's bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from kohaku_wrap.formats.safetensors import BITS_OF_DTYPE, TensorSpot
from kohaku_wrap.merging.formula.calls import WeightedSum
from kohaku_wrap.merging.networks.files import Change
from kohaku_wrap.merging.plan import MergePlan, TensorPlan

CHUNK_ELEMENTS = 1 << 18
TERMS_CHUNK_ELEMENTS = 1 << 15
"""Where there are functions, whose float64 arrays then stay in a core's cache."""
RAW = "U8"


@dataclass(frozen=True)
class Source:
    """Where a piece reads one of its inputs."""

    name: str
    """The checkpoint's name in the formula."""

    begin: int
    """First byte in the file's data."""

    kind: str
    """The type of its elements; U8 for bytes that are copied as they are."""

    columns: int = 0
    """Of the matrix as it lies in the file, where that is read transposed; else 0."""


@dataclass(frozen=True)
class Piece:
    """A run of output elements that are all made in the same way."""

    begin: int
    """First byte in the output's data."""

    elements: int
    """How many."""

    to: str
    """Their type; U8 for bytes that are copied as they are."""

    sources: tuple[Source, ...]
    """The checkpoints that it reads."""

    coefficients: tuple[Fraction, ...]
    """One for each source."""

    deltas: tuple[tuple[str, Fraction, Change], ...] = ()
    """Networks that are added: name, coefficient, module."""

    shape: tuple[int, ...] = ()
    """The shape, where there are deltas or functions."""

    terms: WeightedSum | None = None
    """What is computed where there are functions, without deltas; sources and coefficients are of what they read."""

    peers: tuple[Piece, ...] = ()
    """All pieces of the same tensor, where there are functions: these need facts of the whole tensor."""

    @property
    def width(self) -> int:
        """Bytes of one element of the output."""
        return BITS_OF_DTYPE[self.to] // 8

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        return self.elements // self.rows

    @property
    def size_bytes(self) -> int:
        return self.elements * self.width


def cut_tensor(plan: MergePlan, tensor: TensorPlan, least_parts: int = 1) -> Iterator[Piece]:
    """The pieces of one tensor: one, or one for each part of a fused tensor that networks change or become."""
    if not (tensor.sources or tensor.changes):
        return
    spots = [plan.files[name].tensors[tensor.key] for name in tensor.sources]
    if not (tensor.coefficients or tensor.changes):
        source = Source(tensor.sources[0], spots[0].begin, RAW)
        yield Piece(tensor.spot.begin, tensor.spot.size_bytes, RAW, (source,), (Fraction(1),))
        return
    parts = max(
        [least_parts, *(change.target.parts for _, _, change in tensor.changes), *(len(spot.shares) for spot in spots)]
    )
    elements = tensor.spot.elements // parts
    shape = tensor.spot.shape
    pieces = []
    for part in range(parts):
        deltas = tuple(item for item in tensor.changes if item[2].target.part == part)
        sources = tuple(
            source_of_share(name, spot, part, elements) for name, spot in zip(tensor.sources, spots, strict=True)
        )
        begin = tensor.spot.begin + part * elements * BITS_OF_DTYPE[tensor.spot.dtype] // 8
        part_shape = (shape[0] // parts, *shape[1:]) if shape else ()
        known_shape = part_shape if deltas or tensor.calls else ()
        pieces.append(Piece(begin, elements, tensor.spot.dtype, sources, tensor.coefficients, deltas, known_shape))
    if tensor.calls:
        peers = tuple(pieces)
        pieces = [replace(piece, terms=tensor.sum, peers=peers) for piece in peers]
    yield from pieces


def source_of_share(name: str, spot: TensorSpot, part: int, elements: int) -> Source:
    """Where one of equal shares of a tensor's rows is read, each of so many elements."""
    if spot.shares:
        return Source(name, spot.shares[part].begin, spot.dtype)
    begin = spot.begin + part * elements * BITS_OF_DTYPE[spot.dtype] // 8
    return Source(name, begin, spot.dtype, spot.shape[0] if spot.is_transposed else 0)


def follows(before: Piece, after: Piece) -> bool:
    """Whether two pieces are made alike and lie side by side in the output and in every input."""
    if before.shape or after.shape or before.to != after.to or before.coefficients != after.coefficients:
        return False
    if before.begin + before.size_bytes != after.begin or len(before.sources) != len(after.sources):
        return False
    return all(
        left.name == right.name
        and not left.columns
        and not right.columns
        and left.kind == right.kind
        and left.begin + before.elements * BITS_OF_DTYPE[left.kind] // 8 == right.begin
        for left, right in zip(before.sources, after.sources, strict=True)
    )


def cut_pieces(plan: MergePlan) -> list[Piece]:
    """All pieces, neighbours that are made alike joined into one."""
    pieces: list[Piece] = []
    for tensor in plan.tensors:
        for piece in cut_tensor(plan, tensor):
            if not piece.elements:
                continue
            if pieces and follows(pieces[-1], piece):
                pieces[-1] = replace(pieces[-1], elements=pieces[-1].elements + piece.elements)
            else:
                pieces.append(piece)
    return pieces


@dataclass(frozen=True)
class Task:
    """What a worker does in one go: a chunk of a plain piece, or a whole piece with deltas."""

    piece: Piece
    """The piece."""

    first: int
    """Its first element."""

    last: int
    """The element after its last."""


def list_tasks(pieces: list[Piece]) -> Iterator[Task]:
    """Chunks at fixed places, so that the bytes do not depend on the number of workers."""
    for piece in pieces:
        if piece.deltas or piece.terms:
            yield Task(piece, 0, piece.elements)
            continue
        for first, last in list_chunks(piece):
            yield Task(piece, first, last)


def list_chunks(piece: Piece) -> Iterator[tuple[int, int]]:
    """A piece cut at fixed places: whole rows where it has a shape."""
    length = CHUNK_ELEMENTS * 4 if piece.to == RAW else TERMS_CHUNK_ELEMENTS if piece.terms else CHUNK_ELEMENTS
    if piece.shape and piece.elements:
        length = max(1, length // piece.row_elements) * piece.row_elements
    for first in range(0, piece.elements, length):
        yield first, min(first + length, piece.elements)


class KeyFinder:
    """Tells which tensor a byte of the output belongs to."""

    def __init__(self, plan: MergePlan) -> None:
        tensors = [tensor for tensor in plan.tensors if tensor.spot.size_bytes]
        self.begins = [tensor.spot.begin for tensor in tensors]
        self.keys = [tensor.key for tensor in tensors]

    def key_at(self, position: int) -> str:
        """The key of the tensor that holds byte `position` of the data."""
        return self.keys[bisect_right(self.begins, position) - 1]
