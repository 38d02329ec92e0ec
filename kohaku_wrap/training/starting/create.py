"""A new run: template, dataset and site become a folder with everything that its attempts read."""

from __future__ import annotations

import dataclasses
import errno
import os
import secrets
import shlex
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kohaku_wrap.config.base_model import check_base_model, needs_own_vae, require_weight_files
from kohaku_wrap.config.effective import Effective, shape_batch
from kohaku_wrap.config.kernels import choose_kernels
from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.reading import PARENT_OPTION
from kohaku_wrap.config.render import compose_run, compose_trainer, hash_inputs, hash_named_files
from kohaku_wrap.config.run_files import COMMAND_FILE, LAYERS_FILE
from kohaku_wrap.config.samples import with_own_prompts
from kohaku_wrap.config.site import Site, load_site
from kohaku_wrap.config.training_data import PUT_BACK, ImagesGone, find_absent, read_training_sizes
from kohaku_wrap.errors import KwrapError, UsageError, command_line
from kohaku_wrap.files import describe_absence, fsync_folder, write_json, write_text
from kohaku_wrap.formats.caption_rows import NoImages
from kohaku_wrap.locks import making_folder
from kohaku_wrap.planning.parent_network import fit_parent
from kohaku_wrap.planning.step_plan import plan_steps
from kohaku_wrap.toml_files import load_toml
from kohaku_wrap.trainer.builtin_options import BuiltinOptions
from kohaku_wrap.trainer.checkout import find_checkout, require_supported
from kohaku_wrap.trainer.engines import find_engine
from kohaku_wrap.trainer.installed import CHECKOUT_VARIABLE, find_trainer
from kohaku_wrap.trainer.requirements import require_requirements
from kohaku_wrap.training.comparing.differences import check_captions
from kohaku_wrap.training.comparing.other_lock import refuse_other_lock
from kohaku_wrap.training.records.folder import Run, is_run
from kohaku_wrap.training.starting.caching import lock_caches
from kohaku_wrap.training.starting.launch import Launch, plan_launch
from kohaku_wrap.training.starting.machines import Machines
from kohaku_wrap.training.starting.run_data import keep_run_data

PARENT_FILE = "network.safetensors"
"""A run's own copy of the network that it began from, where that had names of another tool."""


class RunExists(UsageError):
    """There is a run of that name already."""


class RunRefused(KwrapError):
    """The trainer refused a new run before its first step; nothing of the run is kept."""


class MissingTrainer(KwrapError):
    """The engine is sd-scripts and no checkout is there."""


@dataclass(frozen=True)
class NewRun:
    """A run that could be made; nothing of it is on the disk."""

    name: str
    """The run's name."""

    folder: Path
    """Where it would lie, absolute."""

    engine: str
    """The trainer."""

    engine_origin: str
    """Who chose it: the option, the site, or the default."""

    effective: Effective
    """The template with all its layers."""

    site: Site
    """The machine, its engine settled."""

    launch: Launch
    """The first attempt's command."""

    beginning: Mapping[str, Any] = field(default_factory=dict)
    """Tables of the lock of a branch: `parent`, and `chapters` where it goes on in those of its parent."""

    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Of the lock of a branch: the network that its parent was trained on from."""

    fill: Callable[[Path], None] | None = None
    """Puts what a branch brings along into its folder, before that has its name."""


def plan_new_run(
    template: str,
    site_file: Path,
    name: str | None = None,
    engine: str | None = None,
    overrides: Sequence[str] = (),
    trust: Sequence[str] = (),
) -> NewRun:
    """Resolve and check everything but what reads images or whole models; takes well under a second.

    Raises ProblemsFound (also for options that the builtin engine lacks), MissingTrainer, RunExists, BadBatch,
    BadBaseModel for one whose header tells it.
    """
    site = load_site(site_file)
    engine, engine_origin = settle_engine(site, engine)
    site = dataclasses.replace(site, machine=dataclasses.replace(site.machine, engine=engine))
    effective = resolve_template(template, site, overrides, trust=trust)
    return settle_new_run(effective, site, Path(template).stem if name is None else name, engine, engine_origin)


def settle_new_run(effective: Effective, site: Site, name: str, engine: str, engine_origin: str) -> NewRun:
    """A run of these options, checked as far as neither images nor whole models are read; raises what is wrong."""
    shape = shape_batch(effective)
    folder = place_new_run(site.paths.runs, name)
    if engine == "builtin":
        # The worker would refuse them too, but only after the run is made and torch is loaded.
        BuiltinOptions.from_config(compose_trainer(effective, folder, name), on_cpu=site.machine.gpus == 0)
    if site.paths.base_model.is_file():
        check_base_model(site.paths.base_model, needs_own_vae(site))
    require_weight_files(effective.options, folder)
    on_cpu = site.machine.gpus == 0
    machines = Machines(site.machine.machines, 0, site.machine.accelerate)
    kernels = choose_kernels(on_cpu=on_cpu)
    launch = plan_launch(
        folder, engine, 1, shape.processes, shape.accumulation, on_cpu, machines=machines, kernels=kernels
    )
    return NewRun(name, folder, engine, engine_origin, effective, site, launch)


def place_new_run(runs: Path, name: str) -> Path:
    """The folder of a new run of that name. Raises UsageError for what is no name, RunExists where it is taken."""
    check_name(name)
    refuse_taken(runs / name)
    return runs / name


LONGEST_NAME_BYTES = 150
"""A file's name has at most 255 on all common file systems; a checkpoint adds its step and ending to the run's."""


def check_name(name: str) -> None:
    """Raise UsageError for what cannot be the name of a run's folder."""
    plain = name == name.strip() and name.isprintable() and len(os.fsencode(name)) <= LONGEST_NAME_BYTES
    if not name or not plain or Path(name).name != name or name.startswith("."):
        raise UsageError(f"{name!r} is not a run's name", "Give a plain name; runs lie in the site's paths.runs.")


def refuse_taken(folder: Path) -> None:
    """Raise RunExists where something lies at the place of a new run, be it made by another kwrap just now."""
    if is_run(folder):
        raise RunExists(
            f"{folder}: this run exists",
            f"Go on with it: {command_line('resume', folder)}. Or start another with --run NAME.",
        )
    if folder.exists():
        raise RunExists(f"{folder}: is in the way and not a run", "Remove it, or choose another name with --run NAME.")


def settle_engine(site: Site, asked: str | None) -> tuple[str, str]:
    """The engine and who chose it.

    Raises MissingTrainer where sd-scripts is meant and not installed, AnchorsMissing or UnsupportedTrainer where the
    one that is there cannot be corrected, MissingRequirements where it would fail at its imports.
    """
    if asked is not None:
        engine, origin = asked, "--engine"
    elif "engine" in load_toml(site.path).get("machine", {}):
        engine, origin = site.machine.engine, str(site.path)
    else:
        engine, origin = site.machine.engine, "the default"
    has_checkout = find_engine(engine).has_checkout
    if has_checkout and find_trainer() is None and not os.environ.get(CHECKOUT_VARIABLE):
        raise MissingTrainer(
            f"the engine is sd-scripts ({origin}), and no checkout of it is there",
            "Get it with `kwrap trainer install`, or train with kwrap's compact trainer: --engine builtin.",
        )
    if has_checkout:
        require_supported(find_checkout())
        require_requirements()
    return engine, origin


def list_absent(new: NewRun) -> list[str]:
    """What `create_run` would miss or refuse of files, caches too, with what to do; a dry run made for another machine
    may lack it."""
    absent = list_absent_places(new.site) or list_absent_images(new.effective, new.site)
    if not absent:
        try:
            check_captions(new.effective.get("kwrap.data"), new.site.paths.images)
            lock_caches(new.effective, new.site)
        except KwrapError as missing:
            return [f"{missing.message}. {missing.next_step}"]
    return absent


def list_absent_images(effective: Effective, site: Site) -> list[str]:
    """A sentence where image files are not there; nothing where that cannot be said, as captions are not there."""
    with suppress(NoImages):
        said, _ = find_absent(effective, site.paths.images)
        return [f"{said}; put them back before you train"] if said else []
    return []


def require_images(new: NewRun, allow: Collection[str]) -> None:
    """Raise ImagesGone for image files that are not there; where bad images are allowed, if all are. Looks at some."""
    said, are_all = find_absent(new.effective, new.site.paths.images)
    if said and (are_all or "bad-images" not in allow):
        allowed = "" if are_all else "; or train substitutes in their place with --allow bad-images"
        raise ImagesGone(said, f"{PUT_BACK}{allowed}.")


def list_absent_places(site: Site) -> list[str]:
    """Models and images of the site that are not there, with where to set each."""
    paths = site.paths
    files = {"base_model": paths.base_model, "vae": paths.vae}
    absent = [(name, path, "file") for name, path in files.items() if path is not None and not path.is_file()]
    absent += [("images", paths.images, "folder")] * (not paths.images.is_dir())
    return [
        f"{path}: {describe_absence(path, wanted)}; fix paths.{name} in {site.path} before you train"
        for name, path, wanted in absent
    ]


def create_run(
    new: NewRun,
    command: Sequence[str],
    locked: Path | None = None,
    on_bytes: Callable[[int], None] | None = None,
    allow: Collection[str] | None = None,
) -> Run:
    """Count the steps, hash the inputs and make the run's folder, whole or not at all.

    `command` is what the person typed, kept as `command.txt`. `locked`: the lock that the new one must equal.
    `allow`: the faults that are accepted; image files are only looked for where it is given.
    Raises MissingExtra, NoImages, DamagedCaptions, ImagesGone, MissingInput, ProblemsFound with every
    difference from `locked`.
    """
    find_engine(new.engine).require_packages()
    sizes = read_training_sizes(new.effective, new.site.paths.images)
    check_captions(new.effective.get("kwrap.data"), new.site.paths.images)
    if allow is not None:
        require_images(new, allow)
    plan = plan_steps(new.effective, sizes)
    with making_folder(new.folder.parent, f".{new.name}.partial-") as part:
        effective, parent = settle_parent(new, part / PARENT_FILE)
        effective = with_own_prompts(effective, new.site.paths.images)
        inputs = hash_inputs(new.effective, new.site, on_bytes=on_bytes) | hash_named_files(parent) | dict(new.inputs)
        inputs |= lock_caches(effective, new.site)
        run_id = secrets.token_hex(16)
        rendered = compose_run(effective, new.site, new.folder, new.name, plan, inputs, run_id, new.beginning)
        if locked is not None:
            refuse_other_lock(locked, rendered.lock)
        whole = part / new.name
        whole.mkdir()
        for path in parent.values():
            path.rename(whole / PARENT_FILE)
        dataclasses.replace(rendered, folder=whole).write()
        layers = {key: entry.origin for key, entry in effective.entries.items()}
        write_json(whole / LAYERS_FILE, layers, 1)
        keep_run_data(whole, effective, new.site.paths.images, plan)
        write_text(whole / COMMAND_FILE, f"{shlex.join(command)}\n{new.launch.text()}\n")
        for inner in ("attempts", "states", "checkpoints", "ledger"):
            (whole / inner).mkdir()
        if new.fill:
            new.fill(whole)
        fsync_folder(whole)
        try:
            whole.rename(new.folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            refuse_taken(new.folder)
            raise
    fsync_folder(new.folder.parent)
    return Run(new.folder.resolve())


def settle_parent(new: NewRun, out: Path) -> tuple[Effective, dict[str, Path]]:
    """The template's values with a network to train on from that fits, and where it was written under other names.

    Raises ProblemsFound with the modules that do not fit.
    """
    effective = new.effective
    if not effective.get(PARENT_OPTION) or not fit_parent(effective, out):
        return effective, {}
    entry = dataclasses.replace(effective.entries[PARENT_OPTION], value=str(new.folder / PARENT_FILE))
    return dataclasses.replace(effective, entries={**effective.entries, PARENT_OPTION: entry}), {PARENT_OPTION: out}


def check_parent(new: NewRun) -> None:
    """Whether a network to train on from fits, without making the run; raises what `settle_parent` does.

    Nothing is looked at where the base model is not there, which says what the modules are.
    """
    if not new.site.paths.base_model.is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        settle_parent(new, Path(folder) / PARENT_FILE)
