"""Whole files and folders of templates, presets and sites checked, none of their faults hiding another's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kohaku_wrap.config.checks import check_effective
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.layers import load_layers
from kohaku_wrap.config.network import check_preset
from kohaku_wrap.config.reading import Entry, shorten_path
from kohaku_wrap.config.site import TABLES, Site, load_site
from kohaku_wrap.config.templates import UnknownTemplate, find_template
from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound
from kohaku_wrap.files import expand_user, shipped_folder
from kohaku_wrap.toml_files import load_toml
from kohaku_wrap.trainer.options import OptionTable

NOT_TEMPLATES = ("merges",)
"""Folders beside templates whose files are something else."""


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


def check_files(
    names: Sequence[str], site: Site | None, table: OptionTable, trust: Sequence[str] = ()
) -> list[tuple[Path, list[Problem]]]:
    """Every file and its faults, in order; files under `presets` are checked as presets, site files as sites."""
    reports = []
    for path in list_files(names):
        if path.parent.name == "presets":
            problems = check_preset_file(path, table)
        elif is_site(path):
            problems = check_site_file(path, table)
        else:
            problems = check_template(path, site, table, trust)
        reports.append((path, problems))
    return reports


def is_site(path: Path) -> bool:
    """Whether a file has only the tables of a site, and one that no template has."""
    try:
        tables = set(load_toml(path))
    except KwrapError:
        return False
    return tables <= {*TABLES, "trust"} and bool(tables & {"paths", "machine"})


def check_site_file(path: Path, table: OptionTable) -> list[Problem]:
    """All faults of a site, those of its `[trainer]` among them."""
    try:
        return load_layers("sdxl-lokr", load_site(path), (), table)[1]
    except ProblemsFound as found:
        return [Problem(fault.where, fault.what, f"site {shorten_path(path)}") for fault in found.problems]


def check_template(path: Path, site: Site | None, table: OptionTable, trust: Sequence[str] = ()) -> list[Problem]:
    """All faults of one template, of its layers and of what they make together."""
    try:
        effective, problems = load_layers(path, site, (), table, trust)
        return problems + check_effective(effective)
    except ProblemsFound as found:
        return list(found.problems)
    except KwrapError as fault:
        return [Problem(path.name, fault.message, f"template {shorten_path(path)}")]


def load_for_trust(path: Path, site: Site | None, table: OptionTable, trust: Sequence[str]) -> Effective | None:
    """The template whose trusted code is named; None for other files, and where it cannot be read."""
    if path.parent.name == "presets" or is_site(path):
        return None
    try:
        return load_layers(path, site, (), table, trust)[0]
    except KwrapError:
        return None


def load_for_modules(path: Path, site: Site | None, table: OptionTable) -> Effective | None:
    """What the modules of a template or preset file are counted with; None where its preset cannot be read.

    A preset file is counted with the arguments of the base template.
    """
    if is_site(path):
        return None
    try:
        if path.parent.name != "presets":
            effective, _ = load_layers(path, site, (), table)
        else:
            base, _ = load_layers("sdxl-lokr", site, (), table)
            entry = Entry(path.stem, "preset", shorten_path(path))
            effective = dataclasses.replace(base, preset=load_toml(path), entries={**base.entries, "preset": entry})
    except KwrapError:
        return None
    return None if check_preset(effective) or not effective.preset else effective


def is_shipped_preset(preset: Mapping[str, Any]) -> bool:
    """Whether it says what a preset that came with kwrap says; those are counted by kwrap's own tests."""
    return any(load_toml(path) == preset for path in (shipped_folder("templates") / "presets").glob("*.toml"))


def check_preset_file(path: Path, table: OptionTable) -> list[Problem]:
    """All faults of one preset file."""
    try:
        preset = load_toml(path)
    except KwrapError as fault:
        return [Problem(path.name, fault.message, f"preset {shorten_path(path)}")]
    entry = Entry(path.stem, "preset", shorten_path(path))
    return check_preset(Effective(path.stem, path, "", (), {"preset": entry}, preset, table))
