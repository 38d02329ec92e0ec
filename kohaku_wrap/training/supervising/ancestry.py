"""The runs that a branch came from: whether its own beginning is as it was, and where its parent lies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.config.site import load_site
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.records.folder import Run, list_runs
from kohaku_wrap.training.records.manifest import DamagedState
from kohaku_wrap.training.records.origin import Origin, read_ledger_origin
from kohaku_wrap.training.records.remembered import read_remembered
from kohaku_wrap.training.supervising.choose_state import check_beginning
from kohaku_wrap.training.supervising.ledger_checks import Fault
from kohaku_wrap.training.supervising.line_checks import Check


@dataclass(frozen=True)
class Until:
    """The part of a run that another one began from."""

    attempt: int
    """The last attempt of it."""

    optimizer_step: int
    """The last optimizer step of it."""


def check_origin(run: Run, on_bytes: Callable[[int], None] | None = None) -> tuple[list[Check], list[Fault]]:
    """Whether a branch still has the state that it began from, and its ledger says the same as its lock."""
    origin, state = run.lock.origin, run.origin_state
    if origin is None or state is None:
        return [], []
    place = run.lock.count.position_of(origin.start_optimizer_step, 1)
    faults = []

    def report(what: str) -> None:
        step = origin.start_optimizer_step + 1
        faults.append(Fault("parent", 1, 0, 0, step, place.epoch, place.global_position, what))

    if read_ledger_origin(run.ledger) != origin:
        report("the ledger does not begin with what the lock says of the parent")
    what = f"run {origin.run}, optimizer step {origin.optimizer_step:,}"
    if not state.is_dir():
        return [Check("parent", False, f"{what}: its state is gone from {run.origin_folder.name}/")], faults
    try:
        check_beginning(run, state, on_bytes)
    except DamagedState as error:
        report(error.what)
    return [Check("parent", True, f"{what}; state {origin.state_digest[:10]}")], faults


def find_origin(run: Run) -> tuple[Run, Until] | None:
    """The run that trained up to a branch's beginning, where it is at hand, and which part of it that is."""
    origin: Origin | None = run.lock.origin
    folders = [run.folder.parent]
    with suppress(KwrapError):
        if site := read_remembered(run).site:
            folders.append(load_site(site).paths.runs)
    runs: dict[str, Run] = {}
    for folder in folders:
        for each in list_runs(Path(folder)):
            with suppress(KwrapError):
                runs.setdefault(each.lock.run_id, each)
    while origin is not None and (parent := runs.get(origin.run_id)) is not None:
        if origin.attempt:
            return parent, Until(origin.attempt, origin.optimizer_step)
        # Branched from the very state that the parent began from.
        origin = parent.lock.origin
    return None
