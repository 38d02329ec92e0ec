"""One layer after another read into entries, with every fault of each: unknown, wrong type, twice, not allowed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.config.schema import TABLES
from kohaku_wrap.config.settings import (
    LITERALS_OF,
    LOOKS_LIKE_PATH,
    Setting,
    check_setting,
    find_misspelled_tables,
    find_option,
    is_owned,
    list_settings,
)
from kohaku_wrap.config.site import Site
from kohaku_wrap.config.templates import climbs_out, find_preset
from kohaku_wrap.errors import KwrapError, Problem
from kohaku_wrap.files import shipped_folder
from kohaku_wrap.toml_files import load_toml
from kohaku_wrap.trainer.options import OptionTable, UnfitValue, parse_literal, parse_text_for
from kohaku_wrap.wording import suggest

LENGTHS = ("max_train_steps", "max_train_epochs")
"""Two options that say how long a run is; the trainer would ignore the first beside the second."""


@dataclass(frozen=True)
class Entry:
    """A value and where it comes from."""

    value: Any
    """As the trainer needs it."""

    layer: str
    """`run`, `base`, `template`, `dataset`, `site` or `--set`."""

    file: str
    """The layer's file; empty for `--set`."""

    @property
    def origin(self) -> str:
        """Layer and file in one line."""
        return f"{self.layer} {self.file}".rstrip()


PARENT_OPTION = "network_weights"
"""A network to train on from: part of what a training is, so that a template may name it."""


class LayerReader:
    """Collects the entries and the faults of the layers, in their order."""

    def __init__(self, table: OptionTable) -> None:
        self.table = table
        self.entries: dict[str, Entry] = {}
        self.problems: list[Problem] = []
        self.preset_source: tuple[Any, str, Path | None] | None = None

    def read_file(self, path: Path, layer: str) -> None:
        """Put a template's values over those of the layers before it."""
        document = load_toml(path)
        file = shorten_path(path)
        origin = f"{layer} {file}"
        for name in ("title", "notes"):
            words = document.get(name, "")
            if not isinstance(words, str) and not (name == "notes" and isinstance(words, list)):
                self.problems.append(Problem(name, "must be text", origin))
        if "preset" in document:
            self.preset_source = (document["preset"], origin, path.parent)
            named = document["preset"] if isinstance(document["preset"], str) else "inline"
            self.entries["preset"] = Entry(named, layer, file)
        for name in find_misspelled_tables(document, self.table):
            self.problems.append(Problem(f"[{name}]", f"unknown table{suggest(name, TABLES)}", origin))
            del document[name]
        self.put(list(list_settings(document, self.table)), layer, file, networks=path.parent)

    def read_dataset(self, name: str) -> None:
        """Put the `[dataset_options]` of a dataset recipe, if it has them, over the template's."""
        path = Path(name) if name.endswith(".toml") else shipped_folder("datasets") / f"{name}.toml"
        if climbs_out(name):
            self.problems.append(Problem("kwrap.dataset", f"{name}: climbs out of its folder", "dataset"))
            return
        if not path.is_file():
            return
        document = load_toml(path)
        if options := document.get("dataset_options"):
            settings = list(list_settings({"dataset_options": options}, self.table))
            self.put(settings, "dataset", shorten_path(path))

    def read_site(self, site: Site) -> None:
        """Put the site's paths, workers and trainer options over the template's."""
        file = shorten_path(site.path)
        self.put(list(list_settings({"trainer": dict(site.trainer)}, self.table)), "site", file, site.path.parent)
        derived: dict[str, Any] = {
            "pretrained_model_name_or_path": str(site.paths.base_model),
            "vae": str(site.paths.vae) if site.paths.vae else None,
            "tokenizer_cache_dir": str(site.paths.tokenizers) if site.paths.tokenizers else None,
            "max_data_loader_n_workers": site.machine.workers,
        }
        workers = site.machine.workers
        if workers is None and (template := self.entries.get("max_data_loader_n_workers")):
            workers = template.value
        if workers == 0:
            # torch's loader refuses persistent workers where there are none.
            derived["persistent_data_loader_workers"] = False
        for key, value in derived.items():
            if value is not None:
                self.entries[key] = Entry(value, "site", file)

    def put(
        self,
        settings: list[Setting],
        layer: str,
        file: str,
        folder: Path | None = None,
        networks: Path | None = None,
    ) -> None:
        """Check each setting and put those that hold; `networks`: where the path of a network to begin with begins."""
        origin = f"{layer} {file}".rstrip()
        seen: dict[str, str] = {}
        given: dict[str, Entry] = {}
        for setting in settings:
            if setting.key in seen:
                self.problems.append(Problem(setting.where, f"set twice: also as {seen[setting.key]}", origin))
                continue
            seen[setting.key] = setting.where
            try:
                place = (networks or folder) if setting.key == PARENT_OPTION else folder
                value = check_setting(setting, self.table, place)
            except UnfitValue as fault:
                self.problems.append(Problem(setting.where, fault.message, origin))
                continue
            given[setting.key] = Entry(value, layer, file)
        self.lay_over(given)

    def lay_over(self, given: Mapping[str, Entry]) -> None:
        """Put one layer's entries over those before it; its steps end what they say of epochs, and the reverse."""
        for key, other in (LENGTHS, LENGTHS[::-1]):
            if key in given and given[key].value != 0 and other not in given:
                self.entries.pop(other, None)
        self.entries.update(given)

    def load_preset(self) -> dict[str, Any]:
        """The LyCORIS preset that the last layer named, from its file or inline."""
        if self.preset_source is None:
            return {}
        value, origin, folder = self.preset_source
        if isinstance(value, dict):
            return value
        try:
            if not isinstance(value, str):
                raise UnfitValue("must be a preset's name or a table")
            if LOOKS_LIKE_PATH.match(value):
                raise UnfitValue("a template holds no path: name the preset")
            return load_toml(find_preset(value, beside=folder))
        except KwrapError as fault:
            self.problems.append(Problem("preset", fault.message, origin))
            return {}


def read_override(text: str, table: OptionTable) -> tuple[dict[str, Entry], list[Problem]]:
    """The entry of one `--set KEY=VALUE`, typed as the option is, and its faults."""
    written, equals, raw = text.partition("=")
    written = written.strip()
    if not equals or not written:
        return {}, [Problem(text, "is not KEY=VALUE", "--set")]
    prefix, _, name = written.rpartition(".")
    # A section's name is for people: training.learning_rate means learning_rate.
    key = written if not prefix or prefix.split(".")[0] in TABLES else name
    if key in table.dataset_options and not is_owned(key):
        key = f"dataset_options.{key}"
    try:
        option = find_option(key, table)
        if option and not is_owned(key):
            value = parse_text_for(option, raw.strip())
        else:
            value = LITERALS_OF.get(prefix, parse_literal)(raw.strip())
        if prefix == "preset":
            raise UnfitValue("a preset's keys cannot be set here: write a preset of your own and name it")
        if key == "preset":
            return {key: Entry(raw.strip().strip("\"'"), "--set", "")}, []
        checked = check_setting(Setting(written, key, value), table, Path.cwd())
    except UnfitValue as fault:
        return {}, [Problem(written, fault.message, "--set")]
    return {key: Entry(checked, "--set", "")}, []


def shorten_path(path: Path) -> str:
    """The path as a person would write it from here; shipped templates by their file's name."""
    path = Path(os.path.realpath(path))  # not resolve, which fails at a link to itself
    shipped = shipped_folder("templates")
    for root in (shipped, Path.cwd(), shipped.parent):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return str(path)
