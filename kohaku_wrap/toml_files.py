"""TOML read from files that a stranger may have written: tables and their values, or every fault of them."""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import KwrapError, Problem
from kohaku_wrap.wording import suggest

SIZE_LIMIT_BYTES = 16 << 20
DEPTH_LIMIT = 32
"""Tables and lists within each other; kwrap's own files need six."""

BYTE_ORDER_MARK = "\ufeff"

LARGEST_INTEGER = (1 << 63) - 1
"""TOML's own limit."""

LONG_KEY = re.compile(
    rf"""(?<![\w-])(?:(?:"[^"\n]*+"|'[^'\n]*+'|[\w-]++)[ \t]*+\.[ \t]*+){{{DEPTH_LIMIT}}}(?:"|'|[\w-])"""
)
"""A key of more parts than tables may be deep; the parser would take the square of their number."""


class UnreadableToml(KwrapError):
    """A file that is not TOML, or holds what no file of kwrap holds."""


class TooMuch(ValueError):
    """TOML within the grammar and beyond every use."""


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a text. Raises ValueError, whose message says what is wrong and where."""
    if text.startswith(BYTE_ORDER_MARK):
        # Shown, since no editor shows it and a trainer stops at it.
        raise ValueError("begins with a byte-order mark, which editors of Windows write: save it as UTF-8 without one")
    if long := LONG_KEY.search(strip_long_texts(text)):
        raise TooMuch(f"a key of more than {DEPTH_LIMIT} parts: {long[0][:40]}…")
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise TooMuch(f"tables or lists more than {DEPTH_LIMIT} deep") from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # Python's own limit of digits, or a date that there is not
        raise TooMuch("a number of too many digits" if "digits" in str(error) else str(error)) from None
    refuse_too_much(document)
    return document


def strip_long_texts(text: str) -> str:
    """The text without what stands in its multi-line strings, which may hold rows of dots."""
    return re.sub(r'"""(?:[^"\\]|\\.|"(?!""))*+"""|\'\'\'(?:[^\']|\'(?!\'\'))*+\'\'\'', "''", text, flags=re.DOTALL)


def refuse_too_much(document: dict[str, Any]) -> None:
    """Raise TooMuch for numbers that TOML does not have and for tables that are too deep."""
    waiting: list[tuple[Any, str, int]] = [(document, "", 0)]
    while waiting:
        value, where, depth = waiting.pop()
        if depth > DEPTH_LIMIT:
            raise TooMuch(f"tables or lists more than {DEPTH_LIMIT} deep, at {where[:40]}…")
        if isinstance(value, dict):
            waiting += [(inner, f"{where}.{key}".lstrip("."), depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(inner, where, depth + 1) for inner in value]
        elif isinstance(value, int) and not -LARGEST_INTEGER - 1 <= value <= LARGEST_INTEGER:
            raise TooMuch(f"{where or 'a number'} is beyond the integers of TOML, which have 64 bits")


def load_toml(path: Path) -> dict[str, Any]:
    """The tables of a regular file. Raises UnreadableToml with the place, OSError where it cannot be read."""
    if path.exists() and not path.is_file():
        raise UnreadableToml(f"{path}: not a regular file", "Give the path of a .toml file.")
    with path.open("rb") as stream:
        data = stream.read(SIZE_LIMIT_BYTES + 1)
    if len(data) > SIZE_LIMIT_BYTES:
        raise UnreadableToml(f"{path}: more than {SIZE_LIMIT_BYTES >> 20} MiB", "Give the path of a .toml file.")
    try:
        return parse_toml(data.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise UnreadableToml(f"{path}: not UTF-8 text at byte {error.start}", "Save the file as UTF-8.") from None
    except TooMuch as error:
        raise UnreadableToml(f"{path}: {error}", "Take it out of the file; no option needs it.") from None
    except ValueError as error:
        raise UnreadableToml(f"{path}: {error}", "Fix the file at that place; strings need quotes in TOML.") from None


class TableReader:
    """One table of a TOML file. Keys that it should not have are reported at once, wrong values when they are read."""

    def __init__(self, where: str, table: Mapping[str, Any], keys: Sequence[str], problems: list[Problem]) -> None:
        self.prefix = f"{where}." if where else ""
        self.table_values = table
        self.problems = problems
        for key in table:
            if key not in keys:
                suggestion = suggest(key, keys) or f"; known here: {', '.join(keys)}"
                problems.append(Problem(f"{self.prefix}{key}", f"unknown{suggestion}"))

    def fault(self, key: str, what: str) -> None:
        """Note what is wrong with `key`."""
        self.problems.append(Problem(f"{self.prefix}{key}", what))

    def integer(self, key: str, least: int | None = None) -> int | None:
        """A whole number from `least` on, None where the key is absent or wrong."""
        value = self.table_values.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            self.fault(key, f"{value!r} is not a whole number")
        elif value is not None and least is not None and value < least:
            self.fault(key, f"{value} is below {least}")
        else:
            return value
        return None

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        value = self.table_values.get(key, default)
        if isinstance(value, str):
            return value
        self.fault(key, f"{value!r} is not a string")
        return default

    def choice(self, key: str, choices: Sequence[str]) -> str:
        """One of `choices`, the first where the key is absent."""
        value = self.text(key, choices[0])
        if value not in choices:
            self.fault(key, f"{value!r} is not one of {', '.join(choices)}{suggest(value, choices, cutoff=0.75)}")
            return choices[0]
        return value

    def date(self, key: str) -> datetime.date | None:
        """A date, as TOML's own or as a "YYYY-MM-DD" string."""
        value = self.table_values.get(key)
        if value is None or type(value) is datetime.date:
            return value
        try:
            return datetime.date.fromisoformat(value)
        except (TypeError, ValueError):
            self.fault(key, f"{value!r} is not a date such as 2015-01-31")
            return None

    def words(self, key: str, default: Sequence[str]) -> tuple[str, ...]:
        """A list of strings."""
        value = self.table_values.get(key, default)
        if isinstance(value, list | tuple) and all(isinstance(word, str) and word for word in value):
            return tuple(value)
        self.fault(key, f"{value!r} is not a list of words")
        return tuple(default)

    def integers(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        """A list of whole numbers."""
        value = self.table_values.get(key, default)
        if isinstance(value, list | tuple) and all(type(one) is int for one in value):
            return tuple(value)
        self.fault(key, f"{value!r} is not a list of whole numbers")
        return tuple(default)

    def table(self, key: str) -> Mapping[str, Any]:
        """A table, empty where the key is absent."""
        value = self.table_values.get(key, {})
        if isinstance(value, Mapping):
            return value
        self.fault(key, f"must be a table: [{self.prefix}{key}]")
        return {}

    def tables(self, key: str) -> list[Mapping[str, Any]]:
        """A list of tables, such as `[[selection.strata]]`."""
        value = self.table_values.get(key, [])
        if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
            return value
        self.fault(key, f"{value!r} is not a list of tables; write [[{self.prefix}{key}]]")
        return []
