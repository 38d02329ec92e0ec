"""Numbers, sizes, times and paths as people read them; for every room that tells a person something."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

SHOWN_BEFORE, SHOWN_AFTER = 60, 50
"""Characters around a fault in a text."""

NAMES_SHOWN = 3
"""Of many, where all are counted."""

UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


def show_path(path: Path) -> str:
    """The path as one would type it here: relative where it lies below the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def name_apart(name: str, taken: Collection[str]) -> str:
    """The name, with a number behind it where it is taken."""
    numbered = (f"{name} ({number})" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)


def by_numbers(name: str) -> list[str | int]:
    """What to sort names by, so that step 400 comes before step 1000: words, numbers and words by turns."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]{1,18})", name))]


def name_first(names: Sequence[str]) -> str:
    """The first NAMES_SHOWN names, and a sign of more."""
    return ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")


def format_share(share: float) -> str:
    """A part of 1 in percent."""
    return f"{100 * share:.1f} %"


def count_of(count: int, noun: str) -> str:
    """A number with its noun: `1 tensor`, `2 processes`, `3 batches`."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{count:,} {noun}{ending}"


def format_duration(seconds: float) -> str:
    """Days, hours, minutes or seconds, two units at most."""
    minutes, left = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (left, "s")]
    first = next((place for place, (number, _) in enumerate(units) if number), 3)
    return " ".join(f"{number} {unit}" for number, unit in units[first : first + 2])


def show_bytes(size: int) -> str:
    """A size for people, in units of 1000: 769.3 MB."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            value = size / factor
            return f"{value:,.0f} {unit}" if unit == "kB" or (unit != "MB" and value >= 100) else f"{value:.1f} {unit}"
    return f"{size} bytes"


def mark_place(source: str, place: int, length: int) -> str:
    """The text around a place as one line, and a mark under what stands there; both indented by four."""
    start, stop = max(0, place - SHOWN_BEFORE), min(len(source), place + length + SHOWN_AFTER)
    before, after = "…" if start else "", "…" if stop < len(source) else ""
    signs = (" " if each.isspace() else each if each.isprintable() else UNPRINTABLE for each in source[start:stop])
    mark = " " * (len(before) + place - start) + "^" * length
    return f"    {before}{''.join(signs)}{after}\n    {mark}"


def suggest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean X?` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def is_utf8(name: str) -> bool:
    """Whether `name` can be written as UTF-8: JSON escapes can hold halves of characters."""
    with suppress(UnicodeEncodeError):
        name.encode("utf-8")
        return True
    return False
