"""What `verify` asks of a branch: whether its own beginning is as it was."""

from __future__ import annotations

from collections.abc import Callable

from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.manifest import DamagedState
from kohaku_wrap.training.records.origin import read_ledger_origin
from kohaku_wrap.training.starting.choose_state import check_beginning
from kohaku_wrap.training.verifying.ledger_checks import Fault
from kohaku_wrap.training.verifying.line_checks import Check


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
