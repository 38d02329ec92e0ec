"""The trainer's options by name: their types, choices and defaults, and whether a value fits."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import home_folder, parse_json, read_regular
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.wording import suggest

RECORDED_TABLE = Path(__file__).with_name("options_sd_scripts.json")
"""The default commit's options, written by `planning/workers/list_options.py`, and which of them others lack."""

OWN_CHOICES: Mapping[str, tuple[str, ...]] = {"log_with": ("trackio",)}
"""Values that kwrap has beyond the trainer's own."""

SHOWN_LENGTH = 120

TYPE_WORDS = {
    "flag": "true or false",
    "int": "a whole number",
    "float": "a number",
    "int_or_float": "a number",
    "str": "text",
    "bool": "true or false",
    "dict": "a table",
    "two_ints": "two whole numbers",
    "two_floats": "two numbers",
}

TYPES: Mapping[str, Any] = {
    "flag": bool, "bool": bool, "int": int, "float": (int, float), "int_or_float": (int, float), "str": str,
    "dict": dict,
}  # fmt: skip
"""What a TOML value of each kind is."""


class UnfitValue(KwrapError):
    """A value that an option cannot take."""


@dataclass(frozen=True)
class Option:
    """One option of the trainer's parser or of its dataset file."""

    name: str
    """As in sd-scripts."""

    types: tuple[str, ...]
    """What it takes: flag, int, float, int_or_float, str, bool, dict, two_ints, two_floats."""

    many: bool = False
    """It takes a list of such values."""

    choices: tuple[Any, ...] | None = None
    """The only values allowed; None among them means unset."""

    default: Any = None
    """What the trainer does without it."""

    level: str = "option"
    """`option` of trainer.toml, or `dataset` or `subset` of dataset.toml."""

    split_by_commas: bool = True
    """Whether `--set NAME=a,b` of a list means two values; a prompt holds commas itself."""

    def describe(self) -> str:
        """What it takes, in words."""
        words = " or ".join(dict.fromkeys(TYPE_WORDS[kind] for kind in self.types))
        return f"a list, each {words}" if self.many else words


@dataclass(frozen=True)
class OptionTable:
    """All options of one trainer."""

    options: Mapping[str, Option]
    """Options of trainer.toml by name."""

    dataset_options: Mapping[str, Option]
    """Options of dataset.toml by name."""

    source: str
    """Where the table was read: an installed checkout or the recorded table."""


def parse_table(document: Mapping[str, Any], source: str) -> OptionTable:
    """A table from the JSON that `list_options.py` prints."""
    options = {
        name: Option(
            name=name,
            types=(entry["type"],),
            many=entry.get("nargs") is not None,
            choices=(*entry["choices"], *OWN_CHOICES.get(name, ())) if "choices" in entry else None,
            default=entry["default"],
        )
        for name, entry in document["options"].items()
    }
    dataset_options = {
        name: Option(
            name,
            tuple(entry["types"]),
            # The dataset file's own schema names none.
            choices=options[name].choices if name in options else None,
            default=entry["default"],
            level=entry["level"],
        )
        for name, entry in document["dataset_options"].items()
    }
    return OptionTable(options, dataset_options, source)


def flatten_sections(document: Mapping[str, Any]) -> dict[str, Any]:
    """Options of all sections in one table: sections are for the eye, the later of two equal names counts."""
    values: dict[str, Any] = {}
    for name, value in document.items():
        values.update(value if isinstance(value, dict) else {name: value})
    return values


@cache
def load_recorded_table(commit: str = "") -> OptionTable:
    """The table that came with kwrap: the default's, or that of another supported commit, which may lack some."""
    document = json.loads(RECORDED_TABLE.read_text(encoding="utf-8"))
    names = [name for name, known in document["commits"].items() if known == commit] or list(document["commits"])
    lacking = document["lacking"].get(names[0], ())
    for part in ("options", "dataset_options"):
        document[part] = {name: entry for name, entry in document[part].items() if name not in lacking}
    return parse_table(document, "the recorded table of " + ", ".join(names))


def compare_tables(old: OptionTable, new: OptionTable) -> list[str]:
    """What another commit takes otherwise, a line an option: new ones, those that are gone, other defaults."""
    lines = []
    for before, after in ((old.options, new.options), (old.dataset_options, new.dataset_options)):
        for name in sorted({*before, *after}):
            if name not in before:
                lines.append(f"{name}: new, {after[name].describe()}")
            elif name not in after:
                lines.append(f"{name}: gone")
            elif before[name].default != after[name].default:
                lines.append(f"{name}: default {before[name].default!r}, now {after[name].default!r}")
    return list(dict.fromkeys(lines))


def cached_table_file(commit: str) -> Path:
    """Where the options read from an installed trainer are kept."""
    return home_folder() / "options" / f"{commit}.json"


def load_option_table(commit: str | None = None) -> OptionTable:
    """The options of the installed trainer's commit where they were read, else the recorded table."""
    if commit:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            return parse_table(parse_json(read_regular(cached_table_file(commit))), f"sd-scripts {commit[:7]}")
    return load_recorded_table(commit or "")


def parse_literal(text: str) -> Any:
    """The TOML value that `text` spells, or the text itself: 2, 0.5, true, [1, 2], {a = 1}, word."""
    try:
        [value] = parse_toml(f"value = {text}").values()  # a line break in the text may begin another
        return value
    except ValueError:
        return text


def parse_argument(text: str) -> Any:
    """The value of an optimizer's argument, as TOML spells it or as sd-scripts takes it: 0.9,0.95, (0.9, 0.95), False.

    sd-scripts evaluates Python literals; left as text, `amsgrad=False` would become the text "False", which is true.
    """
    value = parse_literal(text)
    if not isinstance(value, str):
        return value
    try:
        literal = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
    if isinstance(literal, tuple):
        return list(literal)
    return literal if isinstance(literal, (bool, int, float, list)) else value


def parse_text_for(option: Option, text: str) -> Any:
    """The value of `--set NAME=text`, typed as the option is. Raises UnfitValue."""
    plain_text = option.types == ("str",) and not option.many
    value = parse_literal(text)
    if option.many and not isinstance(value, list) and not option.split_by_commas:
        value = [value if isinstance(value, str) else text]
    elif option.many and not isinstance(value, list):
        value = [parse_literal(part.strip()) if option.types != ("str",) else part.strip() for part in text.split(",")]
    elif {"two_ints", "two_floats"} & set(option.types) and isinstance(value, str) and "," in value:
        value = [parse_literal(part.strip()) for part in value.split(",")]
    elif plain_text:
        # Quotes of TOML are allowed, but a bare number or word stays the text that was typed.
        value = value if isinstance(value, str) else text
    return check_value(option, value)


def check_value(option: Option, value: Any) -> Any:
    """`value` as the trainer needs it, or UnfitValue.

    Where the trainer wants a list, a single value is taken as a list of one; a whole number will do for a fraction.
    """
    if option.many:
        values = value if isinstance(value, list) else [value]
        return [check_single(option, item) for item in values]
    return check_single(option, value)


def check_single(option: Option, value: Any) -> Any:
    """One value, or UnfitValue that says what the option takes."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UnfitValue(f"{value} is no finite number")
    fitting = any(fits(kind, value) for kind in option.types)
    if fitting and (option.choices is None or value in option.choices):
        return float(value) if option.types == ("float",) else value
    shown = shorten(json.dumps(value, ensure_ascii=False, default=str))
    if not fitting:
        bare = parse_literal(value) if isinstance(value, str) and value else None
        hint = " (without the quotes)" if any(fits(kind, bare) for kind in option.types if kind != "str") else ""
        raise UnfitValue(f"{shown} is {kind_of(value)}, not {option.describe()}{hint}")
    allowed = [str(choice) for choice in option.choices or () if choice is not None]
    raise UnfitValue(f"{shown} is not one of {', '.join(allowed)}{suggest(str(value), allowed)}")


def shorten(text: str) -> str:
    """The text, or its beginning where it would fill a terminal."""
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}…"


def fits(kind: str, value: Any) -> bool:
    """Whether a TOML value is of one of the kinds of TYPE_WORDS."""
    if kind.startswith("two_"):
        inner = kind.removeprefix("two_").removesuffix("s")
        return isinstance(value, list) and len(value) == 2 and all(fits(inner, item) for item in value)
    wanted = TYPES.get(kind, ())
    return isinstance(value, wanted) and (wanted is bool) == isinstance(value, bool)


def kind_of(value: Any) -> str:
    """The kind of a TOML value, in words."""
    kind = next((kind for kind in ("bool", "int", "float", "str", "dict") if fits(kind, value)), "")
    return TYPE_WORDS.get(kind, "a list" if isinstance(value, list) else "a date or a time")
