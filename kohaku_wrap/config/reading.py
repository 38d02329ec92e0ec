"""One layer after another read into entries, with every fault of each: unknown, wrong type, twice, not allowed."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.config.fates import fate_of_key
from kohaku_wrap.config.schema import (
    ARGUMENT_TABLES,
    EFFECTIVE_BATCH,
    HEADER_KEYS,
    NAME_OPTIONS,
    OPTION_OF_DATASET_FILE,
    OWN_TABLES,
    PATH_OPTIONS,
    SECRET_OPTIONS,
    TABLES,
    UPLOADING_LOGS,
)
from kohaku_wrap.config.site import Site, find_path
from kohaku_wrap.config.templates import climbs_out, find_preset
from kohaku_wrap.config.trainer_arguments import render_literal
from kohaku_wrap.errors import KwrapError, Problem
from kohaku_wrap.files import shipped_folder
from kohaku_wrap.toml_files import load_toml
from kohaku_wrap.trainer.builtin_options import is_literal
from kohaku_wrap.trainer.options import (
    Option,
    OptionTable,
    UnfitValue,
    check_value,
    parse_argument,
    parse_literal,
    parse_text_for,
    suggest,
)

LENGTHS = ("max_train_steps", "max_train_epochs")
"""Two options that say how long a run is; the trainer would ignore the first beside the second."""

LITERALS_OF: Mapping[str, Callable[[str], Any]] = {
    "optimizer_args": parse_argument,
    "lr_scheduler_args": parse_argument,
}
"""How values of these tables are read where they are text; LyCORIS converts those of network_args itself."""

LOOKS_LIKE_PATH = re.compile(r"^(~|/|\.{1,2}/|[A-Za-z]:[\\/])")


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


@dataclass(frozen=True)
class Setting:
    """One line of a layer, before it is checked."""

    where: str
    """Table and key as the person wrote them."""

    key: str
    """The canonical key."""

    value: Any
    """The TOML value."""


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


def find_misspelled_tables(document: dict[str, Any], table: OptionTable) -> list[str]:
    """Sections that are named nearly like a table with a meaning and hold what is no option."""
    return [
        name
        for name, value in document.items()
        if isinstance(value, dict)
        and name not in TABLES
        and difflib.get_close_matches(name, TABLES, n=1, cutoff=0.85)
        and any(key not in table.options for key in value)
    ]


def list_settings(document: dict[str, Any], table: OptionTable) -> Iterator[Setting]:
    """Every line of a template as a setting with its canonical key."""
    for name, value in document.items():
        if name in HEADER_KEYS or name == "preset":
            continue
        if not isinstance(value, dict):
            yield from canonical_settings(name, name, value, table)
        elif name == "dataset_options" or name in OWN_TABLES or name in ARGUMENT_TABLES:
            yield from (Setting(f"{name}.{key}", f"{name}.{key}", item) for key, item in value.items())
        else:
            for key, item in value.items():
                yield from canonical_settings(key, f"{name}.{key}", item, table)


def canonical_settings(key: str, where: str, value: Any, table: OptionTable) -> Iterator[Setting]:
    """A line of a section: an option, or one that belongs to dataset.toml, or a list of `key=value` strings."""
    if key in ARGUMENT_TABLES and isinstance(value, list) and all(isinstance(item, str) for item in value):
        parse = LITERALS_OF.get(key, parse_literal)
        for item in value:
            name, equals, text = item.partition("=")
            yield Setting(where, f"{key}.{name.strip()}" if equals else key, parse(text.strip()))
    elif key in table.dataset_options and key in table.options:
        yield Setting(where, f"dataset_options.{key}", value)
    else:
        yield Setting(where, key, value)


def find_option(key: str, table: OptionTable) -> Option | None:
    """The option behind a canonical key; None where there is none."""
    if key == "effective_batch":
        return EFFECTIVE_BATCH
    if key in table.options:
        return table.options[key]
    prefix, _, name = key.partition(".")
    if prefix == "dataset_options":
        return table.dataset_options.get(name)
    return OWN_TABLES.get(prefix, {}).get(name)


def check_setting(setting: Setting, table: OptionTable, folder: Path | None) -> Any:
    """The value that a setting gives, or UnfitValue that says what is wrong with it.

    `folder`: where relative paths begin, which become absolute; None where no path is allowed.
    """
    key, value = setting.key, setting.value
    prefix, _, name = key.partition(".")
    fate = fate_of_key(key)
    if fate is not None and fate.given_by:
        raise UnfitValue(f"not for a template: it {fate.given_by}")
    if fate is not None and fate.kind == "refused" and not is_trainers_default(key, value, table):
        raise UnfitValue(fate.reason)
    if key in SECRET_OPTIONS:
        raise UnfitValue("a token or an upload is this machine's own: put it under [secrets] in site.toml")
    if folder is None and key == "log_with" and value in UPLOADING_LOGS:
        raise UnfitValue(f'"{value}" sends logs away: put it under [trainer] in site.toml')
    if folder is None and key in NAME_OPTIONS and isinstance(value, str) and {"/", "\\"} & set(value):
        raise UnfitValue("becomes a part of file names: it may hold no slash")
    if folder is None and (key in PATH_OPTIONS or looks_like_path(value)):
        raise UnfitValue("a template holds no path: put it under [trainer] in site.toml")
    if prefix in ARGUMENT_TABLES:
        if not name:
            raise UnfitValue(f"must be a table: [{prefix}]")
        if not is_literal(render_literal(value)):
            raise UnfitValue(f"{value} cannot be written as the trainer reads it: give numbers, texts, true or false")
        return value
    option = find_option(key, table)
    if option is None:
        raise UnfitValue(f"unknown option{suggest_key(key, table)}")
    if key == "dataset_options.resolution" and isinstance(value, str):
        value = [parse_literal(part.strip()) for part in value.split(",")]
        value = value[0] if len(value) == 1 else value
    checked = check_value(option, value)
    if key == "effective_batch" and checked < 1:
        raise UnfitValue(f"{checked} is below 1")
    if folder is not None and key in PATH_OPTIONS:
        # The trainer reads it in the run's folder.
        several = isinstance(checked, list)
        return [find_path(each, folder) for each in checked] if several else find_path(checked, folder)
    return checked


def is_owned(key: str) -> bool:
    """Whether kwrap sets the option itself."""
    fate = fate_of_key(key)
    return fate is not None and bool(fate.given_by)


def is_trainers_default(key: str, value: Any, table: OptionTable) -> bool:
    """Whether a refused option is set to what the trainer does anyway, which leaves nothing undone."""
    option = find_option(key, table)
    return option is not None and value == option.default and value is not None


def suggest_key(key: str, table: OptionTable) -> str:
    """What was probably meant by an unknown key, or that a misplaced one belongs elsewhere."""
    prefix, _, name = key.rpartition(".")
    if prefix == "dataset_options":
        if name in table.options:
            return f"; {name} is an option of the trainer, not of the dataset: move it to another section"
        return suggest(name, table.dataset_options)
    if prefix in OWN_TABLES:
        return suggest(name, OWN_TABLES[prefix])
    if key in table.dataset_options or key in OPTION_OF_DATASET_FILE.values():
        return f"; {key} belongs under [dataset_options]"
    if key == "preset":
        return "; preset stands at the top of the file"
    return suggest(key, [*table.options, *table.dataset_options, "effective_batch"])


def looks_like_path(value: Any) -> bool:
    """Whether a value, or one in a list, is a path of one machine."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) and bool(LOOKS_LIKE_PATH.match(item)) for item in values)


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
