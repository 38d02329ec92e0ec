"""One line of a layer before it takes effect: which key it means, and whether its value may stand there."""

from __future__ import annotations

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
from kohaku_wrap.config.site import find_path
from kohaku_wrap.config.trainer_arguments import render_literal
from kohaku_wrap.trainer.builtin_options import is_literal
from kohaku_wrap.trainer.options import Option, OptionTable, UnfitValue, check_value, parse_argument, parse_literal
from kohaku_wrap.wording import suggest

LITERALS_OF: Mapping[str, Callable[[str], Any]] = {
    "optimizer_args": parse_argument,
    "lr_scheduler_args": parse_argument,
}
"""How values of these tables are read where they are text; LyCORIS converts those of network_args itself."""

LOOKS_LIKE_PATH = re.compile(r"^(~|/|\.{1,2}/|[A-Za-z]:[\\/])")


@dataclass(frozen=True)
class Setting:
    """One line of a layer, before it is checked."""

    where: str
    """Table and key as the person wrote them."""

    key: str
    """The canonical key."""

    value: Any
    """The TOML value."""


def find_misspelled_tables(document: dict[str, Any], table: OptionTable) -> list[str]:
    """Sections that are named nearly like a table with a meaning and hold what is no option."""
    return [
        name
        for name, value in document.items()
        if isinstance(value, dict)
        and name not in TABLES
        and suggest(name, TABLES, cutoff=0.85)
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
