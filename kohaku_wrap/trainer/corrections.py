"""Find the anchors in the trainer's source and correct its loop, on syntax trees.

A syntax tree is compared, never text: comments and layout may differ between commits, the statements may
not. Each anchor must match exactly once in all of the trainer's scripts and library.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound, refusing
from kohaku_wrap.trainer.anchors import ANCHORS, LOOP, LOOP_ANCHORS, TRAINER, Anchor
from kohaku_wrap.trainer.commits import SUPPORTED_TEXT, TRAINING_SCRIPTS

FRESH_CHECKOUT = "Install a fresh checkout: kwrap trainer install"


class AnchorsMissing(ProblemsFound):
    """The trainer's source is not one that kwrap can correct."""


class SourceUnreadable(KwrapError):
    """A file of the checkout is not there or is not Python."""


@dataclass(frozen=True)
class AnchorMatch:
    """Where an anchor was found."""

    anchor: Anchor
    """The anchor looked for."""

    files: tuple[str, ...]
    """The file within the checkout of each match; one is right."""

    @property
    def count(self) -> int:
        """Matches found."""
        return len(self.files)


def match_anchors(checkout: Path, anchors: Sequence[Anchor] = ANCHORS) -> list[AnchorMatch]:
    """Look for every anchor in the checkout's source, without running any of it."""
    paths = source_files(checkout)
    texts = {path: read_source(path) for path in paths}
    return [
        AnchorMatch(
            anchor,
            tuple(
                path.relative_to(checkout).as_posix()
                for path in paths
                if anchor.file in ("", path.name) and may_hold(texts[path], anchor)
                for _ in range(count_nodes(texts[path], path, anchor))
            ),
        )
        for anchor in anchors
    ]


def source_files(checkout: Path) -> list[Path]:
    """The scripts and the library of the trainer: all that may hold an anchor."""
    return [*(checkout / name for name in TRAINING_SCRIPTS), *sorted((checkout / "library").rglob("*.py"))]


def may_hold(text: str, anchor: Anchor) -> bool:
    """Whether a file's text defines the name that holds the anchor, so that its tree is worth a look."""
    name = anchor.within.partition(".")[0] or anchor.text.partition("(")[0]
    return f"def {name}(" in text or f"class {name}" in text


def require_anchors(checkout: Path, commit: str) -> None:
    """Raise AnchorsMissing, naming the commit, each anchor and the supported commits, unless each stands once."""
    problems = [
        Problem(match.anchor.name, f"found {match.count} times in {where_looked(match)}, must be 1")
        for match in match_anchors(checkout)
        if match.count != 1
    ]
    if problems:
        raise AnchorsMissing(
            f"sd-scripts {commit} at {checkout}",
            problems,
            f"Supported: {SUPPORTED_TEXT}. Install one: kwrap trainer install",
        )


def where_looked(match: AnchorMatch) -> str:
    """The files that hold an anchor more than once, or the place that it is missing from."""
    return ", ".join(sorted(set(match.files))) or match.anchor.within or "its scripts and library"


def read_source(path: Path) -> str:
    """The text of one file; raises SourceUnreadable."""
    with refusing(SourceUnreadable, f"{path}:", FRESH_CHECKOUT):
        return path.read_text(encoding="utf-8")


def parse_source(text: str, path: Path) -> ast.Module:
    """The syntax tree of that file's text; raises SourceUnreadable."""
    with refusing(SourceUnreadable, f"{path}:", FRESH_CHECKOUT, SyntaxError):
        return ast.parse(text, filename=str(path))


parse_once = cache(parse_source)
"""The syntax tree to look at; whoever changes one takes a tree of his own."""


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
        return [node for node in getattr(scope, "body", []) if is_definition(node, anchor.text)]
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
        return isinstance(node, ast.Assign | ast.AugAssign | ast.Return) and is_text(ast.unparse(node), anchor.text)
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


def is_definition(node: ast.AST, wanted: str) -> bool:
    """Whether the node defines what `name(argument, …)` says: a function by its arguments, a class by its bases."""
    name, _, rest = wanted.removesuffix(")").partition("(")
    names = [each for each in rest.split(", ") if each]
    if isinstance(node, ast.ClassDef):
        return node.name == name and [ast.unparse(base).rpartition(".")[2] for base in node.bases] == names
    if not isinstance(node, ast.FunctionDef) or node.name != name:
        return False
    found = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    required = found[: len(found) - len(node.args.defaults)]
    required += [
        argument.arg
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        if default is None
    ]
    known = {*found, *(argument.arg for argument in node.args.kwonlyargs)}
    return {*names} - {"…"} <= known and ("…" in names or {*required} <= {*names})


class Corrections(ast.NodeTransformer):
    """Puts each anchor's replacement in the anchor's place and counts them."""

    def __init__(self, anchors: Sequence[Anchor]) -> None:
        self.counts = {anchor: 0 for anchor in anchors if anchor.replacement is not None}
        self.put: list[tuple[Anchor, ast.AST]] = []

    def visit(self, node: ast.AST) -> ast.AST:
        for anchor in self.counts:
            if matches(node, anchor):
                self.counts[anchor] += 1
                replacement = replacement_node(anchor, node)
                self.put.append((anchor, replacement))
                return replacement
        return super().generic_visit(node)


def replacement_node(anchor: Anchor, place: ast.AST) -> ast.AST:
    """The replacement's tree, with the line numbers of the place that it takes."""
    statement = ast.parse(anchor.replacement or "pass").body[0]
    for node in ast.walk(statement):
        ast.copy_location(node, place)
    if isinstance(place, ast.expr) and isinstance(statement, ast.Expr):
        return statement.value
    return statement


def correct_loop(checkout: Path, commit: str) -> ast.Module:
    """A module of the trainer's methods that hold the loop, corrected, ready to be compiled in its namespace.

    Line numbers are those of the file, so that a traceback points to the right line.
    Raises AnchorsMissing if a correction found its place other than once, or fits no more.
    """
    for path in source_files(checkout):
        text = read_source(path)
        if f"class {TRAINER}" in text and find_scope(parse_once(text, path), TRAINER):
            return correct_text(text, path, commit)
    raise AnchorsMissing(f"sd-scripts {commit}", [Problem(TRAINER, "not found")], f"Supported: {SUPPORTED_TEXT}")


@cache
def correct_text(text: str, source: Path, commit: str) -> ast.Module:
    """The corrected module of that text, made once a process."""
    trainer = find_scope(parse_source(text, source), TRAINER)
    corrections, corrected, problems = Corrections(LOOP_ANCHORS), list[ast.stmt](), list[Problem]()
    for method in getattr(trainer, "body", []):
        before = len(corrections.put)
        corrections.visit(method)
        if put := corrections.put[before:]:
            corrected.append(method)
            problems += find_loose_names(method, put)
    problems += [
        Problem(anchor.name, f"found {count} times in {source.name}, must be 1")
        for anchor, count in corrections.counts.items()
        if count != 1
    ]
    if problems:
        raise AnchorsMissing(f"sd-scripts {commit} at {source.parent}", problems, f"Supported: {SUPPORTED_TEXT}")
    return ast.fix_missing_locations(ast.Module(body=corrected, type_ignores=[]))


def find_loose_names(method: ast.AST, put: Sequence[tuple[Anchor, ast.AST]]) -> Iterator[Problem]:
    """Names that a replacement reads and its method never sets, or sets and its method never reads."""
    new = {id(node) for _, replacement in put for node in ast.walk(replacement)}
    used = [node for node in ast.walk(method) if isinstance(node, ast.Name) and id(node) not in new]
    read = {node.id for node in used if isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in used if isinstance(node.ctx, ast.Store)} | {LOOP, "range", "enumerate", "len"}
    bound |= {node.arg for node in ast.walk(method) if isinstance(node, ast.arg)}
    names = [(anchor, node) for anchor, tree in put for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound |= {node.id for _, node in names if isinstance(node.ctx, ast.Store)}
    for anchor, node in names:
        if node.id not in (read if isinstance(node.ctx, ast.Store) else bound):
            yield Problem(anchor.name, f"{node.id} has no other use in its method")
