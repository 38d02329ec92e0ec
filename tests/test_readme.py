"""Every command of the README that can run on this machine is run, in order, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(?P<mark><!-- needs: [^>]+ -->\n)?```sh\n(?P<body>.*?)```", re.DOTALL)


def commands_in(text: str) -> tuple[list[str], list[str]]:
    """The `kwrap` lines that can run anywhere, and those marked as needing more."""
    here, elsewhere = [], []
    for block in BLOCK.finditer(text):
        lines = [line.split("#")[0].strip() for line in block["body"].splitlines()]
        (elsewhere if block["mark"] else here).extend(line for line in lines if line.startswith("kwrap "))
    return here, elsewhere


HERE, ELSEWHERE = commands_in(README.read_text(encoding="utf-8"))


def test_the_readme_shows_commands_of_both_kinds() -> None:
    assert len(HERE) >= 10
    assert len(ELSEWHERE) >= 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_way_through_runs(tmp_path: Path) -> None:
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    for line in HERE:
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"$ {line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert (tmp_path / "world" / "baked.safetensors").is_file()


@pytest.mark.parametrize("line", ELSEWHERE)
def test_commands_that_need_more_at_least_parse(line: str) -> None:
    import shlex

    import click

    from kohaku_wrap.cli import program

    words = shlex.split(line)[1:]
    command: click.Command = program
    context = click.Context(program)
    while isinstance(command, click.Group):
        name = words.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"{line}: no command {name}"
        command, context = found, click.Context(found, parent=context, info_name=name)
    for parameter in command.params:
        # The files that the command names are the reader's own.
        if isinstance(parameter.type, click.Path):
            parameter.type = click.STRING
    command.make_context(context.info_name, words, parent=context.parent)
