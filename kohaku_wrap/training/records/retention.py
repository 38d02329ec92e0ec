"""Which states are kept: the newest few, milestones, and always the last good one."""

from __future__ import annotations

from pathlib import Path

from kohaku_wrap.training.records.manifest import DamagedState, read_manifest
from kohaku_wrap.training.records.states import check_state_sizes, list_states, remove_state, state_folder


def remove_old_states(states: Path, keep: int, every: int = 0) -> list[int]:
    """Apply retention after a state was written; the steps removed.

    Kept are the newest `keep` scheduled states, those at multiples of `every`, and the newest state that is whole.
    """
    found = list(list_states(states))
    scheduled: list[int] = []
    unscheduled: list[int] = []
    for step, path in found:
        try:
            (scheduled if read_manifest(path).scheduled else unscheduled).append(step)
        except DamagedState:
            continue
    kept = set(scheduled[-max(keep, 1) :])
    kept |= {step for step in scheduled if every and step % every == 0}
    kept |= {step for step in unscheduled if not scheduled or step > scheduled[-1]}
    surplus = [step for step in (*scheduled, *unscheduled) if step not in kept]
    if surplus and not any(is_state_there(state_folder(states, step)) for step in kept):
        surplus.remove(max(surplus))
    for step in surplus:
        remove_state(state_folder(states, step))
    return sorted(surplus)


def is_state_there(state: Path) -> bool:
    """Whether the state's manifest and sizes are right; its content is not read."""
    try:
        check_state_sizes(state)
    except DamagedState:
        return False
    return True
