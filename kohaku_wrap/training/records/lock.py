"""What the lock of a run says: `run.lock.toml` by meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kohaku_wrap.config.code_names import KINDS as CODE_OPTIONS
from kohaku_wrap.config.run_files import DATASET_FILE, LOCK_FORMAT, merge_subsets
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.held_out import HELD_OUT_FILE, HeldOut
from kohaku_wrap.steps import StepCount
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.training.records.chapters import EPOCHS, STEPS, Chapter, Cycle, find_cycle, read_chapters
from kohaku_wrap.training.records.origin import Origin, read_origin

LARGEST_NUMBER = 1 << 48


class BadRunFolder(KwrapError):
    """A run's own files cannot be read."""


class Number:
    """A whole number of the lock, from `at_least` on; `default` where it may be missing."""

    def __init__(self, table: str, key: str, at_least: int = 0, default: int | None = None) -> None:
        self.entry = table, key, at_least, default

    def __get__(self, lock: Lock, kind: type) -> int:
        return lock.number(*self.entry)


class Text:
    """A word of the lock; `default` where it may be missing."""

    def __init__(self, table: str, key: str, default: str | None = None) -> None:
        self.entry = table, key, default

    def __get__(self, lock: Lock, kind: type) -> str:
        table, key, default = self.entry
        return str(lock.entry(table, key) if default is None else lock.table(table).get(key, default))


@dataclass(frozen=True)
class Lock:
    """`run.lock.toml`, by meaning."""

    tables: Mapping[str, Any]
    """The whole document."""

    path: Path
    """Where it was read, for messages."""

    def table(self, name: str) -> Mapping[str, Any]:
        """One table of the document: `inputs`, `machine`, …; empty for one that it lacks. Raises BadRunFolder."""
        table = self.tables.get(name, {})
        if not isinstance(table, Mapping):
            raise self.damaged(f"[{name}] is {str(table)[:40]}, not a table")
        return dict(table)

    def entry(self, table: str, key: str) -> Any:
        """One value; raises BadRunFolder that names it when it is missing."""
        try:
            return self.tables[table][key]
        except (KeyError, TypeError):
            raise self.damaged(f"[{table}] {key} is missing") from None

    def damaged(self, what: str) -> BadRunFolder:
        """The error for an entry that kwrap did not write."""
        return BadRunFolder(f"{self.path}: {what}", "The lock was edited or cut; restore it or start a new run.")

    @property
    def format(self) -> int:
        """Of the lock; 1 is that of kwrap 0.1, which kept no texts of the run's files, no id and no options digest."""
        return int(self.tables.get("format", 1))

    @property
    def run_id(self) -> str:
        """Made at random with the run; empty for a run of kwrap 0.1."""
        return str(self.entry("run", "id")) if self.format > 1 else ""

    @property
    def options_digest(self) -> str:
        """The sha256 over all options that decide the weights; empty for a run of kwrap 0.1."""
        return str(self.entry("run", "options_digest")) if self.format > 1 else ""

    @property
    def files(self) -> Mapping[str, str]:
        """The text of each of the run's files as it was written; empty for a run of kwrap 0.1."""
        return self.table("files")

    def number(self, table: str, key: str, at_least: int = 0, default: int | None = None) -> int:
        """A whole number; raises BadRunFolder where it is none, out of all bounds, or missing without a default."""
        value = self.entry(table, key) if default is None else self.table(table).get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value < LARGEST_NUMBER:
            raise self.damaged(f"[{table}] {key} is {str(value)[:40]}, not a whole number from {at_least} on")
        return value

    engine = Text("run", "engine")
    data = Text("run", "data")
    seed = Number("run", "seed")
    effective_batch = Number("run", "effective_batch", 1)
    batch_per_gpu = Number("run", "batch_per_gpu", 1)

    @property
    def group(self) -> int:
        """Batches in one optimizer step."""
        return self.effective_batch // self.batch_per_gpu

    @property
    def accelerate(self) -> Mapping[str, Any]:
        """Options of `accelerate launch` that say how several machines find each other."""
        return dict(self.table("machine").get("accelerate", {}))

    @property
    def machines(self) -> int:
        """Machines that the run was made for."""
        return int(self.accelerate.get("num_machines", 1))

    @property
    def processes(self) -> int:
        """The processes that the site gave when the run was made."""
        return self.number("machine", "processes", 1, max(self.gpus, 1))

    @property
    def workers(self) -> int:
        """The loader workers that the site or the template gave when the run was made."""
        return self.number("machine", "workers", 0, self.values.get("max_data_loader_n_workers") or 0)

    gpus = Number("machine", "gpus", default=1)
    """Of each machine of the run's site."""

    @property
    def is_on_cpu(self) -> bool:
        """Whether the run's site has no GPU."""
        return self.gpus == 0

    @cached_property
    def held_out(self) -> HeldOut | None:
        """The posts that are not trained; None where all are. Raises BadHeldOut."""
        text = self.files.get(HELD_OUT_FILE)
        return HeldOut.parse(str(text)) if text is not None else None

    images = Number("plan", "images")
    total_optimizer_steps = Number("plan", "total_optimizer_steps")

    @property
    def chapters(self) -> tuple[Chapter, ...]:
        """The lengths that the run was given, the first one first; one for a run that was never extended."""
        try:
            if documents := self.tables.get("chapters"):
                return read_chapters(documents)
        except (TypeError, ValueError) as error:
            raise self.damaged(f"[[chapters]] cannot be read ({error})") from None
        option = EPOCHS if self.values.get(EPOCHS) else STEPS
        return (Chapter(0, 0, self.total_optimizer_steps, {option: int(self.values.get(option, 0))}),)

    @property
    def origin(self) -> Origin | None:
        """What the run began from as a branch of another one; None where it is none."""
        try:
            return read_origin(self.tables["parent"]) if "parent" in self.tables else None
        except (TypeError, ValueError) as error:
            raise self.damaged(f"[parent] cannot be read ({error})") from None

    @property
    def cycle(self) -> Cycle:
        """What the schedule goes through now."""
        return find_cycle(self.chapters)

    batches = Number("plan", "batches", 1)
    """Of one epoch, all buckets together."""

    @property
    def count(self) -> StepCount:
        return StepCount(batches=self.batches, group=self.group)

    states_kept = Number("states", "keep", default=3)
    milestone_every = Number("states", "every", default=0)
    """Optimizer steps between the states that retention never removes; 0 for none."""

    @property
    def values(self) -> Mapping[str, Any]:
        """Every effective sd-scripts option."""
        return self.table("values")

    dataset_digest = Text("inputs", "captions_digest", "")
    """The digest of the captions and sizes that are trained; empty when the lock has none."""

    @property
    def subsets(self) -> list[dict[str, Any]]:
        """The dataset's options of each subset, as the run was made with; none for a run of kwrap 0.1."""
        return merge_subsets(parse_toml(self.files.get(DATASET_FILE, "")))

    trainer_commit = Text("trainer", "commit", "")

    @property
    def parent_network(self) -> str:
        """What it was trained on from: a run and its step, a network's file name and sha256; empty for none."""
        inputs, origin = self.table("inputs"), self.origin
        network = f"{inputs['network_name']} ({inputs['network_sha256'][:10]})" if "network_sha256" in inputs else ""
        if origin is None:
            return network
        run = f"run {origin.run} at optimizer step {origin.optimizer_step:,} ({origin.state_digest[:10]})"
        return f"{run}, which began from {network}" if network else run

    @property
    def joins_by_separator(self) -> bool:
        """Whether shuffled tags are joined by caption_separator, as the run's commit of sd-scripts does."""
        return bool(self.table("trainer").get("joins_by_separator", False))

    @property
    def trust(self) -> tuple[str, ...]:
        """Modules whose code the run may run; a run of 0.1, which asked nobody, goes on with what it was made with."""
        given = self.table("run").get("trust", [])
        old = [] if "format" in self.tables else [str(self.values.get(option, "")) for option in CODE_OPTIONS]
        return (*map(str, given), *filter(None, old))

    secrets_file = Text("run", "secrets_file", "")
    """The site file whose `[secrets]` the trainer gets; empty where there are none."""


def refuse_other_format(path: Path, tables: Mapping[str, Any]) -> None:
    """Raise BadRunFolder for a lock of a format that this kwrap does not know, and for one that hides its own.

    Locks of kwrap 0.1 have no digest. One of today that passed for such a lock would be held against almost nothing.
    """
    if tables.get("format", 1) not in range(1, LOCK_FORMAT + 1):
        raise BadRunFolder(
            f"{path}: has format {tables['format']}; this kwrap reads 1 to {LOCK_FORMAT}",
            "Use the kwrap that made the run, or a newer one.",
        )
    if tables.get("format", 1) == 1 and "digest" in tables:
        raise BadRunFolder(
            f"{path}: the line `format = {LOCK_FORMAT}` was changed or taken out",
            f"Write it back above the lock's first table: format = {LOCK_FORMAT}",
        )
