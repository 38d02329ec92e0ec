"""What a site means for a run that is there: paths, processes and workers taken from it, or not and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from glob import escape
from itertools import islice, product
from pathlib import Path
from typing import Any

from kohaku_wrap.config.render import hash_named_files
from kohaku_wrap.config.run_files import PLACE_KEYS
from kohaku_wrap.config.schema import NETWORK_FILES
from kohaku_wrap.config.site import Site, load_site
from kohaku_wrap.config.training_data import describe_data
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.file_hashes import count_unhashed, kept_sha256, sha256_of_file
from kohaku_wrap.formats.caption_rows import NoImages, read_captions_metadata
from kohaku_wrap.steps import BadOrder
from kohaku_wrap.training.comparing.file_changes import BY_ATTEMPT
from kohaku_wrap.training.comparing.places import DifferentRun, Places, map_places, read_places
from kohaku_wrap.training.records.folder import Run

SITE_NAME = "site.toml"

MODELS = {"base_model": "pretrained_model_name_or_path", "vae": "vae"}
"""Files that the lock has the sha256 of, and the trainer's option that names each."""

OPTIONS = {**MODELS, "tokenizers": "tokenizer_cache_dir"}
"""The site's paths that a run takes besides its images, and the trainer's option for each."""

WORKERS = "max_data_loader_n_workers"

ADDRESS = ("main_process_ip", "main_process_port")
"""Options of `accelerate launch` that are a place."""

SAME = {"tokenizers": "the same files", "images": "the same images and captions"}
OTHER = {"tokenizers": "other files", "images": "other images or captions"}
"""What a digest tells, in words; of the rest it is the sha256."""

MOST_TRIED = 64
"""Combinations of files that are tried for a list of networks."""

NEAR_FOLDERS = 3
"""Folders above a run in which the site file that its runs folder belongs to is looked for."""


def settle_places(
    run: Run,
    site_file: Path | None = None,
    on_bytes: Callable[[int], None] | None = None,
    asked: Collection[str] = (),
) -> Places:
    """The places of today; nothing is written.

    `site_file`: the site that was named just now; else the run's own. `asked`: `processes`, `workers`, where the person
    gave a number. Raises DifferentRun for files of the run that cannot be read, and for a site that was named what
    `load_site` raises.
    """
    places = read_places(run)
    try:
        site = find_site(run, places.remembered.site, site_file)
    except KwrapError as error:
        if site_file is not None:
            raise
        first = error.message.splitlines()[0]
        return replace(places, notes=(*places.notes, f"{first}; nothing is taken from this site"))
    return places if site is None else SiteTaker(places, site, on_bytes).take(asked)


def find_base_model(run: Run, site_file: Path | None) -> Path | None:
    """Where the run's base model lies now; None where its files cannot be read: the lock's place is tried then."""
    with suppress(DifferentRun):
        if found := settle_places(run, site_file).options.get(MODELS["base_model"]):
            return Path(str(found))
    return None


def find_site(run: Run, remembered: str, given: Path | None) -> Site | None:
    """The site that was named, that the run went by, or whose runs folder it lies in. Raises KwrapError."""
    if given is not None or (remembered and Path(remembered).is_file()):
        return load_site(given or remembered)
    for folder in (*run.folder.parents[:NEAR_FOLDERS], Path.cwd()):
        if (file := folder / SITE_NAME).is_file():
            site = load_site(file)
            if site.paths.runs.resolve() == run.folder.parent:
                return site
    return None


def bytes_to_hash(run: Run, site_file: Path | None = None) -> int:
    """Bytes of models whose hash is not kept, so that `settle_places` or a comparison reads them; for progress."""
    try:
        places = read_places(run)
        site = find_site(run, places.remembered.site, site_file)
    except KwrapError:
        return 0
    paths = {Path(str(places.options.get(option) or "")) for option in MODELS.values()}
    paths |= {path for name in MODELS if site is not None and (path := getattr(site.paths, name)) is not None}
    return count_unhashed(paths)


class SiteTaker:
    """Takes from one site what changes nothing of what is trained."""

    def __init__(self, places: Places, site: Site, on_bytes: Callable[[int], None] | None) -> None:
        self.places = places
        self.site = site
        self.on_bytes = on_bytes
        self.run = places.run
        self.lock = places.run.lock
        self.inputs = self.lock.table("inputs")
        self.taken = dict(places.remembered.taken)
        self.told: list[str] = []

    def take(self, asked: Collection[str]) -> Places:
        """The places with all that could be taken, and notes on it."""
        for name, option in OPTIONS.items():
            self.take_path(name, self.places.options.get(option), getattr(self.site.paths, name))
        if self.places.images.parts:
            self.take_path("images", str(self.places.images), self.site.paths.images)
        for option in NETWORK_FILES:
            self.find_networks(option)
        self.take_latents()
        numbers = self.take_numbers(asked)
        address = self.take_address()
        if is_other := self.is_other:
            self.told += [f"not taken from {self.site.path}: {what}" for what in self.list_kept()]
        if is_other and not self.told:
            self.told.append("nothing of it concerns this run")
        if self.told and is_other:
            self.told.insert(0, is_other)
        remembered = replace(self.places.remembered, site=str(self.site.path), taken=self.taken)
        return replace(
            self.places,
            remembered=remembered,
            notes=(*self.places.notes, *self.told),
            processes=numbers.get("processes"),
            workers=numbers.get("workers"),
            address=address,
        )

    @property
    def is_other(self) -> str:
        """How the site differs from the one that the run was made on; empty where it does not."""
        if str(self.site.path) != str(self.inputs.get("site", "")):
            return f"this run goes by the site {self.site.path}"
        if sha256_of_file(self.site.path) != self.inputs.get("site_sha256"):
            return f"{self.site.path} changed since the run was made"
        return ""

    def take_latents(self) -> None:
        """The folder of what is cached, of which only the lock's digests are trained."""
        wanted, own = str(self.site.paths.latents), self.taken.get("latents", self.inputs.get("latents", ""))
        if self.lock.table("cache") and wanted != own and self.site.paths.latents.is_dir():
            self.taken["latents"] = wanted
            self.told.append(f"taken from {self.site.path}: latents: {wanted}")

    def take_path(self, name: str, current: Any, wanted: Path | None) -> None:
        """One path of the site, where it is another one than the run took last, or what the run has is gone."""
        if not current or wanted is None:
            return
        is_new = str(wanted) != self.taken.get(name)
        is_there = Path(str(current)).exists()
        if wanted == Path(str(current)):
            self.taken[name] = str(wanted)
        elif not is_new and is_there:
            return
        elif not wanted.exists():
            if is_new:
                self.told.append(f"not taken from {self.site.path}: {name}: {wanted} is not there")
        else:
            self.take_found(name, wanted, is_there, self.recognise(name, wanted))

    def take_found(self, name: str, wanted: Path, is_there: bool, is_same: bool | None) -> None:
        """A path that is there; `is_same` is None where the lock has no digest of it."""
        same, other = SAME.get(name, "the same sha256"), OTHER.get(name, "another sha256")
        if is_there and not is_same:
            why = "the lock has no digest to compare" if is_same is None else f"{other} than the run's"
            self.told.append(f"not taken from {self.site.path}: {name}: {wanted} has {why}")
            return
        self.taken[name] = str(wanted)
        self.places = (
            self.places.move_images(wanted) if name == "images" else self.places.move(OPTIONS[name], str(wanted))
        )
        if is_same is not False:
            how = f"with {same}" if is_same else "which the lock has no digest of"
            self.told.append(f"taken from {self.site.path}: {name}: {wanted}, {how}")

    def recognise(self, name: str, place: Path) -> bool | None:
        """Whether what lies there is what the lock says; None where it does not say."""
        if name == "images":
            return recognise_images(self.run, place, self.places.dataset_options)
        locked = self.inputs.get(f"{name}_sha256")
        if not locked:
            return None
        if name in MODELS:
            return place.is_file() and kept_sha256(place, self.on_bytes) == str(locked)
        option = OPTIONS.get(name, name)
        return hash_named_files({option: str(place)}).get(f"{name}_sha256") == str(locked)

    def find_networks(self, option: str) -> None:
        """Networks that an option names and that are gone, found by name and digest where the site has networks."""
        value = self.places.options.get(option)
        names = [str(each) for each in (value if isinstance(value, list) else [value]) if each]
        locked = self.inputs.get(f"{option}_sha256")
        if not locked or all((self.run.folder / name).is_file() for name in names):
            return
        choices = [list(self.list_candidates(option, at, Path(name))) for at, name in enumerate(names)]
        for chosen in islice(product(*choices), MOST_TRIED):
            if hash_named_files({option: [str(path) for path in chosen]}).get(f"{option}_sha256") == locked:
                moved = iter(chosen)
                self.places = replace(self.places, trainer=self.replace_each(option, moved))
                where = ", ".join(map(str, chosen))
                self.told.append(f"found by its sha256: {option}: {where}")
                return

    def replace_each(self, option: str, chosen: Iterator[Path]) -> Mapping[str, Any]:
        """trainer.toml with the next of `chosen` for each file of an option."""
        return map_places(self.places.trainer, lambda key, text: str(next(chosen)) if key == option else text)

    def list_candidates(self, option: str, at: int, name: Path) -> Iterator[Path]:
        """Files that may be it: where it was, what the site's option names, beside the base model, in runs."""
        given = self.site.trainer.get(option)
        listed = given if isinstance(given, list) else [given]
        places = [name, *([self.site.path.parent / str(listed[at])] if at < len(listed) and listed[at] else [])]
        places += [self.site.paths.base_model.parent / name.name]
        if self.site.paths.runs.is_dir():
            places += sorted(self.site.paths.runs.glob(f"*/checkpoints/{escape(name.name)}"))
        yield from dict.fromkeys(path for path in places if path.is_file())

    def take_numbers(self, asked: Collection[str]) -> dict[str, int]:
        """Processes and workers, where the site has other numbers than the run took last."""
        machine = self.site.machine
        workers = machine.workers if machine.workers is not None else self.site.trainer.get(WORKERS)
        found: dict[str, int] = {}
        for name, value in (("processes", machine.processes), ("workers", workers)):
            if value is None or value == self.taken.get(name) or (name == "processes" and not self.fits_machine()):
                continue
            how = ""
            if name == "processes":
                try:
                    accumulation = self.lock.count.accumulation(value)
                except BadOrder as error:
                    self.told.append(f"not taken from {self.site.path}: {error.message}. {error.next_step}")
                    continue
                how = f", accumulation {accumulation}: still {self.lock.effective_batch:,} images an optimizer step"
            self.taken[name] = value
            if name not in asked:
                found[name] = value
                self.told.append(f"taken from {self.site.path}: {name}: {value}{how}")
        return found

    def take_address(self) -> dict[str, Any]:
        """Where machine 0 is, in accelerate's options, where the site says another place than the run took last."""
        there = {name: value for name, value in self.site.machine.accelerate.items() if name in ADDRESS}
        known = {name: self.taken.get(name, self.lock.accelerate.get(name)) for name in there}
        if self.lock.machines == 1 or not self.fits_machine() or there == known:
            return {}
        self.taken |= there
        where = ", ".join(f"{name} = {value}" for name, value in there.items())
        self.told.append(f"taken from {self.site.path}: machine 0: {where}")
        return there

    def fits_machine(self) -> bool:
        """Whether the site trains on as many machines as the run, on GPUs or a CPU as it does."""
        machine = self.site.machine
        return machine.machines == self.lock.machines and (machine.gpus == 0) == self.lock.is_on_cpu

    def list_kept(self) -> Iterator[str]:
        """What of the site the run does not follow, with the reason."""
        machine, lock = self.site.machine, self.lock
        if machine.engine != lock.engine:
            yield f"engine = {machine.engine}: the run stays with {lock.engine}"
        if machine.batch_per_gpu != lock.batch_per_gpu:
            yield (
                f"batch_per_gpu = {machine.batch_per_gpu}: the run keeps {lock.batch_per_gpu}, from which the order of "
                "its batches follows"
            )
        if (machine.gpus == 0) != lock.is_on_cpu:
            yield f"gpus = {machine.gpus}: a run that began on {'a CPU' if lock.is_on_cpu else 'GPUs'} stays there"
        if machine.machines != lock.machines:
            yield f"num_machines = {machine.machines}: the run was made for {lock.machines}"
        kept = {**lock.table("dataset"), **lock.values}
        for name, value in self.site.trainer.items():
            if name not in PLACE_KEYS | BY_ATTEMPT and kept.get(name) != value:
                was = repr(kept[name]) if name in kept else "not set"
                yield f"{name} = {value!r}: a run keeps the options it was made with ({was})"


def recognise_images(run: Run, folder: Path, dataset: Mapping[str, Any]) -> bool | None:
    """Whether the captions and sizes of a folder are the run's; None where the lock has no digest."""
    digest = run.lock.dataset_digest
    if not digest:
        return None
    try:
        if run.lock.data == "kwrap":
            return str(read_captions_metadata(folder, digest).get("digest", "")) == digest
        return describe_data(run.lock.data, folder, dataset, digest)["captions_digest"] == digest
    except NoImages:
        return False
