"""Every small fault that cosmic-ray's operators make of a file, and a draw of some."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

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


def make_mutants(file: str, source: str, reasons: dict[tuple[str, str, str], str]) -> Iterator[Mutant]:
    """Every mutant of one file; of those alike one, and none of text that never runs, such as annotations."""
    from cosmic_ray.ast import get_ast

    seen = {source}
    pieces = [child.get_code() for child in get_ast(source).children]
    for number, piece in enumerate(pieces):
        head, tail = "".join(pieces[:number]), "".join(pieces[number + 1 :])
        running = running_code(piece)
        for operator, line, mutated in mutate_piece(piece):
            whole = head + mutated + tail
            if whole in seen:
                continue
            seen.add(whole)
            try:
                if running_code(mutated) == running:
                    continue
            except SyntaxError:
                continue
            before, after = changed_lines(piece, mutated)
            reason = reasons.get((file, before, after), "")
            yield Mutant(file, operator, line + head.count("\n"), before, after, whole, reason)


def mutate_piece(piece: str) -> Iterator[tuple[str, int, str]]:
    """Operator, line and text of every mutant of one statement of a module: it is parsed anew for each."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(get_ast(piece)))
    for name in operator_names():
        if name in NEEDS_ARGUMENTS:
            continue
        operator = get_operator(name)()
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, ((line, _), _) in enumerate(places):
            if mutated := mutate_code(piece, operator, occurrence):
                yield name, line, mutated


def running_code(source: str) -> str:
    """The program without its annotations, which nothing evaluates."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
    return ast.dump(tree)


def changed_lines(source: str, mutated: str) -> tuple[str, str]:
    """The lines taken away and those put in, each without its indent."""
    before, after = source.splitlines(), mutated.splitlines()
    while before and after and before[0] == after[0]:
        del before[0], after[0]
    while before and after and before[-1] == after[-1]:
        del before[-1], after[-1]
    return "\n".join(line.strip() for line in before), "\n".join(line.strip() for line in after)


def draw_mutants(mutants: dict[str, list[Mutant]], limit: int, seed: int) -> dict[str, list[Mutant]]:
    """At most `limit` (0: all) mutants of each folder; every file's first one, then as they come.

    A mutant's place depends on the seed and its own text alone, so an edit elsewhere draws the same ones again.
    """

    def place(mutant: Mutant) -> bytes:
        text = "\x1f".join((str(seed), mutant.file, mutant.operator, mutant.before, mutant.after))
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    ordered = {file: sorted(found, key=place) for file, found in mutants.items()}
    if not limit:
        return ordered
    drawn = {}
    for room in {Path(file).parent for file in ordered}:
        files = [file for file in ordered if Path(file).parent == room]
        rest = sorted((mutant for file in files for mutant in ordered[file][1:]), key=place)
        firsts = [mutant for file in files for mutant in ordered[file][:1]]
        chosen = [*firsts, *rest][:limit]
        drawn |= {file: [mutant for mutant in chosen if mutant.file == file] for file in files}
    return {file: drawn[file] for file in ordered}
