"""Where a run and its inputs lie now: its files read, and written anew for a new place of the run or of an input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kohaku_wrap.config.run_files import (
    DATASET_FILE,
    PLACE_KEYS,
    find_image_folder,
    flatten_dataset,
    is_place,
    merge_subsets,
)
from kohaku_wrap.config.schema import NETWORK_FILES
from kohaku_wrap.config.trainer_rows import load_cache
from kohaku_wrap.dataset.captions.formats import CACHE_FILE
from kohaku_wrap.errors import Problem, ProblemsFound, command_line, reason_of
from kohaku_wrap.files import atomic_write, read_regular, write_text
from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.trainer.options import flatten_sections
from kohaku_wrap.training.records.attempts import RUN_VARIABLE
from kohaku_wrap.training.records.documents import read_json_files
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.remembered import Remembered, read_remembered, write_remembered

OWN_PLACES = frozenset({"output_dir", "output_name", "sample_prompts", "logging_dir", "network_args.preset"})
"""Those that are made by the run itself."""

PRESET_ARGUMENT = "preset="


class DifferentRun(ProblemsFound):
    """The run is no longer what its state was made with."""


@dataclass(frozen=True)
class Places:
    """A run's files as its next attempt has them, and what was taken from the site for it."""

    run: Run
    """The run."""

    trainer: Mapping[str, Any]
    """trainer.toml with today's places."""

    dataset: Mapping[str, Any]
    """dataset.toml, likewise."""

    remembered: Remembered
    """The site, and what the run has of it from now on."""

    processes: int | None = None
    """All processes, where the site has another number than the run took last."""

    workers: int | None = None
    """Loader workers, likewise."""

    address: Mapping[str, Any] = field(default_factory=dict)
    """Where machine 0 is now, in accelerate's options, likewise."""

    notes: tuple[str, ...] = ()
    """What was taken, and what was not and why."""

    @property
    def options(self) -> dict[str, Any]:
        """The options of trainer.toml, flat."""
        return flatten_sections(self.trainer)

    @property
    def dataset_options(self) -> dict[str, Any]:
        """The options of dataset.toml, its levels put together."""
        return flatten_dataset(self.dataset)

    @property
    def images(self) -> Path:
        """The folder of images and captions."""
        return Path(find_image_folder(self.dataset_options) or self.run.lock.table("inputs").get("images", ""))

    def find_run(self) -> Run:
        """The run, which finds its images and what is cached of them at their places of today."""
        latents = self.remembered.taken.get("latents")
        return replace(self.run, images_now=self.images, latents_now=Path(latents) if latents else None)

    @property
    def hint(self) -> str:
        """What to try where something that the run needs is not at its place; empty where all is."""
        named = [self.options.get(option) for option in sorted(PLACE_KEYS - OWN_PLACES)]
        listed = [each for value in named if value for each in (value if isinstance(value, list) else [value])]
        missing = [path for path in (*listed, str(self.images)) if not (self.run.folder / str(path)).exists()]
        if not missing:
            return ""
        again = command_line("resume", self.run.folder, "--site", self.remembered.site or "site.toml")
        return (
            f"If {missing[0]} was moved, write its new place into a site file, and: {again}\n"
            "`kwrap extend` and `kwrap verify` take the same --site.\n"
        )

    def move(self, option: str, value: Any) -> Places:
        """The same with another place for an option of trainer.toml."""
        return replace(self, trainer=map_places(self.trainer, lambda key, text: value if key == option else text))

    def move_images(self, folder: Path) -> Places:
        """The same with another folder of images; those of several subsets keep their place below it."""
        old = self.images

        def move(_: str, text: str) -> str:
            place = Path(text)
            return str(folder / place.relative_to(old)) if place.is_relative_to(old) else text

        return replace(self, dataset=map_places(self.dataset, move))

    def write(self) -> None:
        """Write the files whose places are others by now, each whole, and what is remembered."""
        texts = ((self.run.trainer_config, self.trainer), (self.run.dataset_config, self.dataset))
        for path, document in texts:
            if read_run_file(path) != document:
                write_text(path, toml_text(document))
        write_remembered(self.run, replace(self.remembered, images=str(self.images)))


def read_trainer(path: Path) -> dict[str, Any]:
    """The options of trainer.toml, flat."""
    return flatten_sections(read_run_file(path))


def read_dataset(path: Path) -> dict[str, Any]:
    """The options of dataset.toml, its levels put together."""
    return flatten_dataset(read_run_file(path))


def read_run_file(path: Path) -> dict[str, Any]:
    """A TOML file of the run; raises DifferentRun when it cannot be read."""
    try:
        document = parse_toml(read_regular(path))
        refuse_odd_shape(document)
        return document
    except (OSError, ValueError) as error:
        raise DifferentRun(str(path), [Problem(path.name, reason_of(error))], "Restore the run's own files.") from error


def refuse_odd_shape(document: Mapping[str, Any]) -> None:
    """Raise ValueError where tables or places are something else, which no trainer could read."""
    if not isinstance(general := document.get("general", {}), Mapping):
        raise ValueError(f"general is {str(general)[:40]}, not a table")
    datasets = require_tables(document, "datasets")
    for dataset in datasets:
        require_tables(dataset, "subsets")
    for key, value in {**flatten_sections(document), **flatten_dataset(document)}.items():
        listed = value if isinstance(value, list) and key in NETWORK_FILES else [value]
        if is_place(key) and not all(isinstance(each, str) for each in listed):
            raise ValueError(f"{key} is {str(value)[:40]}, not a path")


def require_tables(document: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """A list of tables; none where it is not set. Raises ValueError where it is something else."""
    value = document.get(key, [])
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        return value
    raise ValueError(f"{key} is {str(value)[:40]}, not a list of tables")


def read_places(run: Run) -> Places:
    """The run's files with its own folder's place of today in them; nothing is written.

    Raises DifferentRun for files that cannot be read.
    """
    earlier = list(dict.fromkeys(list_earlier_folders(run)))
    moved_from: dict[Path, None] = {}

    def move(_: str, text: Any) -> Any:
        place = Path(str(text))
        if not place.is_absolute() or place.resolve().is_relative_to(run.folder):
            return text
        for folder in earlier:
            if place.is_relative_to(folder):
                moved_from[folder] = None
                return str(run.folder / place.relative_to(folder))
        return text

    trainer, dataset = (map_places(read_run_file(path), move) for path in (run.trainer_config, run.dataset_config))
    notes = tuple(
        f"the run was moved here from {folder}: its files are written for its new place" for folder in moved_from
    )
    return Places(run, trainer, dataset, read_remembered(run), notes=notes)


def list_earlier_folders(run: Run) -> Iterator[Path]:
    """Where the run lay when it was made, and in each of its attempts."""
    if made_in := run.lock.values.get("output_dir"):
        yield Path(str(made_in)).parent
    for document in read_json_files(run.attempts, "*/attempt.json"):
        environment = document.get("environment")
        if isinstance(environment, dict) and isinstance(folder := environment.get(RUN_VARIABLE), str):
            yield Path(folder)


def map_places(document: Mapping[str, Any], move: Callable[[str, Any], Any]) -> dict[str, Any]:
    """A document of the run with every place in it as `move` has it, which gets the option's name and the value."""

    def follow(key: str, value: Any) -> Any:
        if key in PLACE_KEYS and value and not isinstance(value, Mapping):
            return [move(key, each) for each in value] if isinstance(value, list) else move(key, value)
        if isinstance(value, Mapping):
            return {name: follow(name, each) for name, each in value.items()}
        if isinstance(value, list):
            return [follow(key, each) for each in value]
        if key == "network_args" and str(value).startswith(PRESET_ARGUMENT):
            return PRESET_ARGUMENT + str(move("network_args.preset", str(value).removeprefix(PRESET_ARGUMENT)))
        return value

    return {name: follow(name, value) for name, value in document.items()}


def write_trainer_data(places: Places) -> None:
    """Write the copy and a dataset.toml that names it, for data = "sd-scripts" with a cache; else remove what is there.

    sd-scripts takes paths of the cache as they stand, and relative ones from its working folder. Raises NoImages.
    """
    run, images = places.run, places.images
    shutil.rmtree(run.trainer_data, ignore_errors=True)
    if run.lock.data != "sd-scripts":
        return
    cached = [Path(str(each["image_dir"])) for each in merge_subsets(places.dataset) if each.get("cache_info")]
    own: dict[str, Path] = {}
    for number, folder in enumerate(folder for folder in cached if (folder / CACHE_FILE).is_file()):
        # The trainer writes the folder's last name into its networks.
        copy = run.trainer_data / str(number) / folder.name
        with atomic_write(copy / CACHE_FILE) as stream:
            entries = load_cache(images, folder / CACHE_FILE).items()
            json.dump({(images / file).absolute().as_posix(): entry for file, entry in entries}, stream)
        own[str(folder)] = copy
    if own:
        dataset = map_places(places.dataset, lambda _, text: str(own.get(str(text), text)))
        write_text(run.trainer_data / DATASET_FILE, toml_text(dataset))
