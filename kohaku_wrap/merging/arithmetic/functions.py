"""The functions of a formula over one tensor, in float64, chunk by chunk; what they need of the whole tensor first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kohaku_wrap.merging.arithmetic.loops import add_term, divide
from kohaku_wrap.merging.arithmetic.rounding import Combination
from kohaku_wrap.merging.formula.calls import Call, WeightedSum
from kohaku_wrap.merging.pieces import Piece, list_chunks
from kohaku_wrap.streams import draws, stream_key

Array = NDArray[np.float64]
TRAIN_DIFFERENCE_GAIN = 1.8
PARALLEL = 1e-7
HALF_BITS = 16


@dataclass(frozen=True)
class Chunk:
    """Elements of one piece of a tensor: whole rows."""

    piece: Piece
    """The piece."""

    first: int
    """Its first element."""

    last: int
    """The element after its last."""

    begin: int
    """Where the first stands in the whole tensor."""

    numbers: dict[str, NDArray[Any]]
    """What its checkpoints hold there, by name: float32, or float64."""


class TensorFunctions:
    """The functions of one tensor: each is computed from a chunk of its arguments and from facts of all chunks.

    Facts are gathered in chunks of fixed places, one after another, so that no number depends on how many threads
    there are. They take one pass over the inputs for slerp and cosine, two for ties with k below 1, none for others.
    """

    def __init__(self, key: str, pieces: tuple[Piece, ...], read: Callable[[Piece, int, int], dict[str, NDArray[Any]]]):
        """`pieces`: those of the whole tensor; `read` gives their checkpoints' numbers between two elements."""
        self.key, self.pieces, self.read = key, pieces, read
        self.facts: dict[Call, Any] = {}

    def chunk(self, piece: Piece, first: int, last: int) -> Chunk:
        before = (piece.begin - self.pieces[0].begin) // piece.width
        return Chunk(piece, first, last, before + first, self.read(piece, first, last))

    def sum(self, terms: WeightedSum, chunk: Chunk) -> Array:
        """A sum of checkpoints and functions: whole multiples, divided once."""
        combination = Combination.of([value for _, value in (*terms.models, *terms.calls)])
        total = np.zeros(chunk.last - chunk.first)
        arrays = [chunk.numbers[name] for name, _ in terms.models]
        arrays += [self.value(call, chunk) for call, _ in terms.calls]
        for array, numerator in zip(arrays, combination.numerators, strict=True):
            add_term(array, float(numerator), total)
        divide(total, float(combination.denominator))
        return total

    def value(self, call: Call, chunk: Chunk) -> Array:
        """A function's numbers."""
        self.prepare(call)
        arguments = [self.sum(part, chunk) for part in call.arguments]
        return FUNCTIONS[call.function](self, call, arguments, chunk)

    def prepare(self, call: Call) -> None:
        """Gather what a function needs of the whole tensor, unless that is done."""
        if call in self.facts:
            return
        gather = GATHERERS.get(call.function)
        self.facts[call] = gather(self, call) if gather else None

    def passes(self, call: Call) -> Iterator[list[Array]]:
        """The arguments of a function, chunk by chunk over the whole tensor."""
        for piece in self.pieces:
            for first, last in list_chunks(piece):
                chunk = self.chunk(piece, first, last)
                yield [self.sum(part, chunk) for part in call.arguments]


def products_of_columns(tensor: TensorFunctions, call: Call) -> Array:
    """(3, columns): over the rows, a², b² and a·b; a column is what torch counts along dimension 0."""
    columns = tensor.pieces[0].row_elements
    sums = np.zeros((3, columns))
    for a, b in tensor.passes(call):
        for place, (left, right) in enumerate(((a, a), (b, b), (a, b))):
            sums[place] += (left * right).reshape(-1, columns).sum(0)
    return sums


def products(tensor: TensorFunctions, call: Call) -> tuple[float, float, float]:
    """Over all elements: a², b² and a·b."""
    parts = [((a * a).sum(), (b * b).sum(), (a * b).sum()) for a, b in tensor.passes(call)]
    aa, bb, ab = (float(np.sum(column)) for column in zip(*parts, strict=True))
    return aa, bb, ab


def thresholds(tensor: TensorFunctions, call: Call) -> list[np.float32]:
    """For each argument, the size from which on numbers are kept, as sd-mecha finds it.

    The max(⌊(1 − k) n⌋, 1)-th smallest size, rounded to float32: found by counting the upper halves of its bits, then
    the lower halves of those that share its upper half.
    """
    keep = float(call.numbers[0])
    count = sum(piece.elements for piece in tensor.pieces)
    rank = int((1 - keep) * count)
    if rank <= 1:
        return [np.float32(0)] * len(call.arguments)
    places = [rank] * len(call.arguments)
    found = [0] * len(call.arguments)
    for shift in (HALF_BITS, 0):
        counts = np.zeros((len(found), 1 << HALF_BITS), dtype=np.int64)
        for arguments in tensor.passes(call):
            for number, argument in enumerate(arguments):
                bits = np.abs(argument).astype(np.float32).view(np.uint32)
                if not shift:
                    bits = bits[bits >> HALF_BITS == found[number]] & np.uint32(0xFFFF)
                counts[number] += np.bincount(bits >> shift, minlength=1 << HALF_BITS)
        for number, each in enumerate(counts):
            reached = np.cumsum(each)
            half = int(np.searchsorted(reached, places[number]))
            places[number] -= int(reached[half - 1]) if half else 0
            found[number] = half if shift else found[number] << HALF_BITS | half
    return list(np.array(found, dtype=np.uint32).view(np.float32))


def train_difference(tensor: TensorFunctions, call: Call, arguments: list[Array], chunk: Chunk) -> Array:
    """a + 1.8 |b − a| / (|b − a| + |b − c|) · (b − c), where 0 / 0 is 0."""
    a, b, c = arguments
    change = b - c
    near, far = np.abs(b - a), np.abs(change)
    with np.errstate(invalid="ignore"):
        share = np.nan_to_num(near / (near + far), nan=0.0)
    return np.asarray(a + TRAIN_DIFFERENCE_GAIN * share * change)


def cosine(tensor: TensorFunctions, call: Call, arguments: list[Array], chunk: Chunk) -> Array:
    """(1 − s) b + s a, where s is each column's cosine less alpha, cut to 0 … 1; a column of zeros has cosine 0."""
    a, b = arguments
    aa, bb, ab = tensor.facts[call]
    with np.errstate(invalid="ignore"):
        likeness = np.nan_to_num(ab / (np.sqrt(aa) * np.sqrt(bb)), nan=0.0)
    share = np.resize(np.clip(likeness - float(call.numbers[0]), 0, 1), a.size)
    return np.asarray(share * a + (1 - share) * b)


def slerp(tensor: TensorFunctions, call: Call, arguments: list[Array], chunk: Chunk) -> Array:
    """Along the arc between the directions of a and b, with a length between theirs; a straight line if they are one.

    ω = arccos(a·b / |a||b|); (sin((1 − t) ω) a/|a| + sin(t ω) b/|b|) / sin ω · ((1 − t)|a| + t|b|).
    """
    a, b = arguments
    aa, bb, ab = tensor.facts[call]
    t = float(call.numbers[0])
    left, right = 1 - t, t
    lengths = math.sqrt(aa), math.sqrt(bb)
    if lengths[0] * lengths[1] > 0 and math.isfinite(aa + bb):
        angle = math.acos(max(-1.0, min(1.0, ab / (lengths[0] * lengths[1]))))
        if math.sin(angle) > PARALLEL:
            length = ((1 - t) * lengths[0] + t * lengths[1]) / math.sin(angle)
            left, right = (math.sin(part * angle) * length / own for part, own in zip((1 - t, t), lengths, strict=True))
    return np.asarray(left * a + right * b)


def dare(tensor: TensorFunctions, call: Call, arguments: list[Array], chunk: Chunk) -> Array:
    """Σ mᵢ xᵢ / max(Σ mᵢ, 1) / (1 − drop), where mᵢ is 0 for a share `drop` of the elements, at random, else 1.

    Element e of the tensor `key` is dropped from the i-th change (from 0) where draw e of the stream
    ("dare", seed, i, key) is below drop · 2⁶⁴.
    """
    drop, seed = call.numbers
    places = np.arange(chunk.begin, chunk.begin + chunk.last - chunk.first, dtype=np.uint64)
    total, kept = np.zeros(places.size), np.zeros(places.size)
    for number, argument in enumerate(arguments):
        mask = draws(stream_key("dare", int(seed), number, tensor.key), places) >= np.uint64(int(drop * 2**64))
        total += np.where(mask, argument, 0.0)
        kept += mask
    return np.asarray(total / np.maximum(kept, 1) / float(1 - drop))


def ties(tensor: TensorFunctions, call: Call, arguments: list[Array], chunk: Chunk) -> Array:
    """The mean, element by element, of the changes that have the elected sign, of each only the largest share `k`.

    Elected is the sign of most changes, or of their sum (mass 1); numbers that are not kept count as 0.
    """
    limits, by_mass = tensor.facts[call], bool(call.numbers[1])
    total, chosen = np.zeros(chunk.last - chunk.first), np.zeros(chunk.last - chunk.first)
    votes = np.zeros_like(total)
    kept = [np.where(np.abs(each) >= limit, each, 0.0) for each, limit in zip(arguments, limits, strict=True)]
    for each in kept:
        votes += each if by_mass else np.sign(each)
    elected = np.sign(votes)
    for each in kept:
        agrees = np.sign(each) == elected
        total += np.where(agrees, each, 0.0)
        chosen += agrees
    return np.asarray(total / np.maximum(chosen, 1))


FUNCTIONS = {"train_difference": train_difference, "cosine": cosine, "slerp": slerp, "dare": dare, "ties": ties}
GATHERERS: dict[str, Callable[[TensorFunctions, Call], Any]] = {
    "cosine": products_of_columns,
    "slerp": products,
    "ties": thresholds,
}
