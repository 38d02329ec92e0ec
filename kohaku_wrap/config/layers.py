"""A template's layers put together: every effective value, and the file that set it.

Order, later wins: the trainer's defaults, base templates by `extends`, the template, the dataset recipe,
the site, `--set`. For a branch the options of a run that is there are the lowest layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kohaku_wrap.config.checks import check_effective
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.reading import LENGTHS, Entry, LayerReader, read_override, shorten_path
from kohaku_wrap.config.schema import ARGUMENT_TABLES, OWN_TABLES
from kohaku_wrap.config.settings import is_owned
from kohaku_wrap.config.site import Site
from kohaku_wrap.config.templates import find_template
from kohaku_wrap.errors import Problem, ProblemsFound, command_line
from kohaku_wrap.files import shipped_folder
from kohaku_wrap.toml_files import load_toml
from kohaku_wrap.trainer.installed import find_option_table
from kohaku_wrap.trainer.options import OptionTable


def load_layers(
    name_or_path: str | Path,
    site: Site | None = None,
    overrides: Sequence[str] = (),
    table: OptionTable | None = None,
    trust: Sequence[str] = (),
) -> tuple[Effective, list[Problem]]:
    """The effective values, and the faults of each layer on its own."""
    table = table or find_option_table(read_live=False)
    path = find_template(name_or_path)
    files = order_files(path)
    reader = LayerReader(table)
    for file in files:
        reader.read_file(file, "template" if file == path else "base")
    override_problems = lay_rest(reader, site, overrides)
    header = load_toml(path)
    notes = header.get("notes", [])
    effective = Effective(
        name=path.stem,
        path=path,
        title=str(header.get("title", "")),
        notes=tuple(notes) if isinstance(notes, list) else (str(notes),),
        entries=reader.entries,
        preset=reader.load_preset(),
        table=table,
        site=site,
        trust=tuple(dict.fromkeys((*(site.trust if site else ()), *trust))),
        files=tuple(files),
        defaults=list_defaults(table),
    )
    return effective, reader.problems + override_problems


def lay_rest(reader: LayerReader, site: Site | None, overrides: Sequence[str]) -> list[Problem]:
    """Lay dataset recipe, site and `--set` over what the reader has; the faults of `--set`."""
    found: list[Problem] = []
    given: dict[str, Entry] = {}
    for text in overrides:
        layer, problems = read_override(text, reader.table)
        given |= layer
        found += problems
    if dataset := given.get("kwrap.dataset", reader.entries.get("kwrap.dataset")):
        reader.read_dataset(str(dataset.value))
    if site:
        reader.read_site(site)
    reader.lay_over(given)
    if "preset" in given:
        reader.preset_source = (given["preset"].value, "--set", None)
    settle_length(reader.entries)
    return found


def resolve_template(
    name_or_path: str | Path,
    site: Site | None = None,
    overrides: Sequence[str] = (),
    *,
    table: OptionTable | None = None,
    trust: Sequence[str] = (),
) -> Effective:
    """A template's effective values on a site, with every check passed.

    Raises ProblemsFound with all faults of all layers at once, each with its layer and file.
    """
    effective, problems = load_layers(name_or_path, site, overrides, table, trust)
    problems += check_effective(effective)
    if problems:
        raise ProblemsFound(
            shorten_path(effective.path),
            problems,
            f"Run `{command_line('template', 'show', name_or_path, '--why')}` to see where each value comes from.",
        )
    return effective


def settle_length(entries: dict[str, Entry]) -> None:
    """Steps or epochs: 0 leaves one of them out."""
    for key, other in (LENGTHS, LENGTHS[::-1]):
        if key in entries and other in entries and entries[other].value == 0:
            del entries[other]


def order_files(path: Path) -> list[Path]:
    """The template's bases and itself, in the order in which they apply, each once.

    Raises ProblemsFound where `extends` goes round in a circle.
    """
    ordered: list[Path] = []

    def visit(file: Path, above: tuple[Path, ...]) -> None:
        if file in above:
            circle = " → ".join(step.stem for step in (*above[above.index(file) :], file))
            raise ProblemsFound(
                shorten_path(path),
                [Problem("extends", f"goes round in a circle: {circle}", shorten_path(file))],
                "Break the circle.",
            )
        bases = load_toml(file).get("extends", [])
        if not isinstance(bases, (str, list)) or not all(isinstance(base, str) for base in bases):
            problem = Problem("extends", "must be a template's name, or a list of names", shorten_path(file))
            raise ProblemsFound(shorten_path(path), [problem], 'Write for example extends = "sdxl-lokr".')
        for base in [bases] if isinstance(bases, str) else bases:
            # A person's own `epsilon` may extend the shipped `epsilon`.
            shipped = shipped_folder("templates") / f"{base}.toml"
            found = find_template(base, beside=file.parent)
            visit(shipped if found.resolve() == file.resolve() and shipped.is_file() else found, (*above, file))
        if file not in ordered:
            ordered.append(file)

    visit(path, ())
    return ordered


def list_defaults(table: OptionTable) -> dict[str, Any]:
    """What holds where no layer says anything: the trainer's defaults and kwrap's own."""
    defaults = {name: option.default for name, option in table.options.items() if name not in table.dataset_options}
    defaults |= {f"dataset_options.{name}": option.default for name, option in table.dataset_options.items()}
    for own, options in OWN_TABLES.items():
        defaults |= {f"{own}.{name}": option.default for name, option in options.items()}
    for name in ARGUMENT_TABLES:
        defaults.pop(name, None)
    return defaults


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
