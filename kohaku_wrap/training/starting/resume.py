"""The next attempt of a run: from which state, at which position, and what then no longer counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kohaku_wrap.config.trainer_rows import read_trainer_rows
from kohaku_wrap.config.training_data import read_lengths
from kohaku_wrap.dataset.own.images import read_imported
from kohaku_wrap.errors import KwrapError, Problem, command_line
from kohaku_wrap.file_hashes import sha256_of_file
from kohaku_wrap.formats.caption_rows import NoImages, open_captions
from kohaku_wrap.streams import draws, stream_key
from kohaku_wrap.trainer.engines import find_engine
from kohaku_wrap.training.comparing.accepting import ACCEPTED_FAULTS, OTHER_RUN, refuse_changes, refuse_unknown
from kohaku_wrap.training.comparing.differences import check_captions, list_changes, list_notes
from kohaku_wrap.training.comparing.places import Places, read_places, write_trainer_data
from kohaku_wrap.training.comparing.site_places import settle_places
from kohaku_wrap.training.records.accelerate_file import write_accelerate_config
from kohaku_wrap.training.records.attempts import Attempt, attempt_numbers, list_attempts, read_attempt, write_attempt
from kohaku_wrap.training.records.evaluations import list_evaluation_files
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import recorded_attempts
from kohaku_wrap.training.records.manifest import DamagedState, read_manifest
from kohaku_wrap.training.records.networks import is_finished, shorter_end, step_of_network
from kohaku_wrap.training.records.states import list_states
from kohaku_wrap.training.starting.choose_state import find_foreign_state, find_state
from kohaku_wrap.training.starting.launch import (
    Launch,
    note_threads,
    plan_attempt_launch,
)
from kohaku_wrap.training.starting.length import settle_length
from kohaku_wrap.training.starting.machines import refuse_machines
from kohaku_wrap.wording import name_first


class RunFinished(KwrapError):
    """All optimizer steps are done."""


class EarlierChapter(KwrapError):
    """A state from before the run was extended, whose steps another schedule would train."""


@dataclass(frozen=True)
class ResumePlan(Attempt):
    """The next attempt, and what making it would do; nothing is changed yet."""

    damaged: tuple[DamagedState, ...] = ()
    """States that did not verify, newest first."""

    abandons: tuple[Path, ...] = ()
    """Later states and checkpoints, which move to `abandoned/`."""

    notes: tuple[str, ...] = ()
    """What changed without effect, what was taken from the site or not, and what cannot be compared."""

    places: Places | None = None
    """Where all that the run reads and writes lies now."""

    def rank_positions(self) -> list[int]:
        """The next global position of each rank."""
        return [self.start.global_position + rank for rank in range(self.processes)]


def plan_resume(
    run: Run,
    step: int | None = None,
    processes: int | None = None,
    workers: int | None = None,
    allow: Sequence[str] = (),
    foreign: bool = False,
    foreign_state: Path | None = None,
    on_bytes: Callable[[int], None] | None = None,
    machines: int | None = None,
    site_file: Path | None = None,
    deep: bool = False,
) -> ResumePlan:
    """Choose the newest whole state of the run's current line, or that of `step`, and verify it.

    Raises RunFinished, NoSuchState with those there are, DamagedState for an explicit step, NoWholeState where states
    were saved and none is whole (step 0 then starts from the beginning), DifferentRun with the list of differences
    between state and run, DamagedCaptions, BadOrder for a number of processes that does not divide.
    """
    refuse_unknown(allow, run)
    asked = {"processes": processes or machines, "workers": workers is not None}
    places = settle_places(run, site_file, on_bytes, [name for name, given in asked.items() if given])
    if step is None and foreign_state is None and is_finished(run):
        # Whatever became of its states.
        raise RunFinished(
            f"run {run.name} is finished: all {run.lock.total_optimizer_steps:,} optimizer steps are done",
            f"Prove it with `{command_line('verify', run.folder)}`. Train on with "
            f"`{command_line('extend', run.folder, '--epochs', 1)}`, or go back with `--step N`.",
        )
    attempts = list_attempts(run)
    last = attempts[-1] if attempts else None
    before = (last.processes, last.machines) if last else (run.lock.processes, run.lock.machines)
    machines = machines or before[1]
    processes = processes or places.processes or before[0] // before[1] * machines
    refuse_machines(run, machines, processes)
    accumulation = run.lock.count.accumulation(processes)
    damaged: list[DamagedState] = []
    state: Path | None
    if foreign:
        state, optimizer_step = find_foreign_state(run, step, foreign_state)
    else:
        state, optimizer_step = find_state(run, attempts, step, damaged, on_bytes)
    refuse_earlier_chapter(run, optimizer_step)
    is_other = foreign or state == run.origin_state
    changes = list_changes(run, None if is_other else state, on_bytes, places)
    image_notes: list[str] = []
    if not any(problem.where in ("images", "dataset") for problem in changes):
        others = [problem for problem in changes if problem.where == "image_files"]
        faults, image_notes = compare_moved_images(places, deep, bool(others))
        # Files that are named say more than that some are others.
        changes = [problem for problem in changes if not faults or problem not in others] + faults
    accepted = list_accepted(run, allow, last, changes)
    refuse_changes(f"run {run.name}", changes, accepted, run.lock.format, places.hint)
    number = max([0, *attempt_numbers(run), *recorded_attempts(run.ledger)]) + 1
    if number > 1:
        # Those of the first attempt were read when the run was made.
        check_captions(run.lock.data, places.images, run.lock.dataset_digest)
    there = {problem.where: problem.what for problem in changes if problem.where in accepted}
    abandons = [
        path
        for at, path in list_states(run.states)
        if path != state and (at > optimizer_step or path in [each.state for each in damaged])
    ]
    abandons += [path for path in later_checkpoints(run, optimizer_step) if path != state]
    return ResumePlan(
        run=run,
        number=number,
        processes=processes,
        accumulation=accumulation,
        workers=next(
            each for each in (workers, places.workers, last.workers if last else run.lock.workers) if each is not None
        ),
        start_optimizer_step=optimizer_step,
        state=state,
        allow=accepted,
        foreign=foreign,
        machines=machines,
        differences=there,
        lineage=describe_lineage(state) if OTHER_RUN in there else None,
        position=run.lock.count.position_of(optimizer_step, processes),
        address=places.address or (last.address if last else {}),
        threads=last.threads if last else None,
        damaged=tuple(damaged),
        abandons=tuple(abandons),
        notes=(*list_notes(run, places), *image_notes, *note_threads(last)),
        places=places,
    )


def refuse_earlier_chapter(run: Run, optimizer_step: int) -> None:
    """Raise EarlierChapter for a start before the last chapter, where its schedule would have begun there."""
    chapter = run.lock.chapters[-1]
    if chapter.schedule and optimizer_step < chapter.from_optimizer_step:
        raise EarlierChapter(
            f"run {run.name}: optimizer step {optimizer_step:,} lies before step {chapter.from_optimizer_step:,}, from "
            f"which the run was extended with --schedule {chapter.schedule}",
            f"Take a state from there on, or start a new run of {chapter.total_optimizer_steps:,} optimizer steps.",
        )


def list_accepted(
    run: Run, allow: Collection[str], last: Attempt | None, changes: Collection[Problem]
) -> frozenset[str]:
    """What is accepted: now, faults in an attempt before, and differences that the last attempt accepted as they are.

    A difference of the same key that is another one is asked for again. In a run of kwrap 0.1 a key was enough.
    """
    accepted = frozenset(allow)
    if last is None:
        return accepted
    if run.lock.format == 1:
        return accepted | last.allow
    as_before = {problem.where for problem in changes if last.differences.get(problem.where) == problem.what}
    return accepted | (last.allow & ACCEPTED_FAULTS) | as_before


def describe_lineage(state: Path | None) -> dict[str, Any] | None:
    """Where a state of another run comes from, for the attempt's record."""
    if state is None:
        return None
    manifest = read_manifest(state)
    return {
        "run_id": manifest.fingerprint.run_id,
        "options_digest": manifest.fingerprint.options_digest,
        "attempt": manifest.attempt,
        "optimizer_step": manifest.optimizer_step,
    }


def begin_attempt(plan: ResumePlan) -> tuple[Attempt, Launch]:
    """Make the attempt, move what no longer counts to `abandoned/`, and say how to start it.

    The attempt is written first: from then on the ledger and the states of the line left behind are known as such,
    even if this process dies in the middle. Raises MissingExtra, MissingRequirements.
    """
    find_engine(plan.run.lock.engine).require_packages()
    places = plan.places or read_places(plan.run)
    places.write()
    settle_length(plan.run, plan.abandons)
    launch = plan_attempt_launch(plan)
    write_attempt(plan, launch.environment)
    write_accelerate_config(plan)
    write_trainer_data(places)
    for path in plan.abandons:
        away = plan.run.abandoned / f"before-attempt-{plan.number}" / path.relative_to(plan.run.folder)
        away.parent.mkdir(parents=True, exist_ok=True)
        path.rename(away)
    return read_attempt(plan.run, plan.number), launch


def later_checkpoints(run: Run, optimizer_step: int) -> list[Path]:
    """Checkpoints of steps and epochs that are to be trained again, the final one, and what was made of all these."""
    # The network of a shorter run stays: it gets the name of its step.
    end = shorter_end(run) or run.lock.total_optimizer_steps + 1
    files = sorted(run.checkpoints.iterdir()) if run.checkpoints.is_dir() else []
    found = [
        path for path in files if not path.is_dir() and (step_of_network(run, path, end) or 0) > optimizer_step
    ]  # fmt: skip
    found += [path for step, path in list_evaluation_files(run) if step > optimizer_step]
    return found + [path for step, path in list_states(run.samples) if step > optimizer_step]


DRAWN = 100
"""Images whose sha256 is compared after a move."""


def compare_moved_images(places: Places, deep: bool, are_others: bool) -> tuple[list[Problem], list[str]]:
    """Problems and notes about images that lie elsewhere than at the attempt before, or all of them with `deep`.

    Looked at: that all files are there, and the sha256 of 100 drawn ones, with `deep` of all, where it is known: of
    imported images that were linked or copied. Lengths are compared by the lock's digest, moved or not; where that is
    another, as `are_others` says, the files that are gone are looked for.
    """
    folder = places.images
    is_looked_at = deep or are_others or str(folder) != places.remembered.images
    if not places.run.lock.dataset_digest or not is_looked_at:
        return [], []
    try:
        files = list_files(places)
    except NoImages:
        # Runs of kwrap 0.1 may go on without captions that can be read.
        return [], []
    missing = [files[at] for at in np.flatnonzero(read_lengths(folder, files) < 0).tolist()]
    if missing:
        return [
            Problem("image_files", f"{folder}: {len(missing):,} of {len(files):,} are not there: {name_first(missing)}")
        ], []
    if are_others:
        return [], []
    known = {image.file: image.sha256 for image in read_imported(folder).values() if image.how in ("linked", "copied")}
    chosen = sorted(known.keys() & set(files))
    if not deep:
        chosen = list(draw(chosen))
    other = [file for file in chosen if sha256_of_file(folder / file) != known[file]]
    if other:
        return [
            Problem("image_files", f"{folder}: {len(other):,} of {len(chosen):,} are other files: {name_first(other)}")
        ], []
    compared = f"the sha256 of {len(chosen):,} is the same" if chosen else "their sha256 is not known"
    return [], [f"images: all {len(files):,} are at {folder}; {compared}"]


def list_files(places: Places) -> list[str]:
    """The run's images, relative to their folder."""
    lock = places.run.lock
    if lock.data == "sd-scripts":
        return list(read_trainer_rows(places.images, places.dataset_options).files)
    files: list[str] = open_captions(places.images, lock.dataset_digest).read_all()["file"].to_pylist()
    return files


def draw(files: list[str]) -> Iterator[str]:
    """DRAWN of them, the same ones each time."""
    order = np.argsort(draws(stream_key("moved images"), np.arange(len(files))))
    return (files[at] for at in np.sort(order[:DRAWN]).tolist())
