"""A template's layers put together: every effective value, and the file that set it.

Order, later wins: the trainer's defaults, base templates by `extends`, the template, the dataset recipe,
the site, `--set`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kohaku_wrap.config.installed import find_option_table
from kohaku_wrap.config.options import OptionTable
from kohaku_wrap.config.reading import LENGTHS, Entry, LayerReader, read_override, shorten_path
from kohaku_wrap.config.schema import ARGUMENT_TABLES, OWN_TABLES
from kohaku_wrap.config.site import Site
from kohaku_wrap.config.templates import find_template, read_toml
from kohaku_wrap.errors import Problem, ProblemsFound, command_line
from kohaku_wrap.files import shipped_folder


@dataclass(frozen=True)
class BatchShape:
    """How the effective batch is made."""

    effective_batch: int
    """Images per optimizer step."""

    batch_per_gpu: int
    """Images in one micro-batch of one process."""

    processes: int
    """Training processes."""

    accumulation: int
    """Micro-batches of one process per optimizer step."""

    @property
    def group(self) -> int:
        """Micro-batches per optimizer step over all processes."""
        return self.processes * self.accumulation


@dataclass(frozen=True)
class Effective:
    """A template resolved on a site."""

    name: str
    """The template's name."""

    path: Path
    """The template's file."""

    title: str
    """Its first words about itself."""

    notes: tuple[str, ...]
    """What its author wants to be known."""

    entries: Mapping[str, Entry]
    """Every value that a layer set, by key: `learning_rate`, `dataset_options.resolution`, `network_args.factor`,
    `optimizer_args.betas`, `effective_batch`, `kwrap.data`, `states.keep`, `samples.prompts`, `preset`."""

    preset: Mapping[str, Any]
    """The LyCORIS preset's tables; empty without one."""

    table: OptionTable
    """The trainer's options."""

    site: Site | None = None
    """The site, where one was given."""

    trust: tuple[str, ...] = ()
    """Modules whose code may run, by the person's word: of the site's `trust` and of `--trust`."""

    files: tuple[Path, ...] = ()
    """All template files, bases first."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What holds where no layer says anything, by key."""

    @property
    def values(self) -> dict[str, Any]:
        """Every effective value by key, the trainer's defaults included."""
        return {**self.defaults, **{key: entry.value for key, entry in self.entries.items()}}

    def get(self, key: str, default: Any = None) -> Any:
        """The effective value of a key, or `default` where it is unset or unknown."""
        entry = self.entries.get(key)
        value = entry.value if entry else self.defaults.get(key)
        return default if value is None else value

    def origin(self, key: str) -> str:
        """The layer that set the key, and its file: `template …/epsilon.toml`."""
        entry = self.entries.get(key)
        return entry.origin if entry else "default"

    def is_set(self, key: str) -> bool:
        """Whether a layer, rather than a default, decides the key."""
        return key in self.entries

    def subtable(self, prefix: str, *, with_defaults: bool = False) -> dict[str, Any]:
        """The values of one table: `network_args`, `dataset_options`, …"""
        values = self.values if with_defaults else {key: entry.value for key, entry in self.entries.items()}
        start = prefix + "."
        return {key[len(start) :]: value for key, value in values.items() if key.startswith(start)}

    @property
    def options(self) -> dict[str, Any]:
        """The trainer's options that a layer set."""
        return {key: entry.value for key, entry in self.entries.items() if key in self.table.options}

    @property
    def engine(self) -> str:
        """The engine that the site names."""
        return self.site.machine.engine if self.site else "sd-scripts"

    @property
    def batch(self) -> BatchShape | None:
        """The batch on this site; None without a site, or where the effective batch does not divide."""
        effective_batch = self.get("effective_batch")
        if self.site is None or not effective_batch:
            return None
        machine = self.site.machine
        accumulation, rest = divmod(effective_batch, machine.batch_per_gpu * machine.processes)
        if rest or not accumulation:
            return None
        return BatchShape(effective_batch, machine.batch_per_gpu, machine.processes, accumulation)


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
    override_problems: list[Problem] = []
    given: dict[str, Entry] = {}
    for text in overrides:
        layer, problems = read_override(text, table)
        given |= layer
        override_problems += problems
    if dataset := given.get("kwrap.dataset", reader.entries.get("kwrap.dataset")):
        reader.read_dataset(str(dataset.value))
    if site:
        reader.read_site(site)
    reader.lay_over(given)
    if "preset" in given:
        reader.preset_source = (given["preset"].value, "--set", None)
    settle_length(reader.entries)
    header = read_toml(path)
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
    from kohaku_wrap.config.checks import check_effective

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
        bases = read_toml(file).get("extends", [])
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
