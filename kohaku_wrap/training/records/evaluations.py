"""What validation measured while a run trained: a file an evaluation, with each post's loss at each time step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kohaku_wrap.files import atomic_write, match_names
from kohaku_wrap.formats.schema_notes import read_notes, write_notes
from kohaku_wrap.training.records.folder import STATE_NAME, Run, name_of_step

FORMAT = 1
NAME = re.compile(rf"{STATE_NAME.pattern}\.parquet")

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """The losses of all held-out posts after one optimizer step."""

    optimizer_step: int
    """Steps done; 0 before the first one."""

    posts: npt.NDArray[np.int64]
    """(posts,) ids, ascending."""

    timesteps: tuple[int, ...]
    """Of 1000, ascending."""

    losses: Losses
    """(posts, time steps); NaN for a picture that cannot be read."""

    about: Mapping[str, Any]
    """`key`: of all that decides the numbers but the weights; attempt, processes, batch, device, versions, seconds."""

    @cached_property
    def loss(self) -> float | None:
        """The mean over posts and time steps."""
        return average(self.losses[np.isfinite(self.losses).all(axis=1)])


def average(losses: Losses) -> float | None:
    """The mean of all numbers that are finite, summed in order in float64; None for none."""
    values = losses[np.isfinite(losses)]
    return float(np.add.accumulate(values)[-1] / len(values)) if len(values) else None


def evaluation_file(run: Run, optimizer_step: int) -> Path:
    """Where the evaluation after a step is kept."""
    return run.evaluations / f"{name_of_step(optimizer_step)}.parquet"


def write_evaluation(run: Run, evaluation: Evaluation) -> None:
    """Write it whole or not at all."""
    about = {"format": FORMAT, "optimizer_step": evaluation.optimizer_step, **evaluation.about}
    names = ["id", *(f"t{step:03d}" for step in evaluation.timesteps)]
    table = pa.table([evaluation.posts, *evaluation.losses.T.copy()], names=names).replace_schema_metadata(
        write_notes(about)
    )
    with atomic_write(evaluation_file(run, evaluation.optimizer_step), "wb") as stream:
        pq.write_table(table, stream)


def read_evaluation(path: Path) -> Evaluation:
    """Raises ValueError for what is none, or of another format, and OSError."""
    try:
        table = pq.read_table(path)
        about = read_notes(table.schema)
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}, and this kwrap reads {FORMAT}")
        names = [name for name in table.column_names if name != "id"]
        losses = np.stack([table[name].to_numpy() for name in names], axis=1)
        steps = tuple(int(name[1:]) for name in names)
        return Evaluation(int(about["optimizer_step"]), table["id"].to_numpy(), steps, losses, about)
    except (pa.ArrowException, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no evaluation ({error})") from None


def list_evaluation_files(run: Run) -> list[tuple[int, Path]]:
    """The files with their optimizer steps, ascending; readable or not."""
    return sorted((int(match[1]), path) for match, path in match_names(run.evaluations, NAME) if path.is_file())


def read_evaluations(run: Run, newest_first: bool = False) -> Iterator[Evaluation]:
    """All evaluations of a run by optimizer step; files that are none are left out."""
    files = list_evaluation_files(run)
    for step, path in reversed(files) if newest_first else files:
        with suppress(OSError, ValueError):
            found = read_evaluation(path)
            if found.optimizer_step == step:
                yield found


def read_last_evaluation(run: Run) -> Evaluation | None:
    """That after the latest step; None where there is none that can be read."""
    return next(read_evaluations(run, newest_first=True), None)
