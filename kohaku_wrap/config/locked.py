"""The options of a run that is there as the lowest layer of a new one, with `--set` over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kohaku_wrap.config.checks import check_effective
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.layers import lay_rest, list_defaults
from kohaku_wrap.config.reading import LENGTHS, Entry, LayerReader, is_owned, shorten_path
from kohaku_wrap.config.schema import ARGUMENT_TABLES, OWN_TABLES
from kohaku_wrap.config.site import Site
from kohaku_wrap.errors import ProblemsFound, command_line
from kohaku_wrap.trainer.installed import find_option_table
from kohaku_wrap.trainer.options import OptionTable

MADE_BY_RUN = frozenset({"output_dir", "output_name", "sample_prompts", "logging_dir", *LENGTHS})
"""Options of a lock that name the run's own folder, and its length, which its chapters tell."""


def vary_lock(
    path: Path,
    lock: Mapping[str, Any],
    length: Mapping[str, int],
    site: Site,
    overrides: Sequence[str] = (),
    trust: Sequence[str] = (),
) -> Effective:
    """A run's options on a site, with others over them, every check passed.

    `path`, `lock`: the run's lock and its tables; `length`: the options of its length. Of the site count paths and
    machine, not its trainer options. Raises ProblemsFound.
    """
    table = find_option_table(read_live=False)
    reader = LayerReader(table)
    file = shorten_path(path)
    reader.entries |= {key: Entry(value, "run", file) for key, value in list_options(lock, length, table)}
    problems = lay_rest(reader, site, overrides)
    run = lock["run"]
    if named := run.get("dataset"):
        # Only now: what its recipe said then is in the lock.
        reader.entries.setdefault("kwrap.dataset", Entry(named, "run", file))
    effective = Effective(
        name=str(run.get("template", path.parent.name)),
        path=path,
        title="",
        notes=(),
        entries=reader.entries,
        preset=reader.load_preset() if reader.preset_source else dict(lock.get("preset", {})),
        table=table,
        site=site,
        trust=tuple(dict.fromkeys((*site.trust, *map(str, run.get("trust", [])), *trust))),
        defaults=list_defaults(table),
    )
    problems += [*reader.problems, *check_effective(effective)]
    if problems:
        raise ProblemsFound(f"run {path.parent.name}", problems, f"See `{command_line('branch', '--help')}`.")
    return effective


def list_options(lock: Mapping[str, Any], length: Mapping[str, int], table: OptionTable) -> Iterator[tuple[str, Any]]:
    """Key and value of what a lock has otherwise than the trainer's defaults, as a template would have it."""
    samples = lock.get("samples", {})
    for name, value in lock.get("values", {}).items():
        is_made = name in MADE_BY_RUN or is_owned(name) or (name == "sample_every_n_steps" and samples.get("every"))
        if not is_made and name in table.options and value != table.options[name].default:
            yield name, value
    yield from length.items()
    for each in ARGUMENT_TABLES:
        yield from ((f"{each}.{name}", value) for name, value in lock.get(each, {}).items())
    for name, value in lock.get("dataset", {}).items():
        if name in table.dataset_options and value != table.dataset_options[name].default:
            yield f"dataset_options.{name}", value
    for each in ("states", "cache", "samples", "validation"):
        yield from ((f"{each}.{name}", value) for name, value in lock.get(each, {}).items() if name in OWN_TABLES[each])
    yield "kwrap.data", lock["run"]["data"]
    yield "effective_batch", lock["run"]["effective_batch"]
    if lock.get("preset"):
        yield "preset", "inline"
