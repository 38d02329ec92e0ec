"""A trial of a template: two optimizer steps, a state, a resume of it, and the same network twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.files import remove_folder
from kohaku_wrap.locks import holding_lock
from kohaku_wrap.proving.likeness import Difference, compare_networks
from kohaku_wrap.training.records.folder import Run, is_run
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.records.states import read_manifests
from kohaku_wrap.training.supervising.supervise import SUPERVISOR_LOCK, RunIsBusy

STEPS = 2
SETTINGS = (
    "max_train_epochs=0",
    f"max_train_steps={STEPS}",
    "save_every_n_steps=1",
    "save_state=true",
)
"""Over the template and what the person set."""

SUFFIX = "-try"
"""Of the trial's name."""


@dataclass(frozen=True)
class Trial:
    """What two optimizer steps showed."""

    seconds_per_step: float
    """Of the second step; the first one loads and warms up."""

    state_bytes: int
    """Of one state."""

    network_bytes: int
    """Of one checkpoint."""

    difference: str
    """How the network of the resumed second step differs from the first one; empty where each bit is the same."""


def clear_earlier(folder: Path) -> None:
    """Remove what an earlier trial left at the place of a new one. Raises RunIsBusy where it still trains."""
    if not is_run(folder):
        return
    busy = RunIsBusy(f"{folder}: another trial is training there", "Wait for it, or give --run NAME.")
    with holding_lock(folder / SUPERVISOR_LOCK, busy):
        remove_folder(folder.resolve())


def finish_trial(run: Run, resume_from: Callable[[int], object]) -> Trial:
    """Train the second step of a finished trial once more from the state of the first, and compare.

    `resume_from` trains the run from the state of a step to its end. The run is removed.
    """
    networks = run.networks
    before = run.folder / f"before-{networks[0].name}"
    shutil.copyfile(networks[0], before)
    resume_from(STEPS - 1)
    difference = ""
    try:
        compare_networks(before, networks[0])
    except Difference as found:
        difference = found.message
    states = [manifest.size_bytes for _, manifest in read_manifests(run.states)]
    trial = Trial(
        seconds_per_step=float(read_metrics(run)[-1]["seconds"]),
        state_bytes=max(states, default=0),
        network_bytes=networks[0].stat().st_size,
        difference=difference,
    )
    remove_folder(run.folder)
    return trial
