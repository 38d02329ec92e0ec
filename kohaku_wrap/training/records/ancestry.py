"""The run that a branch came from: where it lies, and which part of it led to the branch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.config.site import load_site
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.records.folder import Run, list_runs
from kohaku_wrap.training.records.origin import Origin
from kohaku_wrap.training.records.remembered import read_remembered


@dataclass(frozen=True)
class Until:
    """The part of a run that another one began from."""

    attempt: int
    """The last attempt of it."""

    optimizer_step: int
    """The last optimizer step of it."""


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
