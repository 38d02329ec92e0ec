"""Every small fault that cosmic-ray's operators make of a file, and a draw of some."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEVER_CHANGED = {"name", "string", "newline", "endmarker", "fstring_string", "fstring_start", "fstring_end"}
"""Kinds of parso's nodes that no operator mutates."""

NEEDS_ARGUMENTS = {"core/VariableReplacer", "core/VariableInserter"}
"""Operators that must be told names of variables."""


@dataclass(frozen=True)
class Mutant:
    """One planted fault."""

    file: str
    """Below the project's root."""

    operator: str
    """cosmic-ray's name of it."""

    line: int
    """From 1; for people, never for matching."""

    before: str
    """The changed lines as they are, stripped."""

    after: str
    """The same with the fault; empty where they are taken away."""

    source: str = field(repr=False, compare=False)
    """The whole file with the fault."""

    reason: str = ""
    """Why it changes nothing, if mutants.toml says so."""


@dataclass(frozen=True)
class Place:
    """Where an operator can plant a fault, which is not made yet: making one means to parse a statement anew."""

    file: str
    operator: str

    piece: int
    """The statement of the module, from 0."""

    line: int
    """In the statement, from 1."""

    occurrence: int
    """Of the operator in the statement, from 0."""

    key: bytes
    """What draws are ordered by: of the seed, the operator and the statement's own text, so that an edit of another
    statement draws the same faults again."""


class Source:
    """A file that faults are planted in."""

    def __init__(self, file: str, text: str, seed: int) -> None:
        from cosmic_ray.ast import get_ast

        self.file = file
        self.pieces = [child.get_code() for child in get_ast(text).children]
        self.places = sorted(
            (place for piece in range(len(self.pieces)) for place in self._find_places(piece, seed)),
            key=lambda place: place.key,
        )
        self.made = {text}

    def _find_places(self, piece: int, seed: int) -> Iterator[Place]:
        from cosmic_ray.ast import ast_nodes, get_ast
        from cosmic_ray.plugins import get_operator, operator_names

        text = self.pieces[piece]
        nodes = [node for node in ast_nodes(get_ast(text)) if node.type not in NEVER_CHANGED]
        for name in operator_names():
            if name in NEEDS_ARGUMENTS:
                continue
            operator = get_operator(name)()
            places = ((node, begin) for node in nodes for begin, _ in operator.mutation_positions(node))
            for occurrence, (node, (line, _)) in enumerate(places):
                if not is_annotation(node):
                    words = "\x1f".join((str(seed), self.file, name, text, str(occurrence)))
                    key = hashlib.blake2b(words.encode(), digest_size=8).digest()
                    yield Place(self.file, name, piece, line, occurrence, key)

    def plant(self, place: Place, reasons: dict[tuple[str, str, str], str]) -> Mutant | None:
        """The mutant; None where it is no program, or one that was made before."""
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        text = self.pieces[place.piece]
        mutated = mutate_code(text, get_operator(place.operator)(), place.occurrence)
        head, tail = "".join(self.pieces[: place.piece]), "".join(self.pieces[place.piece + 1 :])
        whole = f"{head}{mutated}{tail}"
        try:
            if whole in self.made:
                return None
            ast.parse(whole)
        except SyntaxError:
            return None
        self.made.add(whole)
        before, after = changed_lines(text, mutated)
        reason = reasons.get((self.file, before, after), "")
        return Mutant(self.file, place.operator, place.line + head.count("\n"), before, after, whole, reason)


def is_annotation(node: Any) -> bool:
    """Whether the node is part of an annotation, which nothing evaluates."""
    while node.parent is not None:
        parent = node.parent
        if parent.type in ("annassign", "tfpdef") and node is not parent.children[0]:
            # `name: annotation = value` has its value in the same node.
            return parent.type == "tfpdef" or node is parent.children[1]
        if parent.type == "funcdef" and parent.annotation is node:
            return True
        node = parent
    return False


def changed_lines(source: str, mutated: str) -> tuple[str, str]:
    """The lines taken away and those put in, each without its indent."""
    before, after = source.splitlines(), mutated.splitlines()
    while before and after and before[0] == after[0]:
        del before[0], after[0]
    while before and after and before[-1] == after[-1]:
        del before[-1], after[-1]
    return "\n".join(line.strip() for line in before), "\n".join(line.strip() for line in after)


def draw_mutants(
    sources: Sequence[Source], limit: int, reasons: dict[tuple[str, str, str], str]
) -> dict[str, list[Mutant]]:
    """At most `limit` (0: all) mutants of each folder; every file's first one, then as they come."""
    drawn: dict[str, list[Mutant]] = {source.file: [] for source in sources}
    for room in dict.fromkeys(Path(source.file).parent for source in sources):
        of_room = {source.file: source for source in sources if Path(source.file).parent == room}
        firsts = [source.places[0] for source in of_room.values() if source.places]
        rest = sorted((place for one in of_room.values() for place in one.places[1:]), key=lambda place: place.key)
        left = limit or len(firsts) + len(rest)
        for place in (*firsts, *rest):
            if left and (mutant := of_room[place.file].plant(place, reasons)):
                drawn[place.file].append(mutant)
                left -= 1
    return drawn
