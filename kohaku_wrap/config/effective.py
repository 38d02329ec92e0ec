"""A template resolved on a site: every effective value, who set it, and the batch that follows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kohaku_wrap.config.reading import Entry
from kohaku_wrap.config.site import Site
from kohaku_wrap.errors import KwrapError, Problem
from kohaku_wrap.trainer.options import OptionTable

Faults = Iterator[tuple[str, str]]
"""Key and what is wrong with it."""


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
        """The layer that set the key, and its file: `template …/epsilon.toml`; a preset's keys are of one layer."""
        entry = self.entries.get("preset" if key.startswith("preset.") else key)
        return entry.origin if entry else "default"

    def blame(self, faults: Iterable[tuple[str, str]]) -> list[Problem]:
        """Faults of keys as problems, each with the layer that set its key."""
        return [Problem(key, what, self.origin(key)) for key, what in faults]

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


class BadBatch(KwrapError):
    """The effective batch cannot be made on this site."""


def shape_batch(effective: Effective) -> BatchShape:
    """The batch on the template's site. Raises BadBatch where it does not divide, and says what would."""
    if shape := effective.batch:
        return shape
    site = effective.site
    if site is None:
        raise BadBatch("the batch depends on the site", "Add --site site.toml.")
    wanted = effective.get("effective_batch")
    if not wanted:
        raise BadBatch(f"{effective.name} states no effective_batch", "Write for example effective_batch = 256.")
    machine = site.machine
    at_once = machine.processes * machine.batch_per_gpu
    fitting = [size for size in range(1, machine.batch_per_gpu * 4) if wanted % (machine.processes * size) == 0]
    advice = f"batch_per_gpu may be {', '.join(map(str, fitting))}" if fitting else "change gpus or effective_batch"
    raise BadBatch(
        f"effective_batch = {wanted} ({effective.origin('effective_batch')}) is no multiple of {at_once}: "
        f"{machine.processes} processes with {machine.batch_per_gpu} images each",
        f"In {site.path}, {advice}.",
    )
