"""Values of a TOML table, each of the type that it should have, with every fault collected."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from kohaku_wrap.errors import Problem


class TableReader:
    """One table of a TOML file. Keys that it should not have are reported at once, wrong values when they are read."""

    def __init__(self, where: str, table: Mapping[str, Any], keys: Sequence[str], problems: list[Problem]) -> None:
        self.prefix = f"{where}." if where else ""
        self.table_values = table
        self.problems = problems
        for key in table:
            if key not in keys:
                near = difflib.get_close_matches(key, keys, n=1)
                suggestion = f"did you mean {near[0]}?" if near else f"known here: {', '.join(keys)}"
                problems.append(Problem(f"{self.prefix}{key}", f"unknown; {suggestion}"))

    def fault(self, key: str, what: str) -> None:
        """Note what is wrong with `key`."""
        self.problems.append(Problem(f"{self.prefix}{key}", what))

    def integer(self, key: str) -> int | None:
        """A whole number, None where the key is absent."""
        value = self.table_values.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        self.fault(key, f"{value!r} is not a whole number")
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
            self.fault(key, f"{value!r} is not one of {', '.join(choices)}")
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
        value = self.table_values.get(key)
        if value is None:
            return tuple(default)
        if isinstance(value, list) and all(isinstance(word, str) and word for word in value):
            return tuple(value)
        self.fault(key, f"{value!r} is not a list of words")
        return tuple(default)

    def integers(self, key: str, count: int) -> tuple[int, ...] | None:
        """A list of `count` whole numbers, None where the key is absent or wrong."""
        value = self.table_values.get(key)
        if value is None:
            return None
        if (
            isinstance(value, list)
            and len(value) == count
            and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
        ):
            return tuple(value)
        self.fault(key, f"{value!r} is not a list of {count} whole numbers")
        return None

    def table(self, key: str) -> Mapping[str, Any]:
        """A table, empty where the key is absent."""
        value = self.table_values.get(key, {})
        if isinstance(value, Mapping):
            return value
        self.fault(key, f"{value!r} is not a table")
        return {}

    def tables(self, key: str) -> list[Mapping[str, Any]]:
        """A list of tables, such as `[[selection.strata]]`."""
        value = self.table_values.get(key, [])
        if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
            return value
        self.fault(key, f"{value!r} is not a list of tables; write [[{self.prefix}{key}]]")
        return []
