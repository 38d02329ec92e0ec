"""The folder of a run: what lies where in it, and what its lock says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kohaku_wrap.config.code_names import KINDS as CODE_OPTIONS
from kohaku_wrap.config.run_files import (
    ACCELERATE_FILE,
    DATASET_FILE,
    LOCK_FILE,
    LOCK_FORMAT,
    TRAINER_FILE,
    find_image_folder,
    flatten_dataset,
)
from kohaku_wrap.errors import KwrapError, UsageError, reason_of
from kohaku_wrap.files import describe_absence, read_regular
from kohaku_wrap.formats.caption_rows import NoImages, read_captions_metadata
from kohaku_wrap.formats.held_out import HELD_OUT_FILE, HeldOut
from kohaku_wrap.steps import StepCount
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.training.records.chapters import EPOCHS, STEPS, Chapter, Cycle, find_cycle, read_chapters
from kohaku_wrap.training.records.origin import ORIGIN_FOLDER, Origin, read_origin

LARGEST_NUMBER = 1 << 48
STATE_NAME = re.compile(r"optimizer-step-([0-9]{8,})")


class NoSuchRun(UsageError):
    """The name or path given is not a run."""


class BadRunFolder(KwrapError):
    """A run's own files cannot be read."""


class Place:
    """A path within the folder of its owner, which has one in `folder`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type) -> Path:
        place: Path = owner.folder / self.name
        return place


class Number:
    """A whole number of the lock, from `at_least` on."""

    def __init__(self, table: str, key: str, at_least: int = 0) -> None:
        self.entry = table, key, at_least

    def __get__(self, lock: Lock, kind: type) -> int:
        return lock.number(*self.entry)


@dataclass(frozen=True)
class Run:
    """One training: a folder with its lock, attempts, states, checkpoints, metrics and ledger."""

    folder: Path
    """`runs/NAME`, absolute."""

    images_now: Path | None = field(default=None, compare=False)
    """Where its images lie by the word of a site that the run does not know of yet."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def output_name(self) -> str:
        """What its checkpoints are called: the name that it was made with, whatever its folder is called now."""
        made_as = self.lock.values.get("output_name") or self.lock.table("run").get("name")
        return str(made_as or self.name)

    @property
    def networks(self) -> list[Path]:
        """The network of the last optimizer step, in each form that is there."""
        if not self.checkpoints.is_dir():
            return []
        return sorted(path for path in self.checkpoints.iterdir() if path.is_file() and path.stem == self.output_name)

    attempts = Place("attempts")
    states = Place("states")
    checkpoints = Place("checkpoints")
    samples = Place("samples")
    logs = Place("logs")
    ledger = Place("ledger")
    abandoned = Place("abandoned")
    metrics = Place("metrics.jsonl")
    trainer_data = Place("trainer-data")
    lock_file = Place(LOCK_FILE)
    trainer_config = Place(TRAINER_FILE)
    dataset_config = Place(DATASET_FILE)
    accelerate_config = Place(ACCELERATE_FILE)
    origin_folder = Place(ORIGIN_FOLDER)

    @property
    def origin_state(self) -> Path | None:
        """The state of another run that this one began from, in its own folder; None where it is no branch."""
        origin = self.lock.origin
        return self.origin_folder / origin.state if origin else None

    @property
    def first_optimizer_step(self) -> int:
        """Optimizer steps done before its first one: those of the run that it goes on from as a branch."""
        origin = self.lock.origin
        return origin.start_optimizer_step if origin else 0

    @cached_property
    def lock(self) -> Lock:
        """What was decided when the run was made; raises BadRunFolder when it cannot be read."""
        try:
            tables = parse_toml(read_regular(self.lock_file))
        except FileNotFoundError:
            raise BadRunFolder(
                f"{self.folder}: {LOCK_FILE} is missing", "Restore it from a backup, or start a new run."
            ) from None
        except (OSError, ValueError) as error:
            raise BadRunFolder(
                f"{self.lock_file}: not TOML ({reason_of(error)})", "Restore it from a backup, or start a new run."
            ) from error
        refuse_later_lock(self.lock_file, tables)
        return Lock(tables, self.lock_file)

    def forget_lock(self) -> None:
        """Read the lock anew when it is next asked for: it was written just now."""
        vars(self).pop("lock", None)

    def suppose(self, tables: Mapping[str, Any]) -> Run:
        """The same run as if its lock were this one; nothing is written."""
        supposed = Run(self.folder)
        vars(supposed)["lock"] = Lock(tables, self.lock_file)
        return supposed

    def find_images(self) -> Path:
        """The folder of the run's images and captions: the lock's, or that of dataset.toml if they were moved there."""
        places = [self.lock.table("dataset").get("image_dir", ""), *filter(None, [self.images_now])]
        with suppress(OSError, ValueError, TypeError, AttributeError):
            places.append(find_image_folder(flatten_dataset(parse_toml(read_regular(self.dataset_config)))))
        for place in places:
            with suppress(NoImages):
                digest = self.lock.dataset_digest
                if read_captions_metadata(Path(place), digest).get("digest") == digest:
                    return Path(place)
        return Path(places[0])


@dataclass(frozen=True)
class Lock:
    """`run.lock.toml`, by meaning."""

    tables: Mapping[str, Any]
    """The whole document."""

    path: Path
    """Where it was read, for messages."""

    def table(self, name: str) -> Mapping[str, Any]:
        """One table of the document: `inputs`, `machine`, …; empty for one that it lacks."""
        return dict(self.tables.get(name, {}))

    def entry(self, table: str, key: str) -> Any:
        """One value; raises BadRunFolder that names it when it is missing."""
        try:
            return self.tables[table][key]
        except (KeyError, TypeError):
            raise BadRunFolder(
                f"{self.path}: [{table}] {key} is missing", "The lock was edited or cut; restore it or start a new run."
            ) from None

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

    def number(self, table: str, key: str, at_least: int = 0) -> int:
        """A whole number; raises BadRunFolder where it is none, or out of all bounds."""
        value = self.entry(table, key)
        if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value < LARGEST_NUMBER:
            raise BadRunFolder(
                f"{self.path}: [{table}] {key} is {str(value)[:40]}, not a whole number from {at_least} on",
                "The lock was edited or cut; restore it or start a new run.",
            )
        return value

    @property
    def engine(self) -> str:
        return str(self.entry("run", "engine"))

    @property
    def data(self) -> str:
        return str(self.entry("run", "data"))

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
        machine = self.table("machine")
        return int(machine.get("processes", max(int(machine.get("gpus", 1)), 1)))

    @property
    def workers(self) -> int:
        """The loader workers that the site or the template gave when the run was made."""
        return int(self.table("machine").get("workers", self.values.get("max_data_loader_n_workers", 0)) or 0)

    @property
    def is_on_cpu(self) -> bool:
        """Whether the run's site has no GPU."""
        return int(self.table("machine").get("gpus", 1)) == 0

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
            raise BadRunFolder(
                f"{self.path}: [[chapters]] cannot be read ({error})",
                "The lock was edited or cut; restore it or start a new run.",
            ) from None
        option = EPOCHS if self.values.get(EPOCHS) else STEPS
        return (Chapter(0, 0, self.total_optimizer_steps, {option: int(self.values.get(option, 0))}),)

    @property
    def origin(self) -> Origin | None:
        """What the run began from as a branch of another one; None where it is none."""
        try:
            return read_origin(self.tables["parent"]) if "parent" in self.tables else None
        except (TypeError, ValueError) as error:
            raise BadRunFolder(
                f"{self.path}: [parent] cannot be read ({error})",
                "The lock was edited or cut; restore it or start a new run.",
            ) from None

    @property
    def cycle(self) -> Cycle:
        """What the schedule goes through now."""
        return find_cycle(self.chapters)

    batches = Number("plan", "batches", 1)
    """Of one epoch, all buckets together."""

    @property
    def count(self) -> StepCount:
        return StepCount(batches=self.batches, group=self.group)

    @property
    def states_kept(self) -> int:
        return int(self.table("states").get("keep", 3))

    @property
    def milestone_every(self) -> int:
        """Optimizer steps between the states that retention never removes; 0 for none."""
        return int(self.table("states").get("every", 0))

    @property
    def values(self) -> Mapping[str, Any]:
        """Every effective sd-scripts option."""
        return self.table("values")

    @property
    def dataset_digest(self) -> str:
        """The digest of the captions and sizes that are trained; empty when the lock has none."""
        return str(self.table("inputs").get("captions_digest", ""))

    @property
    def trainer_commit(self) -> str:
        return str(self.table("trainer").get("commit", ""))

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
        return bool(self.tables.get("trainer", {}).get("joins_by_separator", False))

    @property
    def trust(self) -> tuple[str, ...]:
        """Modules whose code the run may run; a run of 0.1, which asked nobody, goes on with what it was made with."""
        given = self.table("run").get("trust", [])
        old = [] if "format" in self.tables else [str(self.values.get(option, "")) for option in CODE_OPTIONS]
        return (*map(str, given), *filter(None, old))

    @property
    def secrets_file(self) -> str:
        """The site file whose `[secrets]` the trainer gets; empty where there are none."""
        return str(self.table("run").get("secrets_file", ""))


def refuse_later_lock(path: Path, tables: Mapping[str, Any]) -> None:
    """Raise BadRunFolder for a lock of a format that this kwrap does not know."""
    if tables.get("format", 1) not in range(1, LOCK_FORMAT + 1):
        raise BadRunFolder(
            f"{path}: has format {tables['format']}; this kwrap reads 1 to {LOCK_FORMAT}",
            "Use the kwrap that made the run, or a newer one.",
        )


def is_run(folder: Path) -> bool:
    """Whether the folder is a run of kwrap."""
    return (folder / LOCK_FILE).is_file()


def list_runs(runs_folder: Path) -> Iterator[Run]:
    """The runs in a folder, by name."""
    if runs_folder.is_dir():
        for folder in sorted(runs_folder.iterdir()):
            if is_run(folder):
                yield Run(folder.resolve())


def find_run(name_or_path: str, runs_folders: tuple[Path, ...] = (Path("runs"),)) -> Run:
    """The run of that path, or of that name in one of the folders; raises NoSuchRun with those there are."""
    path = Path(name_or_path)
    candidates = [path, *(folder / name_or_path for folder in runs_folders)]
    for candidate in candidates:
        if is_run(candidate):
            return Run(candidate.resolve())
    for candidate in candidates:
        if (candidate / "attempts").is_dir():
            lock = candidate / LOCK_FILE
            what = describe_absence(lock) if lock.exists() else "missing from this run"
            raise NoSuchRun(f"{lock}: {what}", "Restore it, or start a new run.")
    names = [run.name for folder in runs_folders for run in list_runs(folder)]
    there = f"Runs here: {', '.join(names)}." if names else f"No runs in {', '.join(map(str, runs_folders))}."
    raise NoSuchRun(f"{name_or_path}: no such run", f"{there} Give a name, or the path of a run's folder.")
