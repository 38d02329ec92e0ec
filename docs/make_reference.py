"""Write docs/commands.md, the reference of all commands, from the help that they print: `make docs`.

With `--check` nothing is written, and the exit code is 1 where the page is not current.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from kohaku_wrap.cli import SECTIONS, program

PAGE = Path(__file__).with_name("commands.md")
COLUMNS = 80

HEAD = """\
# Commands

Made from the commands themselves by `make docs`; a test holds this page to them. Options that all have:
`--json` prints exactly one JSON document with a `schema_version`, `--help` explains.

| exit code | means |
|---|---|
| 0 | done |
| 1 | an expected failure; the message ends in what to do next |
| 2 | wrong arguments |
| 3 | the trainer failed; its last lines are shown |
| 130 | interrupted; what was finished is kept |
| 141 | nobody reads the output any more, as with `head` after a pipe, and the output was all there was to do |
"""


def iterate_commands(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Context]]:
    """A command and those below it, each with the words that lead to it."""
    yield context.command_path, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None:
                yield from iterate_commands(found, new_context(found, name, context))


def new_context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    """A context whose help is as wide on every terminal."""
    settings = {**program.context_settings, "max_content_width": COLUMNS}
    return click.Context(command, info_name=name, parent=parent, terminal_width=COLUMNS, **settings)


def write_help(path: str, context: click.Context, depth: int) -> list[str]:
    """A heading and the command's own help."""
    lines = [line.rstrip() for line in context.get_help().splitlines()]
    return [f"{'#' * depth} {path}", "", "```text", *lines, "```", ""]


def make_reference() -> str:
    """The whole page."""
    root = new_context(program, "kwrap", None)
    lines = [*HEAD.splitlines(), "", *write_help("kwrap", root, 2)]
    for section, names in SECTIONS.items():
        lines += [f"## {section}", ""]
        for name in names:
            command = program.get_command(root, name)
            if command is not None:
                for path, context in iterate_commands(command, new_context(command, name, root)):
                    lines += write_help(path, context, 3)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(PAGE.read_text(encoding="utf-8") != make_reference())
    PAGE.write_text(make_reference(), encoding="utf-8")
    print(f"wrote {PAGE}")
