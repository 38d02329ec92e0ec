"""Whole files and folders of templates, presets and sites checked, none of their faults hiding another's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kohaku_wrap.config.checks import check_effective
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.layers import load_layers
from kohaku_wrap.config.network import find_preset_faults
from kohaku_wrap.config.reading import Entry, shorten_path
from kohaku_wrap.config.site import TABLES, Site, load_site
from kohaku_wrap.config.templates import UnknownTemplate, find_template
from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound, reason_of
from kohaku_wrap.files import expand_user, shipped_folder
from kohaku_wrap.toml_files import load_toml
from kohaku_wrap.trainer.options import OptionTable

NOT_TEMPLATES = ("merges", "styles")
"""Folders beside templates whose files are something else."""

BASE = "sdxl-lokr"
"""The template that a preset or a site is tried with."""


def list_files(names: Iterable[str]) -> list[Path]:
    """The template and preset files that names, files and folders mean. Raises UnknownTemplate."""
    files: list[Path] = []
    for name in names:
        folder = expand_user(name)
        if not folder.is_dir():
            files.append(find_template(name))
            continue
        found = [
            path
            for path in sorted(folder.rglob("*.toml"))
            if not set(path.relative_to(folder).parts[:-1]) & set(NOT_TEMPLATES)
        ]
        if not found:
            raise UnknownTemplate(f"{name}: no .toml file in this folder", "Name a folder of templates, or a file.")
        files += found
    return list(dict.fromkeys(files))


def check_files(names: Sequence[str], site: Site | None, table: OptionTable) -> list[tuple[Path, list[Problem]]]:
    """Every file and its faults, in order."""
    return [(path, check_file(path, site, table)[0]) for path in list_files(names)]


def check_file(
    path: Path, site: Site | None, table: OptionTable, trust: Sequence[str] = ()
) -> tuple[list[Problem], Effective | None]:
    """All faults of a file, and what it makes; None for a site, and where it cannot be read.

    Files under `presets` are checked as presets, which make what they do of the base template; site files as sites.
    """
    kind = kind_of(path)
    entry = Entry(path.stem, "preset", shorten_path(path))
    try:
        if kind == "site":
            effective, problems = load_layers(BASE, load_site(path), (), table)
            return problems + [each for each in check_effective(effective) if each.layer.startswith("site ")], None
        if kind == "template":
            effective, problems = load_layers(path, site, (), table, trust)
            return problems + check_effective(effective), effective
        alone = Effective(path.stem, path, "", (), {"preset": entry}, load_toml(path), table)
        base, _ = load_layers(BASE, site, (), table)
        on_base = dataclasses.replace(base, preset=alone.preset, entries={**base.entries, "preset": entry})
        return alone.blame(find_preset_faults(alone)), on_base
    except ProblemsFound as found:
        if kind == "template":
            return list(found.problems), None
        return [Problem(fault.where, fault.what, f"site {shorten_path(path)}") for fault in found.problems], None
    except KwrapError as fault:
        return [Problem(path.name, fault.message, f"{kind} {shorten_path(path)}")], None
    except OSError as fault:
        return [Problem(path.name, reason_of(fault), f"{kind} {shorten_path(path)}")], None


def kind_of(path: Path) -> str:
    """What a file is checked as: `template`, `preset` or `site`."""
    return "preset" if path.parent.name == "presets" else "site" if is_site(path) else "template"


def is_site(path: Path) -> bool:
    """Whether a file has only the tables of a site, and one that no template has."""
    with suppress(KwrapError, OSError):
        tables = set(load_toml(path))
        return tables <= {*TABLES, "trust"} and bool(tables & {"paths", "machine"})
    return False


def is_shipped_preset(preset: Mapping[str, Any]) -> bool:
    """Whether it says what a preset that came with kwrap says; those are counted by kwrap's own tests."""
    return any(load_toml(path) == preset for path in (shipped_folder("templates") / "presets").glob("*.toml"))
