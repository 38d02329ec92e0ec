"""How often each tag was trained up to an optimizer step: counted over the captions as drawn, not estimated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kohaku_wrap.errors import KwrapError, UsageError
from kohaku_wrap.evaluation.trained_line import Line, find_line
from kohaku_wrap.files import Progress, atomic_write
from kohaku_wrap.formats.schema_notes import read_notes, write_notes
from kohaku_wrap.training.records.folder import Run, name_of_step

FORMAT = 1
EXPOSURE_FOLDER = "exposure"


class CaptionsUnknown(KwrapError):
    """What captions the run trained cannot be told from its records."""


class NoSuchTag(UsageError):
    """No caption of the run has the tag."""


@dataclass(frozen=True)
class Exposure:
    """How often each tag of a run was trained."""

    run: Run
    """The run."""

    optimizer_step: int
    """The last one that counts."""

    tags: pa.Table
    """By name: `tag`, and of int64 `images` that have it as written, how often it was `trained`, how often the
    `next_epoch` would train it, and how much `one_more_repeat` of every image would add to that."""

    facts: Mapping[str, Any]
    """Counts over all captions, and what is not known."""

    file: Path
    """Where it is kept."""

    not_kept: str = ""
    """Why it could not be kept; empty where it is."""

    def find(self, name: str) -> dict[str, Any]:
        """The row of a tag, written as in captions or as on the site: `hatsune_miku`, `ask \\(askzy\\)`.

        Raises NoSuchTag.
        """
        plain = re.sub(r"\\([()\[\]])", r"\1", name).strip()
        for written in dict.fromkeys([name.strip(), plain, plain.replace("_", " ")]):
            place = pc.index(self.tags["tag"], written).as_py()
            if place >= 0:
                return dict(self.tags.slice(place, 1).to_pylist()[0])
        within = self.tags.filter(pc.match_substring(self.tags["tag"], plain.replace("_", " "), ignore_case=True))
        near = within.sort_by([("images", "descending"), ("tag", "ascending")])["tag"].slice(0, 5).to_pylist()
        meant = f"Tags with these letters: {', '.join(near)}." if near else "No tag has these letters."
        raise NoSuchTag(f"{name}: no caption of run {self.run.name} has this tag", meant)

    def least(self, count: int) -> list[dict[str, Any]]:
        """The tags that were trained least often, ties by name."""
        ordered = self.tags.sort_by([("trained", "ascending"), ("tag", "ascending")])
        return list(ordered.slice(0, count).to_pylist())


def exposure_file(run: Run, optimizer_step: int) -> Path:
    """Where the exposure up to a step is kept."""
    return run.folder / EXPOSURE_FOLDER / f"{name_of_step(optimizer_step)}.parquet"


def measure_exposure(
    run: Run, optimizer_step: int | None = None, threads: int = 1, on_progress: Progress | None = None
) -> Exposure:
    """How often each tag was trained up to a step (None: the last whole one); kept in the run for the next time.

    Raises NotTrained, LedgerDiffers, CaptionsUnknown, DatasetChanged, NoLedger, NoImages.
    """
    if run.lock.data != "kwrap":
        raise CaptionsUnknown(
            f'run {run.name} was trained with data = "{run.lock.data}", whose captions are not in its records',
            'Only runs with data = "kwrap", the default, can be counted.',
        )
    line = find_line(run, optimizer_step)
    path = exposure_file(run, line.optimizer_step)
    key = {"format": FORMAT, **line.key}
    if kept := read_kept(line, path, key):
        return kept
    from kohaku_wrap.evaluation.counting import count_line

    tags, facts = count_line(line, threads, on_progress)
    exposure = Exposure(run, line.optimizer_step, tags, facts, path)
    about = write_notes({"key": key, "facts": facts})
    try:
        with atomic_write(path, "wb") as stream:
            pq.write_table(tags.replace_schema_metadata(about), stream)
    except OSError as error:
        return replace(exposure, not_kept=str(error))
    return exposure


def read_kept(line: Line, path: Path, key: Mapping[str, Any]) -> Exposure | None:
    """What was counted before for the same records; None where there is nothing whole of them."""
    with suppress(OSError, pa.ArrowException, ValueError, KeyError):
        table = pq.read_table(path)
        about = read_notes(table.schema)
        if about["key"] == key:
            return Exposure(line.run, line.optimizer_step, table, about["facts"], path)
    return None
