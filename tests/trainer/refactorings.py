"""Refactorings of a checkout as its developers may make them: edits of syntax trees on a copy, made at test time."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from pathlib import Path

from kohaku_wrap.trainer.anchors import TRAINER
from kohaku_wrap.trainer.corrections import find_scope, source_files

Edit = Callable[[Path], None]


def edit_file(path: Path, change: Callable[[ast.Module], None]) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    change(tree)
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)), encoding="utf-8")


def file_of(checkout: Path, name: str) -> Path:
    """The file that defines a class or function of that name."""
    for path in source_files(checkout):
        if find_scope(ast.parse(path.read_text(encoding="utf-8")), name):
            return path
    raise LookupError(name)


def edit_scope(within: str, change: Callable[[ast.FunctionDef], None]) -> Edit:
    """An edit of one function, wherever it is defined."""

    def edit(checkout: Path) -> None:
        def change_tree(tree: ast.Module) -> None:
            scope = find_scope(tree, within)
            assert isinstance(scope, ast.FunctionDef)
            change(scope)

        edit_file(file_of(checkout, within.split(".")[0]), change_tree)

    return edit


def rename(within: str, old: str, new: str) -> Edit:
    """Another name for a variable of one function; of a whole class where `within` names one."""

    def change(tree: ast.Module) -> None:
        scope = find_scope(tree, within)
        assert scope
        found = [node for node in ast.walk(scope) if isinstance(node, ast.Name) and node.id == old]
        assert found
        for node in found:
            node.id = new

    return lambda checkout: edit_file(file_of(checkout, within.split(".")[0]), change)


def find_branch(function: ast.FunctionDef, held: str) -> tuple[list[ast.stmt], int]:
    """The list of statements and the place in it of the `if` whose body begins with a test of `held`."""
    for node in ast.walk(function):
        for field in ("body", "orelse"):
            statements = getattr(node, field, None)
            for place, statement in enumerate(statements if isinstance(statements, list) else []):
                first = statement.body[0] if isinstance(statement, ast.If) else None
                if isinstance(first, ast.If) and ast.unparse(first.test) == held:
                    assert isinstance(statements, list)
                    return statements, place
    raise LookupError(held)


SKIP = "args.skip_until_initial_step"


def move_block(checkout: Path) -> None:
    """The block that finds the first epoch, in a method of its own."""

    def change(tree: ast.Module) -> None:
        train, trainer = find_scope(tree, f"{TRAINER}.train"), find_scope(tree, TRAINER)
        assert isinstance(train, ast.FunctionDef) and isinstance(trainer, ast.ClassDef)
        statements, place = find_branch(train, SKIP)
        block = statements[place]
        head = "def find_first_epoch(self, args, train_dataloader, initial_step):\n    epoch_to_start = 0\n"
        [method] = ast.parse(head + "    return (initial_step, epoch_to_start)").body
        assert isinstance(method, ast.FunctionDef)
        method.body.insert(1, block)
        call = "initial_step, epoch_to_start = self.find_first_epoch(args, train_dataloader, initial_step)"
        statements[place] = ast.parse(call).body[0]
        trainer.body.append(method)

    edit_file(file_of(checkout, TRAINER), change)


def move_function(name: str) -> Edit:
    """A function or class in a new module, and imported from where it was."""

    def edit(checkout: Path) -> None:
        path = file_of(checkout, name)

        def change(tree: ast.Module) -> None:
            [(place, node)] = [
                (place, node) for place, node in enumerate(tree.body) if getattr(node, "name", None) == name
            ]
            neighbours = {str(each.name) for each in tree.body if isinstance(each, ast.FunctionDef | ast.ClassDef)}
            used = neighbours & {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
            if used and isinstance(node, ast.FunctionDef):
                # When it is called, so that neither module needs the other at import.
                node.body[:0] = ast.parse(f"from library.{path.stem} import {', '.join(sorted(used))}").body
            imports = [each for each in tree.body if isinstance(each, ast.Import | ast.ImportFrom)]
            imports = [each for each in imports if getattr(each, "module", "") != "__future__"]
            logger = ast.parse("import logging\nlogger = logging.getLogger(__name__)").body
            moved = ast.Module(body=[*imports, *logger, node], type_ignores=[])
            (checkout / "library" / f"moved_{name}.py").write_text(ast.unparse(moved), encoding="utf-8")
            tree.body[place] = ast.parse(f"from library.moved_{name} import {name}").body[0]

        edit_file(path, change)

    return edit


def add_argument(within: str, default: str | None) -> Edit:
    """One argument more, with or without a default."""

    def change(function: ast.FunctionDef) -> None:
        function.args.kwonlyargs.append(ast.arg("added"))
        function.args.kw_defaults.append(ast.parse(default, mode="eval").body if default else None)

    return edit_scope(within, change)


def add_lines(within: str, lines: str, place: int = 0) -> Edit:
    """Lines more at the beginning of a function."""
    return edit_scope(within, lambda function: function.body.__setitem__(slice(place, place), ast.parse(lines).body))


def fix_2425(checkout: Path) -> None:
    """The first epoch is computed before the steps become micro-batches, as the fix of the trainer's #2407 does."""

    def change(function: ast.FunctionDef) -> None:
        statements, place = find_branch(function, SKIP)
        branch = statements[place]
        assert isinstance(branch, ast.If) and isinstance(branch.body[0], ast.If)
        body = branch.body[0].body
        [times] = [each for each in body if isinstance(each, ast.AugAssign)]
        body.remove(times)
        body.append(times)

    edit_scope(f"{TRAINER}.train", change)(checkout)


def draw_once_more(checkout: Path) -> None:
    """Other noise, with every place as kwrap knows it: one number is drawn before it."""
    add_lines("get_noise_noisy_latents_and_timesteps", "torch.rand(1)")(checkout)


def in_order(edits: Sequence[Edit]) -> Edit:
    def edit(checkout: Path) -> None:
        for each in edits:
            each(checkout)

    return edit
