"""Every command has help, an example, and a row in the guide."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kohaku_wrap.cli import SECTIONS, program

README = Path(__file__).parents[2] / "README.md"
GUIDE = README.parent / "docs" / "guide.md"


def leaf_commands(group: click.Group, words: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, with the words that lead to it."""
    context = click.Context(group)
    leaves = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        here = (*words, name)
        leaves += leaf_commands(command, here) if isinstance(command, click.Group) else [(here, command)]
    return leaves


LEAVES = leaf_commands(program)


@pytest.mark.parametrize("words,command", LEAVES, ids=[" ".join(words) for words, _ in LEAVES])
def test_a_command_explains_itself(words: tuple[str, ...], command: click.Command) -> None:
    help_text = command.help or ""
    assert help_text.splitlines()[0].endswith("."), "the first line is a sentence"
    shown = CliRunner().invoke(program, [*words, "--help"])
    assert shown.exit_code == 0
    assert "--json" in shown.output
    assert f"kwrap {' '.join(words)}" in (command.epilog or "") + help_text, "an example stands in the help"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{parameter.name} has no help"


@pytest.mark.parametrize("verb", [verb for verbs in SECTIONS.values() for verb in verbs])
def test_the_guide_has_a_row_for_every_verb(verb: str) -> None:
    assert re.search(rf"^\| `kwrap {verb}\b", GUIDE.read_text(), re.MULTILINE)


def test_the_readme_is_short_and_begins_with_what_matters() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 90
    beginning = "\n".join(lines[:25])
    assert all(word in beginning for word in ("make epsilon", "make test", "docs/pictures/", "SDXL"))


def test_the_list_of_commands_fits_a_narrow_terminal() -> None:
    shown = CliRunner().invoke(program, ["--help"], terminal_width=80)
    assert max(len(line) for line in shown.output.splitlines()) <= 80
    for verbs in SECTIONS.values():
        for verb in verbs:
            assert re.search(rf"^  {verb}\b", shown.output, re.MULTILINE)


def test_windows_itself_is_refused_in_one_message() -> None:
    planted = "import sys, kohaku_wrap.__main__ as program; sys.platform = 'win32'; program.main()"
    answer = subprocess.run([sys.executable, "-c", planted], capture_output=True, text=True)
    assert answer.returncode == 1 and answer.stdout == ""
    assert answer.stderr.startswith(
        "error: kwrap does not run on Windows itself\nRun it on Linux, or on Windows inside WSL2"
    )


def test_the_commands_load_no_large_library_and_not_most_rooms_before_they_run() -> None:
    program = (
        "import importlib, sys; from kohaku_wrap.cli import SECTIONS\n"
        "for names in SECTIONS.values():\n"
        "    for name in names: importlib.import_module(f'kohaku_wrap.cli.{name}')\n"
        "rooms = ('dataset', 'demo', 'evaluation', 'metadata', 'planning', 'proving', 'publishing', 'reporting')\n"
        "large = {'numpy', 'pyarrow', 'duckdb', 'PIL', 'torch', 'rich', *(f'kohaku_wrap.{room}' for room in rooms)}\n"
        "print(sorted(large & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"


def test_no_command_imports_another() -> None:
    """What several share lies in a module of its own; parts of a command begin with its name."""
    folder = README.parent / "kohaku_wrap" / "cli"
    imported = [
        (path.stem, node.module.removeprefix("kohaku_wrap.cli."))
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kohaku_wrap.cli.")
    ]
    verbs = [verb for names in SECTIONS.values() for verb in names]
    assert len(imported) > 50
    parts = {each: verb for _, each in imported for verb in verbs if each == verb or each.startswith(f"{verb}_")}
    assert [pair for pair in imported if pair[1] in parts and pair[0] != parts[pair[1]]] == []
