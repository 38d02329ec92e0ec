"""The pictures that kwrap draws of a run: of which networks, where they lie, and which are not drawn yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.config.samples import KWRAP
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.networks import list_network_files, shorter_end, step_of_network

CONTACT_SHEET = "contact-sheet.png"
"""Written last: where it is, all pictures are."""


@dataclass(frozen=True)
class Pictures:
    """Those of one network."""

    optimizer_step: int
    """At which it was saved."""

    network: Path
    """The file."""

    folder: Path
    """Where its pictures lie, or will."""

    @property
    def sheet(self) -> Path:
        """All of them on one picture."""
        return self.folder / CONTACT_SHEET

    @property
    def are_drawn(self) -> bool:
        """Whether all are there."""
        return self.sheet.is_file()


def folder_of_pictures(run: Run, optimizer_step: int) -> Path:
    """Where the pictures of a step lie, for `kwrap report` too."""
    return run.samples / f"optimizer-step-{optimizer_step:08d}"


def list_pictures(run: Run) -> list[Pictures]:
    """The pictures of each network on the disk that `[samples]` asks kwrap to draw, by optimizer step."""
    asked = run.lock.table("samples")
    if asked.get("by") != KWRAP:
        return []
    every, end = int(asked.get("every") or 1), shorter_end(run) or run.lock.total_optimizer_steps
    found: dict[int, Path] = {}
    for path in list_network_files(run):
        step = step_of_network(run, path, end)
        if step is not None and path.suffix == ".safetensors" and (step % every == 0 or step == end):
            found[step] = path
    return [Pictures(step, path, folder_of_pictures(run, step)) for step, path in sorted(found.items())]
