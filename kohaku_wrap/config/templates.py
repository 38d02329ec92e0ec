"""Where templates and presets are found: a path, then the user's folder, then those that came with kwrap."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.errors import UsageError, reason_of
from kohaku_wrap.files import describe_absence, expand_user, home_folder, shipped_folder
from kohaku_wrap.toml_files import UnreadableToml, load_toml
from kohaku_wrap.wording import suggest

KINDS = ("presets", "merges", "styles")
"""The folders of what is no template beside the shipped templates."""


class UnknownTemplate(UsageError):
    """No template or preset of that name or path."""


@dataclass(frozen=True)
class TemplateFile:
    """One template that can be named."""

    name: str
    """What to write on the command line."""

    path: Path
    """The file."""

    origin: str
    """`yours` or `shipped`."""

    title: str
    """Its own first words about itself; why it cannot be read, where that is so."""


def user_templates() -> Path:
    """The folder of a person's own templates."""
    return home_folder() / "templates"


def list_names(folders: Iterable[Path]) -> list[str]:
    """The names in these folders, the first folder's first, each once."""
    return list(dict.fromkeys(file.stem for folder in folders for file in list_toml(folder)))


def list_toml(folder: Path) -> list[Path]:
    """The folder's regular `*.toml` files by name."""
    return sorted(path for path in folder.glob("*.toml") if path.is_file())


def find_named(name: str | Path, kind: str, folders: list[Path], beside: Path | None = None) -> Path:
    """The file that `name` means. `beside`: the folder of the file that names it, below which a path must lie.

    A path is what ends in .toml or holds a separator. Raises UnknownTemplate.
    """
    text = str(name)
    if text.endswith(".toml") or "/" in text or "\\" in text:
        named = ", ".join(list_names(folders))
        if beside and climbs_out(text):
            raise UnknownTemplate(
                f"{text}: outside of {beside}: a template reads no file but those below its own folder and named ones",
                f"Copy it there, or into {user_templates()} to name it; now there are {named}.",
            )
        path = beside / text if beside else expand_user(text)
        if path.is_file():
            return path
        raise UnknownTemplate(
            f"{text}: {describe_absence(path, f'{kind} file')}", f"Check the path, or give a name: {named}."
        )
    for folder in folders:
        if (path := folder / f"{text}.toml").is_file():
            return path
    known = list_names(folders)
    listed = ", ".join(known) or "none"
    raise UnknownTemplate(
        f"no {kind} is called {text}{suggest(text, known) or f'; there are {listed}'}",
        f"Give one of {listed}, or the path of a .toml file.",
    )


def climbs_out(path: str) -> bool:
    """Whether the path, as it is written, is not one below the folder that it begins at; links are not followed."""
    return path.startswith(("~", "/")) or Path(os.path.normpath(path)).parts[:1] == ("..",)


def find_template(name: str | Path, beside: Path | None = None) -> Path:
    """The template's file: a path, then the user's folder, then the shipped ones."""
    folders = [user_templates(), shipped_folder("templates")]
    # A copy beside the template that extends it comes before the user's own of that name.
    return find_named(name, "template", [beside, *folders] if beside else folders, beside)


def find_preset(name: str | Path, beside: Path | None = None) -> Path:
    """The LyCORIS preset's file, looked up as templates are, in their `presets` folders."""
    folders = [user_templates() / "presets", shipped_folder("templates") / "presets"]
    return find_named(name, "preset", [beside / "presets", *folders] if beside else folders, beside)


def list_left_behind(source: Path, copy: Path) -> list[str]:
    """Templates and the preset that a template names, and that are not found from where its copy lies."""
    try:
        document = load_toml(source)
    except (UnreadableToml, OSError):
        return []
    bases = document.get("extends", [])
    named = [(find_template, base) for base in (bases if isinstance(bases, list) else [bases])]
    lost = []
    for find, name in (*named, (find_preset, document.get("preset"))):
        try:
            if isinstance(name, str):  # a preset may stand in the template itself
                find(name, copy.parent)
        except UnknownTemplate:
            lost.append(name)
    return lost


def find_source(name: str) -> Path:
    """The file to copy under this name: a template, else a preset or a merge recipe."""
    own, shipped = user_templates(), shipped_folder("templates")
    folders = [own, shipped, own / "presets", *(shipped / kind for kind in KINDS)]
    return find_named(name, "template, preset or merge recipe", folders)


def list_templates() -> list[TemplateFile]:
    """All templates that have a name; a person's own hide shipped ones of the same name."""
    found: dict[str, TemplateFile] = {}
    for origin, folder in (("yours", user_templates()), ("shipped", shipped_folder("templates"))):
        for path in list_toml(folder):
            if path.stem not in found:
                try:
                    title = str(load_toml(path).get("title", ""))
                except UnreadableToml as error:
                    title = f"cannot be read: {error.message.removeprefix(f'{path}: ')}"
                except OSError as error:
                    title = f"cannot be read: {reason_of(error)}"
                found[path.stem] = TemplateFile(path.stem, path, origin, title)
    return sorted(found.values(), key=lambda template: template.name)
