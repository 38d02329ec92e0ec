"""Find the anchors in the trainer's source and correct its loop, on syntax trees.

A syntax tree is compared, never text: comments and layout may differ between commits, the statements may
not. Each anchor must match exactly once.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound
from kohaku_wrap.trainer.anchors import ANCHORS, LOOP_ANCHORS, TRAIN, Anchor

FRESH_CHECKOUT = "Install a fresh checkout: kwrap trainer install"


class AnchorsMissing(ProblemsFound):
    """The trainer's source is not one that kwrap can correct."""


class SourceUnreadable(KwrapError):
    """A file of the checkout is not there or is not Python."""


@dataclass(frozen=True)
class AnchorMatch:
    """How often an anchor was found."""

    anchor: Anchor
    """The anchor looked for."""

    count: int
    """Matches found; 1 is right."""


def match_anchors(checkout: Path, anchors: Sequence[Anchor] = ANCHORS) -> list[AnchorMatch]:
    """Look for every anchor in the checkout's source, without running any of it."""
    texts = {name: read_source(checkout / name) for name in {anchor.file: None for anchor in anchors}}
    return [AnchorMatch(anchor, count_nodes(texts[anchor.file], checkout / anchor.file, anchor)) for anchor in anchors]


def require_anchors(checkout: Path, commit: str, supported: str, anchors: Sequence[Anchor] = ANCHORS) -> None:
    """Raise AnchorsMissing, naming the commit, each anchor and the supported commits, unless each stands once."""
    problems = [
        Problem(match.anchor.name, f"found {match.count} times in {match.anchor.file}, must be 1")
        for match in match_anchors(checkout, anchors)
        if match.count != 1
    ]
    if problems:
        raise AnchorsMissing(
            f"sd-scripts {commit} at {checkout}",
            problems,
            f"Supported: {supported}. Install one: kwrap trainer install",
        )


def read_source(path: Path) -> str:
    """The text of one file; raises SourceUnreadable."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceUnreadable(f"{path}: {error}", FRESH_CHECKOUT) from error


def parse_source(text: str, path: Path) -> ast.Module:
    """The syntax tree of that file's text; raises SourceUnreadable."""
    try:
        return ast.parse(text, filename=str(path))
    except SyntaxError as error:
        raise SourceUnreadable(f"{path}: {error}", FRESH_CHECKOUT) from error


@cache
def parse_once(text: str, path: Path) -> ast.Module:
    """The syntax tree to look at; whoever changes one takes a tree of his own."""
    return parse_source(text, path)


@cache
def count_nodes(text: str, path: Path, anchor: Anchor) -> int:
    """How often the anchor stands in that text; a process that looks again need not walk the tree again."""
    return len(find_nodes(parse_once(text, path), anchor))


def find_nodes(tree: ast.Module, anchor: Anchor) -> list[ast.AST]:
    """The nodes of `tree` that the anchor describes; statements inside nested functions count too."""
    scope = find_scope(tree, anchor.within)
    if scope is None:
        return []
    if anchor.kind == "definition":
        body = getattr(scope, "body", [])
        return [node for node in body if is_text(definition_text(node), anchor.text)]
    return [node for node in ast.walk(scope) if node is not scope and matches(node, anchor)]


def find_scope(tree: ast.Module, within: str) -> ast.AST | None:
    """The class or function of that dotted name, the last definition of each name winning."""
    scope: ast.AST = tree
    for name in filter(None, within.split(".")):
        named = [
            node
            for node in getattr(scope, "body", [])
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        ]
        if not named:
            return None
        scope = named[-1]
    return scope


def matches(node: ast.AST, anchor: Anchor) -> bool:
    """Whether this very node is what the anchor describes."""
    if anchor.kind == "statement":
        return isinstance(node, ast.Assign | ast.AugAssign) and ast.unparse(node) == anchor.text
    if anchor.kind == "expression":
        return isinstance(node, ast.Call) and is_text(ast.unparse(node), anchor.text)
    if anchor.kind == "calls":
        return isinstance(node, ast.Call) and ast.unparse(node.func) == anchor.text.removesuffix("()")
    if anchor.kind == "branch" and isinstance(node, ast.If) and ast.unparse(node.test) == anchor.text:
        return not anchor.holds or any(holds(child, anchor.holds) for child in node.body)
    return False


def holds(node: ast.stmt, text: str) -> bool:
    """Whether a statement directly in a branch is `text`, or tests it."""
    if isinstance(node, ast.If | ast.Assert):
        return ast.unparse(node.test) == text
    return ast.unparse(node) == text


def is_text(found: str, wanted: str) -> bool:
    """Whether the texts are equal, up to the `…` that a wanted one may end with."""
    beginning, any_rest, _ = wanted.partition("…")
    return found.startswith(beginning) if any_rest else found == wanted


def definition_text(node: ast.AST) -> str:
    """`name(argument, …)` of a function, `name(base, …)` of a class; empty for anything else."""
    if isinstance(node, ast.FunctionDef):
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        return f"{node.name}({', '.join(names)})"
    if isinstance(node, ast.ClassDef):
        return f"{node.name}({', '.join(ast.unparse(base) for base in node.bases)})"
    return ""


class Corrections(ast.NodeTransformer):
    """Puts each anchor's replacement in the anchor's place and counts them."""

    def __init__(self, anchors: Sequence[Anchor]) -> None:
        self.anchors = anchors
        self.counts = {anchor.name: 0 for anchor in anchors}

    def visit(self, node: ast.AST) -> ast.AST:
        for anchor in self.anchors:
            if anchor.replacement is not None and matches(node, anchor):
                self.counts[anchor.name] += 1
                return replacement_node(anchor, node)
        return super().generic_visit(node)


def replacement_node(anchor: Anchor, place: ast.AST) -> ast.AST:
    """The replacement's tree, with the line numbers of the place that it takes."""
    statement = ast.parse(anchor.replacement or "pass").body[0]
    for node in ast.walk(statement):
        ast.copy_location(node, place)
    if isinstance(place, ast.expr) and isinstance(statement, ast.Expr):
        return statement.value
    return statement


def correct_loop(source: Path, commit: str, supported: str) -> ast.Module:
    """A module that holds the corrected `train` alone, ready to be compiled in its own module's namespace.

    Line numbers are those of the file, so that a traceback points to the right line.
    Raises AnchorsMissing if a correction found its place other than once.
    """
    return correct_text(read_source(source), source, commit, supported)


@cache
def correct_text(text: str, source: Path, commit: str, supported: str) -> ast.Module:
    """The corrected module of that text, made once a process."""
    tree = parse_source(text, source)
    function = find_scope(tree, TRAIN)
    if not isinstance(function, ast.FunctionDef):
        raise AnchorsMissing(
            f"sd-scripts {commit}", [Problem(TRAIN, f"not found in {source}")], f"Supported: {supported}"
        )
    corrections = Corrections(LOOP_ANCHORS)
    function.body = [node for node in map(corrections.visit, function.body) if isinstance(node, ast.stmt)]
    problems = [
        Problem(name, f"found {count} times in {source.name}, must be 1")
        for name, count in corrections.counts.items()
        if count != 1
    ]
    if problems:
        raise AnchorsMissing(f"sd-scripts {commit} at {source.parent}", problems, f"Supported: {supported}")
    return ast.fix_missing_locations(ast.Module(body=[function], type_ignores=[]))
