"""A run renamed or removed as a whole, while no process holds it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.config.reading import PARENT_OPTION
from kohaku_wrap.config.run_files import LOCK_FILE
from kohaku_wrap.errors import KwrapError, command_line
from kohaku_wrap.files import REMOVED_SUFFIX, fsync_folder, read_regular
from kohaku_wrap.locks import holding_lock
from kohaku_wrap.training.comparing.places import DifferentRun, read_trainer
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.folder import Run, list_runs
from kohaku_wrap.training.records.networks import list_written
from kohaku_wrap.training.starting.create import RunExists, check_name
from kohaku_wrap.training.supervising.processes import list_processes
from kohaku_wrap.training.supervising.supervise import SUPERVISOR_LOCK, RunIsBusy


class NeededByOthers(KwrapError):
    """Other runs came from this one, and need what would be removed."""


@dataclass(frozen=True)
class Removal:
    """What removing a run takes away and leaves."""

    run: Run
    """The run."""

    size_bytes: int
    """Of all that would go."""

    kept: tuple[Path, ...]
    """Networks that stay."""


@contextmanager
def holding(run: Run) -> Iterator[None]:
    """Hold the run as its supervisor would. Raises RunIsBusy where any process of it lives here."""
    stop = f"Stop it first (Ctrl-C where it trains), or see `{command_line('status', run.folder)}`."
    busy = RunIsBusy(f"run {run.name}: a process holds it", stop)
    with holding_lock(run.folder / SUPERVISOR_LOCK, busy):
        if list_processes(run):
            raise busy
        yield


def rename_run(run: Run, name: str) -> Run:
    """Give the run's folder another name, beside where it lies; its checkpoints keep the name that it was made with.

    Its next attempt writes its files for the new place. Raises UsageError for what is no name, RunExists, RunIsBusy.
    """
    check_name(name)
    new = run.folder.with_name(name)
    if new.exists():
        raise RunExists(f"{new}: is there already", "Choose another name.")
    with holding(run):
        run.folder.rename(new)
        fsync_folder(new.parent)
    return Run(new)


def plan_removal(run: Run, with_checkpoints: bool) -> Removal:
    """What would go and what stays. Raises NeededByOthers with the runs that came from this one."""
    kept = () if with_checkpoints else tuple(sorted(run.checkpoints.glob("*")))
    others = list(list_descendants(run, with_checkpoints))
    if others:
        raise NeededByOthers(
            f"run {run.name}: other runs came from it: {', '.join(other.name for other in others)}",
            "Remove those first, or keep it; what takes most room are its states: [states] keep = N in a template.",
        )
    goes = (path for path in run.folder.rglob("*") if not (kept and path.is_relative_to(run.checkpoints)))
    return Removal(run, sum(path.stat().st_size for path in goes if path.is_file() and not path.is_symlink()), kept)


def list_descendants(run: Run, with_checkpoints: bool) -> Iterator[Run]:
    """Runs beside it that began from a state of it, or from a network of it that would go; a copy of it did not."""
    written = set(list_written(run).values())
    for other in list_runs(run.folder.parent):
        if other.folder == run.folder:
            continue
        text, own_id, named = "", "", list[Any]()
        inputs: Mapping[str, Any] = {}
        with suppress(OSError, UnicodeDecodeError):
            text = read_regular(other.lock_file)
        with suppress(KwrapError):
            own_id, inputs = other.lock.run_id, other.lock.table("inputs")
        with suppress(DifferentRun):
            options = read_trainer(other.trainer_config)
            named = [options.get(PARENT_OPTION), *(options.get("base_weights") or [])]
        lineages = [(attempt.lineage or {}).get("run_id") for attempt in list_attempts(other)]
        is_copy = own_id == run.lock.run_id
        came = run.lock.run_id and (run.lock.run_id in text or run.lock.run_id in lineages) and not is_copy
        # A path may lead there by another way: the folder of all runs is often a link.
        paths = [(other.folder / str(each)).resolve() for each in named if each]
        is_needed = any(each.is_relative_to(run.checkpoints.resolve()) for each in paths)
        # This run may have had another name then.
        is_needed |= inputs.get("network_sha256") in written and not all(path.is_file() for path in paths)
        if came or (with_checkpoints and is_needed):
            yield other


def remove_run(removal: Removal) -> None:
    """Remove the run; networks that stay lie in its `checkpoints/`, with its lock beside them.

    Raises RunIsBusy, BadRunFolder.
    """
    run = removal.run
    # First, as the lock is read for it: nothing is moved where that cannot be read.
    lock_name = f"{run.output_name}.lock.toml" if removal.kept else ""
    with holding(run):
        away = run.folder.with_name(f".{run.name}.{os.getpid()}{REMOVED_SUFFIX}")
        run.folder.rename(away)
        if removal.kept:
            run.folder.mkdir()
            (away / LOCK_FILE).rename(away / run.checkpoints.name / lock_name)
            (away / run.checkpoints.name).rename(run.checkpoints)
            fsync_folder(run.folder)
        try:
            fsync_folder(run.folder.parent)
            shutil.rmtree(away, ignore_errors=True)
        finally:  # a signal in the middle of it leaves nothing either
            shutil.rmtree(away, ignore_errors=True)
