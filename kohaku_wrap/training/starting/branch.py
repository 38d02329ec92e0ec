"""A new run that begins from another run's state, with other options."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.config.effective import Effective, shape_batch
from kohaku_wrap.config.layers import resolve_template, vary_lock
from kohaku_wrap.config.reading import LENGTHS, PARENT_OPTION
from kohaku_wrap.config.render import compose_run
from kohaku_wrap.config.run_files import flatten_dataset, merge_subsets
from kohaku_wrap.config.site import Site, load_site
from kohaku_wrap.config.training_data import compose_dataset, describe_data, read_training_sizes
from kohaku_wrap.config.validation import settle_held_out
from kohaku_wrap.dataset.buckets import BucketOptions
from kohaku_wrap.errors import ProblemsFound, UsageError, command_line
from kohaku_wrap.files import fsync_folder, link_file
from kohaku_wrap.planning.parent_network import fit_parent
from kohaku_wrap.planning.step_plan import plan_steps
from kohaku_wrap.steps import StepPlan
from kohaku_wrap.training.comparing.other_lock import compare_options
from kohaku_wrap.training.comparing.site_places import OPTIONS, find_site, settle_places
from kohaku_wrap.training.records.attempts import Attempt, list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.lock import Lock
from kohaku_wrap.training.records.manifest import DamagedState, digest_of_state, read_manifest
from kohaku_wrap.training.records.origin import Origin, name_optimizer, write_origin
from kohaku_wrap.training.records.states import list_states
from kohaku_wrap.training.starting.already_trained import refuse_trained
from kohaku_wrap.training.starting.choose_state import NoSuchState, find_state
from kohaku_wrap.training.starting.create import NewRun, place_new_run, settle_engine, settle_new_run
from kohaku_wrap.training.starting.extend import refuse_old

SHAPES_NETWORK = (
    "network_module",
    "network_dim",
    "network_alpha",
    "network_train_unet_only",
    "network_train_text_encoder_only",
    "dim_from_weights",
    "pretrained_model_name_or_path",
)
"""Options by which the network may have other modules or shapes; beside its arguments and preset."""

WEIGHTS_FILES = ("network.safetensors", "model.safetensors")
"""What the network is called within a state, by the builtin engine and by accelerate."""


@dataclass(frozen=True)
class Branch:
    """A run that could be made; nothing of it is on the disk."""

    parent: Run
    """Whose state it begins from."""

    state: Path
    """That state."""

    new: NewRun
    """The run to be made."""

    origin: Origin
    """What its lock and its ledger will say of the beginning."""

    plan: StepPlan
    """Its steps."""

    changes: tuple[tuple[str, Any, Any], ...]
    """Key, the parent's value and its own, of the trainer's commit and every option that differs; None is unset."""

    damaged: tuple[DamagedState, ...]
    """States of the parent that were passed over."""

    notes: tuple[str, ...]
    """What of the site was not taken."""


def plan_branch(
    parent: Run,
    name: str,
    step: int | None = None,
    overrides: Sequence[str] = (),
    template: str | None = None,
    site_file: Path | None = None,
    trust: Sequence[str] = (),
    on_bytes: Callable[[int], None] | None = None,
    typed: Sequence[str] = (),
) -> Branch:
    """A run from the parent's newest whole state, or that of `step`, with the parent's options but for `overrides`.

    `template`: the options are this template's instead. `site_file`: whose paths, images and machine count. `typed`:
    the options of the command but for the step, for the one that an error names. Raises
    ProblemsFound, also where the weights do not fit, NoSuchState, DamagedState, UsageError for a length that is over,
    and what `settle_new_run` raises.
    """
    refuse_old(parent, "be the beginning of a branch")
    # First: to verify a state and to hash models takes minutes.
    place_new_run(load_site(site_file).paths.runs if site_file else parent.folder.parent, name)
    lock = parent.lock
    attempts, damaged = list_attempts(parent), list[DamagedState]()
    state, step = find_state(parent, attempts, step, damaged, on_bytes)
    if state is None:
        there = ", ".join(f"{at:,}" for at, _ in list_states(parent.states))
        advice = f"States there are: {there}." if there else "Train it to its first state."
        raise NoSuchState(f"run {parent.name}: no state to branch from", advice)
    site, notes = settle_site(parent, site_file, on_bytes)
    if template is None:
        own = dataclasses.replace(site, trainer={})
        effective = vary_lock(parent.lock_file, lock.tables, lock.chapters[-1].length, own, overrides, trust)
        notes += list_kept(site, effective) if site_file else []
        site = own
    else:
        effective = resolve_template(template, site, overrides, trust=trust)
    effective = without_network(effective)
    refuse_other_network(parent, state, effective)
    engine, _ = settle_engine(site, lock.engine)
    new = settle_new_run(effective, site, name, engine, f"as run {parent.name}")
    plan = plan_steps(effective, read_training_sizes(effective, site.paths.images))
    notes += refuse_trained(parent, settle_held_out(effective, site.paths.images))
    anew = tuple(list_order_changes(lock, effective, site, plan))
    origin = Origin(
        run=parent.name,
        run_id=lock.run_id,
        options_digest=lock.options_digest,
        optimizer_step=step,
        attempt=last_attempt(attempts, state),
        state=state.name,
        state_digest=digest_of_state(state),
        optimizer=name_optimizer(lock.values),
        start_optimizer_step=0 if anew else step,
        begins_anew=anew,
    )
    refuse_end(parent, origin, plan, name, typed)
    beginning: dict[str, Any] = {"parent": origin.document()}
    if origin.continues and (chapters := inherit_chapters(lock, step, effective, plan)):
        beginning["chapters"] = chapters
    inputs = {key: value for key, value in lock.table("inputs").items() if key.startswith("network")}
    new = dataclasses.replace(
        new,
        beginning=beginning,
        inputs={key: inputs[key] for key in ("network", "network_name", "network_sha256") if key in inputs},
        fill=lambda folder: bring_along(folder, state, origin),
    )
    rendered = compose_run(effective, site, new.folder, name, plan)
    before, now = (tables.get("trainer", {}).get("commit", "")[:7] for tables in (lock.tables, rendered.lock))
    changes = tuple(compare_options(lock.tables, rendered.lock))
    if before != now:
        changes = (("commit of sd-scripts", before, now), *changes)
    return Branch(parent, state, new, origin, plan, changes, tuple(damaged), tuple(notes))


def settle_site(parent: Run, site_file: Path | None, on_bytes: Callable[[int], None] | None) -> tuple[Site, list[str]]:
    """The site that was named, or the parent's own with the places of today; its engine stays the parent's."""
    places = settle_places(parent, None, on_bytes)
    if site_file is not None:
        site, batch = load_site(site_file), None
    else:
        found = find_site(parent, places.remembered.site, None)
        if found is None:
            again = command_line("branch", parent.folder, "--run", "NEW", "--site", "site.toml")
            raise UsageError(f"run {parent.name}: the site that it was made on is gone", f"Name one: {again}")
        own = {name: Path(value) for name, option in OPTIONS.items() if (value := places.options.get(option))}
        paths = dataclasses.replace(found.paths, **own, images=places.images, runs=parent.folder.parent)
        site, batch = dataclasses.replace(found, paths=paths), parent.lock.batch_per_gpu
    machine = dataclasses.replace(
        site.machine, engine=parent.lock.engine, batch_per_gpu=batch or site.machine.batch_per_gpu
    )
    return dataclasses.replace(site, machine=machine), list(places.notes)


def list_kept(site: Site, effective: Effective) -> list[str]:
    """Trainer options of the site that the branch does not follow."""
    return [
        f"not taken from {site.path}: {name} = {value!r}: a branch keeps its parent's options but for --set"
        for name, value in site.trainer.items()
        if effective.get(name, effective.get(f"dataset_options.{name}")) != value
    ]


def without_network(effective: Effective) -> Effective:
    """The options without a network to begin from: the state's weights take its place."""
    if effective.get("dim_from_weights"):
        return effective
    entries = {key: entry for key, entry in effective.entries.items() if key != PARENT_OPTION}
    return dataclasses.replace(effective, entries=entries)


def refuse_other_network(parent: Run, state: Path, effective: Effective) -> None:
    """Raise ProblemsFound where options of the network changed and the state's weights do not fit any more."""
    lock = parent.lock
    own = {"network_args": effective.subtable("network_args"), "preset": effective.preset}
    is_same = all(lock.table(name) == table for name, table in own.items())
    if is_same and all(effective.get(key) == lock.values.get(key) for key in SHAPES_NETWORK):
        return
    weights = next((path for name in WEIGHTS_FILES if (path := state / name).is_file()), None)
    if weights is None:
        return
    entry = dataclasses.replace(effective.entries["effective_batch"], value=str(weights))
    with tempfile.TemporaryDirectory() as folder:
        try:
            fit_parent(
                dataclasses.replace(effective, entries={**effective.entries, PARENT_OPTION: entry}),
                Path(folder) / WEIGHTS_FILES[0],
            )
        except ProblemsFound as found:
            raise ProblemsFound(
                f"the network of run {parent.name} does not fit these options",
                found.problems,
                "A branch takes all weights: leave out what changes the network, or start a new run.",
            ) from None


def list_order_changes(lock: Lock, effective: Effective, site: Site, plan: StepPlan) -> Iterator[str]:
    """What of the options changes which images an optimizer step has, so that the parent's place means nothing."""
    shape, images = shape_batch(effective), site.paths.images
    dataset = compose_dataset(effective, images)
    digest = describe_data(effective.get("kwrap.data"), images, flatten_dataset(dataset))["captions_digest"]
    sides = (
        ("the seed", lock.seed, effective.get("seed")),
        ("data", lock.data, effective.get("kwrap.data")),
        ("the dataset's digest", lock.dataset_digest[:10], digest[:10]),
        ("effective_batch", lock.effective_batch, shape.effective_batch),
        ("batch_per_gpu", lock.batch_per_gpu, shape.batch_per_gpu),
        ("repeats", list_repeats(lock.subsets), list_repeats(merge_subsets(dataset))),
        (
            "the bucket options",
            BucketOptions.from_dataset_options(lock.table("dataset")),
            BucketOptions.from_dataset_options(effective.subtable("dataset_options", with_defaults=True)),
        ),
    )
    held_out = settle_held_out(effective, images)
    if (lock.held_out.text() if lock.held_out else "") != (held_out.text() if held_out else ""):
        yield "the posts that are held out changed"
        return
    changed = [(what, one, other) for what, one, other in sides if one != other]
    for what, one, other in changed:
        yield f"{what} changed" if what.startswith("the bucket") else f"{what} was {one}, is {other}"
    if not changed and lock.batches != plan.batches:
        yield f"batches of an epoch were {lock.batches:,}, are {plan.batches:,}"


def list_repeats(subsets: Sequence[dict[str, Any]]) -> str:
    """The repeats of each subset, for people."""
    return ", ".join(str(subset.get("num_repeats") or 1) for subset in subsets)


def last_attempt(attempts: Sequence[Attempt], state: Path) -> int:
    """The parent's attempt that trained up to the state; 0 for the state that it began from itself."""
    if attempts and state == attempts[0].run.origin_state:
        return 0
    return read_manifest(state).attempt


def refuse_end(parent: Run, origin: Origin, plan: StepPlan, name: str, typed: Sequence[str]) -> None:
    """Raise UsageError for a branch that would have nothing to train."""
    if plan.total_optimizer_steps > origin.start_optimizer_step:
        return
    epochs = origin.start_optimizer_step // plan.optimizer_steps_per_epoch + 1
    again = command_line(
        "branch", parent.folder, "--step", origin.optimizer_step, *typed, "--set", f"max_train_epochs={epochs}"
    )
    raise UsageError(
        f"run {name} would end after optimizer step {plan.total_optimizer_steps:,} and begins after step "
        f"{origin.start_optimizer_step:,}",
        f"Say how long it is as a whole, such as: {again}",
    )


def inherit_chapters(lock: Lock, step: int, effective: Effective, plan: StepPlan) -> list[dict[str, Any]]:
    """The chapters that the parent had gone through, the last one with the new length; none where it had one."""
    kept = [chapter for chapter in lock.chapters if chapter.from_optimizer_step <= step]
    if len(kept) < 2:
        return []
    length = {name: int(value) for name in LENGTHS if (value := effective.get(name)) and effective.is_set(name)}
    last = dataclasses.replace(kept[-1], total_optimizer_steps=plan.total_optimizer_steps, length=length)
    return [chapter.document() for chapter in (*kept[:-1], last)]


def bring_along(folder: Path, state: Path, origin: Origin) -> None:
    """Give a new run's folder its own links of the state's files, and its ledger the origin."""
    target = Run(folder).origin_folder / state.name
    for source in sorted(path for path in state.rglob("*") if path.is_file()):
        file = target / source.relative_to(state)
        file.parent.mkdir(parents=True, exist_ok=True)
        link_file(source, file)
    for each in (target, target.parent):
        fsync_folder(each)
    write_origin(folder / "ledger", origin)
