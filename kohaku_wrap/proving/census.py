"""The option census: every row of the table of fates tried on the real trainer.

`make census`, or `python -P -m kohaku_wrap.proving.census`. An option that decides the weights, set to another value,
must change the network or the ledger; one that decides files must not; one that is refused must be refused by
`kwrap template check`. Exit code 1 when a row says otherwise than what is seen.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.config.check_files import check_files
from kohaku_wrap.config.fates import FATES_FILE, Fate, parse_fates
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.outlets import run_as_work
from kohaku_wrap.processes import count_cores
from kohaku_wrap.proving.census_bench import CaseFailed, CensusBench, Settings, write_template
from kohaku_wrap.trainer.installed import find_option_table

Row = tuple[str, str]
"""Place and name."""

WRONG = "WRONG"
PLACE_PREFIX = {"option": "", "dataset": "dataset_options."}
MAP_BASE = {"map.algo": "lora"}
"""What a map of a preset says where a row says nothing else."""


@dataclass(frozen=True)
class Seen:
    """What came of one row."""

    row: Row
    """Which."""

    fate: Fate
    """What the table says."""

    result: str
    """`changes`, `changes nothing`, `refused`, `set by kwrap`, `not testable here`, or WRONG."""

    detail: str = ""
    """More, where it is wrong or not testable."""

    @property
    def is_wrong(self) -> bool:
        return self.result == WRONG

    def line(self) -> str:
        """For people."""
        place, name = self.row
        detail = f": {self.detail}" if self.detail else ""
        return f"{place:<17} {name:<36} {self.fate.kind:<10} {self.result}{detail}"


def key_of(row: Row) -> str:
    """The key of a template that a row's option is set by."""
    place, name = row
    if place == "preset":
        return name if name.startswith("map.") else f"preset.{name}"
    return f"{PLACE_PREFIX.get(place, f'{place}.')}{name}"


def what_it_needs(row: Row, fate: Fate) -> dict[str, Any]:
    """The settings of the run that a row's run is compared with."""
    needs = fate.ways()[0] if fate.ways() else {}
    settings = {key: value[0] if isinstance(value, list) else value for key, value in needs.items()}
    base = MAP_BASE if row[1].startswith("map.") else {}
    return {**base, **settings, **fate.beside}


def set_other(row: Row, fate: Fate) -> dict[str, Any]:
    """The settings that give a row's option its other value."""
    if row[0] == "option" and isinstance(fate.other, dict):
        return {f"{row[1]}.{name}": value for name, value in fate.other.items()}
    return {key_of(row): fate.other}


def walk(bench: CensusBench, rows: Mapping[Row, Fate], processes: int) -> Iterator[Seen]:
    """Every row's result; refused ones first, then files in one run where that will do, then the rest."""
    runs: list[Row] = []
    together: list[Row] = []
    for row, fate in rows.items():
        if fate.given_by:
            yield Seen(row, fate, "set by kwrap", fate.given_by)
        elif fate.kind == "refused":
            yield try_refused(bench, row, fate)
        elif fate.kind == "unverified":
            yield Seen(row, fate, "left to the trainer", fate.reason)
        elif fate.untestable:
            yield Seen(row, fate, "not testable here", fate.untestable)
        elif fate.kind == "files" and not fate.needs and not fate.beside:
            together.append(row)
        else:
            runs.append(row)
    if together:
        try:
            changed = bench.signature({}) != bench.signature(merge(set_other(row, rows[row]) for row in together))
        except CaseFailed:
            changed = True
        if changed:
            runs += together
        else:
            yield from (Seen(row, rows[row], "changes nothing") for row in together)
    with ThreadPoolExecutor(max_workers=processes) as pool:
        yield from pool.map(lambda row: try_row(bench, row, rows[row]), runs)


def merge(parts: Iterable[Settings]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


def try_row(bench: CensusBench, row: Row, fate: Fate) -> Seen:
    """Train with and without the row's option, and compare."""
    without = what_it_needs(row, fate)
    try:
        before = bench.signature(without)
        after = bench.signature({**without, **set_other(row, fate)})
    except CaseFailed as failed:
        return Seen(row, fate, WRONG, failed.message)
    what = [name for name, same in (("network", before[0] == after[0]), ("ledger", before[1] == after[1])) if not same]
    if fate.kind == "weights" and not what:
        return Seen(row, fate, WRONG, f"{fate.other!r} changes neither network nor ledger")
    if fate.kind == "files" and what:
        return Seen(row, fate, WRONG, f"{fate.other!r} changes {' and '.join(what)}")
    return Seen(row, fate, f"changes {' and '.join(what)}" if what else "changes nothing")


def try_refused(bench: CensusBench, row: Row, fate: Fate) -> Seen:
    """Have `template check` look at a template that sets a refused option."""
    value = fate.other if fate.other is not None else "x"
    key = f"{row[0]}.{row[1]}" if row[0].endswith("_args") else key_of(row)
    path = write_template(bench.folder / "refused" / f"{row[0]}-{row[1]}.toml", {key: value})
    [(_, problems)] = check_files([str(path)], None, find_option_table(read_live=False))
    found = [problem for problem in problems if problem.where.rpartition(".")[2] == row[1].removeprefix("map.")]
    if not found:
        return Seen(row, fate, WRONG, "template check does not refuse it")
    if not any(fate.reason in problem.what for problem in found):
        return Seen(row, fate, WRONG, f"template check gives another reason: {found[0].what}")
    return Seen(row, fate, "refused")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -P -m kohaku_wrap.proving.census", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("census"), help="where to work (default: census)")
    parser.add_argument("--fates", type=Path, default=FATES_FILE, help="another table than kwrap's own")
    parser.add_argument("--row", action="append", metavar="PLACE.NAME", help="only this row; again for more")
    parser.add_argument("--processes", type=int, default=min(2, count_cores()), help="at once")
    parser.add_argument("--keep", action="store_true", help="keep every run's folder")
    return parser.parse_args(arguments)


def choose_rows(rows: Mapping[Row, Fate], names: list[str] | None) -> dict[Row, Fate]:
    """The rows of these names; all without any. Raises KwrapError for a name that is none."""
    known = {f"{place}.{name}": (place, name) for place, name in rows}
    for name in names or ():
        if name not in known:
            raise KwrapError(f"--row {name}: there is no such row", "Write PLACE.NAME, such as option.min_snr_gamma.")
    return {row: rows[row] for row in ([known[name] for name in names] if names else rows)}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when every row is as the table says."""
    chosen = parse_arguments(arguments)
    started = time.monotonic()
    seen: list[Seen] = []
    rows = choose_rows(parse_fates(chosen.fates.read_text(encoding="utf-8")), chosen.row)
    with CensusBench(chosen.folder.absolute(), chosen.processes, keep=chosen.keep) as bench:
        for each in walk(bench, rows, chosen.processes):
            seen.append(each)
            print(each.line(), flush=True)
    wrong = [each for each in seen if each.is_wrong]
    results = Counter(each.result.partition(" network")[0].partition(" ledger")[0] for each in seen)
    print(", ".join(f"{count} {result}" for result, count in results.most_common()))
    print(f"{len(seen)} rows, {len(wrong)} wrong, in {time.monotonic() - started:.0f} s")
    for each in wrong:
        print(each.line())
    return 1 if wrong else 0


if __name__ == "__main__":
    run_as_work(main)
