"""Style prompts: files of `templates/styles` and a person's own, each style with a name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.config.templates import list_names, user_templates
from kohaku_wrap.errors import Problem, ProblemsFound, UsageError
from kohaku_wrap.files import shipped_folder
from kohaku_wrap.sampling.grammar import PromptError, parse_prompt
from kohaku_wrap.toml_files import TableReader, load_toml
from kohaku_wrap.wording import suggest


class UnknownStyle(UsageError):
    """No style of that name."""


@dataclass(frozen=True)
class Style:
    """One combination of artists."""

    name: str
    """What it is asked for by."""

    prompt: str
    """In the webui's grammar."""

    negative: str
    """What is added to the negative prompt; often empty."""

    file: Path
    """Where it stands."""


def list_styles() -> dict[str, Style]:
    """All styles by name; a person's own hide shipped ones. Raises ProblemsFound."""
    found: dict[str, Style] = {}
    for folder in (user_templates() / "styles", shipped_folder("templates") / "styles"):
        for name in list_names([folder]):
            found = {**{style.name: style for style in read_styles(folder / f"{name}.toml")}, **found}
    return found


def read_styles(path: Path) -> list[Style]:
    """The styles of a file. Raises ProblemsFound with every fault, UnreadableToml."""
    problems: list[Problem] = []
    top = TableReader("", load_toml(path), ("title", "notes", "styles"), problems)
    top.text("title")
    top.text("notes")
    styles = []
    for name in (tables := top.table("styles")):
        where = f"styles.{name}"
        table = tables[name]
        if not isinstance(table, dict):
            problems.append(Problem(where, f"must be a table: [{where}]"))
            continue
        reader = TableReader(where, table, ("prompt", "negative"), problems)
        style = Style(name, reader.text("prompt"), reader.text("negative"), path)
        for key in ("prompt", "negative"):
            try:
                parse_prompt(getattr(style, key))
            except PromptError as error:
                reader.fault(key, error.message)
        if not style.prompt:
            reader.fault("prompt", "is missing")
        styles.append(style)
    if problems:
        raise ProblemsFound(str(path), problems, "Compare with `kwrap prompt --style`, which shows the shipped ones.")
    return styles


def find_style(name: str) -> Style:
    """The style of a name, or of `FILE.toml:NAME`. Raises UnknownStyle, ProblemsFound."""
    file, sign, inner = name.rpartition(":")
    if sign and file.endswith(".toml"):
        if not Path(file).is_file():
            raise UnknownStyle(f"{file}: no such file of styles", "Check the path.")
        styles = {style.name: style for style in read_styles(Path(file))}
        name = inner
    else:
        styles = list_styles()
    if name not in styles:
        known = list(styles)
        raise UnknownStyle(
            f"no style is called {name}{suggest(name, known) or '; there are ' + ', '.join(known)}",
            "`kwrap prompt --style` lists and shows them all.",
        )
    return styles[name]
