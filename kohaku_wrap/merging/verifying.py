"""Random elements of a merge computed again in rationals and compared bit by bit."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.safetensors import BITS_OF_DTYPE
from kohaku_wrap.merging.arithmetic.kernels import BITS_DTYPES, as_numbers
from kohaku_wrap.merging.arithmetic.rounding import FORMATS, Combination, round_fraction
from kohaku_wrap.merging.pieces import RAW, Piece, Source
from kohaku_wrap.merging.worker import Worker
from kohaku_wrap.streams import draws, stream_key


class MismatchFound(KwrapError):
    """An element that is not what rational arithmetic gives."""


def number_of_bits(bits: bytes, kind: str) -> float:
    """The number that little-endian bytes stand for."""
    return float(as_numbers(np.frombuffer(bits, dtype=BITS_DTYPES[len(bits)]), FORMATS[kind])[0])


def draw_elements(pieces: Sequence[Piece], count: int) -> dict[int, list[int]]:
    """For pieces by place, the elements to check: spread evenly at random, always the same for the same plan."""
    ends = list(accumulate(piece.elements if piece.to != RAW else 0 for piece in pieces))
    total = ends[-1] if ends else 0
    if not total:
        return {}
    numbers = draws(stream_key("verify merge", total, len(pieces)), np.arange(count, dtype=np.uint64))
    chosen: dict[int, set[int]] = defaultdict(set)
    for number in numbers:
        position = int(number) % total
        place = bisect_right(ends, position)
        chosen[place].add(position - (ends[place] - pieces[place].elements))
    return {place: sorted(elements) for place, elements in sorted(chosen.items())}


def verify_elements_of(
    worker: Worker,
    pieces: Sequence[Piece],
    descriptor: int,
    data_start: int,
    count: int,
    on_done: Callable[[int], None],
) -> tuple[int, int]:
    """Check `count` random elements of a written merge; how many were checked, and how many DoRA or functions set.

    `on_done` is told how many bytes of the output lie behind. A network's delta counts as the float32 numbers that
    lycoris-lora computes. Raises MismatchFound.
    """
    checked = skipped = 0
    for place, elements in draw_elements(pieces, count).items():
        piece = pieces[place]
        on_done(piece.begin)
        if piece.terms or any(change.sets_weight for _, _, change in piece.deltas):
            skipped += len(elements)
            continue
        deltas = deltas_at(worker, piece, elements)
        sum_of = Combination.of(piece.coefficients + tuple(weight for _, weight, _ in piece.deltas))
        for element, added in zip(elements, deltas, strict=True):
            values = [read_number(worker, piece, source, element) for source in piece.sources]
            values += added
            at = data_start + piece.begin + element * piece.width
            found = number_of_bits(os.pread(descriptor, piece.width, at), piece.to)
            if np.isfinite(values).all():
                exact = round_fraction(sum_of.exact(values), FORMATS[piece.to])
                wanted = np.copysign(np.inf, float(sum_of.exact(values))) if exact is None else float(exact)
                if found != wanted:
                    key = worker.finder.key_at(at - data_start)
                    raise MismatchFound(
                        f"{key}: element {element} is {found!r}; rational arithmetic gives {wanted!r}",
                        "Nothing was written. Please report this with the formula and the types of the files.",
                    )
            checked += 1
    on_done(sum(piece.size_bytes for piece in pieces))
    return checked, skipped


def read_number(worker: Worker, piece: Piece, source: Source, element: int) -> float:
    width = BITS_OF_DTYPE[source.kind] // 8
    if source.columns:
        row, column = divmod(element, piece.elements // source.columns)
        element = column * source.columns + row
    buffer = np.empty(width, dtype=np.uint8)
    worker.files.read(source.name, source.begin + element * width, buffer)
    return number_of_bits(buffer.tobytes(), source.kind)


def deltas_at(worker: Worker, piece: Piece, elements: Sequence[int]) -> list[list[float]]:
    """For each element, what each network adds there before its coefficient."""
    columns = [worker.open_delta(name, each).at(np.array(elements)).tolist() for name, _, each in piece.deltas]
    return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in elements]
