"""The folder of a run: what lies where in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kohaku_wrap.config.run_files import (
    ACCELERATE_FILE,
    DATASET_FILE,
    LOCK_FILE,
    TRAINER_FILE,
    find_image_folder,
    flatten_dataset,
)
from kohaku_wrap.errors import UsageError, reason_of
from kohaku_wrap.files import describe_absence, read_regular
from kohaku_wrap.formats.caption_rows import NoImages, read_captions_metadata
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.training.records.lock import BadRunFolder, Lock, refuse_other_format
from kohaku_wrap.training.records.origin import ORIGIN_FOLDER

SUFFIXES = frozenset({".safetensors", ".ckpt", ".pt"})
"""Of networks, as `save_model_as` has them."""

STATE_NAME = re.compile(r"optimizer-step-([0-9]{8,})")


def name_of_step(optimizer_step: int) -> str:
    """What the state, the pictures and the measurements of a step are called; STATE_NAME reads it."""
    return f"optimizer-step-{optimizer_step:08d}"


class NoSuchRun(UsageError):
    """The name or path given is not a run."""


class Place:
    """A path within the folder of its owner, which has one in `folder`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type) -> Path:
        place: Path = owner.folder / self.name
        return place


@dataclass(frozen=True)
class Run:
    """One training: a folder with its lock, attempts, states, checkpoints, metrics and ledger."""

    folder: Path
    """`runs/NAME`, absolute."""

    images_now: Path | None = field(default=None, compare=False)
    """Where its images lie by the word of a site that the run does not know of yet."""

    latents_now: Path | None = field(default=None, compare=False)
    """Likewise what is cached of them."""

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
        return [path for path in self.network_files if path.stem == self.output_name]

    @property
    def network_files(self) -> list[Path]:
        """The networks on the disk among its checkpoints, by name; other tools put pictures and notes beside them."""
        return sorted(path for path in self.checkpoints.glob("[!.]*") if path.suffix in SUFFIXES and path.is_file())

    attempts = Place("attempts")
    states = Place("states")
    checkpoints = Place("checkpoints")
    samples = Place("samples")
    evaluations = Place("validation")
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
        refuse_other_format(self.lock_file, tables)
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


def is_run(folder: Path) -> bool:
    """Whether the folder is a run of kwrap."""
    return (folder / LOCK_FILE).is_file()


def list_runs(runs_folder: Path) -> Iterator[Run]:
    """The runs in a folder, by name."""
    for folder in sorted(runs_folder.glob("*")):
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
