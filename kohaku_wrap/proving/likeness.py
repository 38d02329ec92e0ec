"""Whether two runs are the same bit for bit: networks, ledger, metrics, file names, rotation."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.safetensors import read_header
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.evaluations import read_evaluations
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import list_ledger_files, read_ledger_file
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.records.networks import STEP_ENDING

CHECKED_FIELDS = {
    "flags": "flags",
    "order_digest": "order digest (which images)",
    "content_digest": "content digest (captions, crops, flips, time steps)",
    "loss": "loss",
    "learning_rate": "learning rate",
}
"""What two records of one position must agree in, and in words."""

STEP_IN_NAME = re.compile(r"step-?(\d{8,})")

METRICS = ("loss", "loss_average", "lr_unet", "lr_text_encoder", "images")

Records = npt.NDArray[np.void]


class Difference(KwrapError):
    """The first thing found in which two runs differ."""


@dataclass(frozen=True)
class Likeness:
    """What was compared and found the same."""

    tensors: int
    """Of all checkpoints together."""

    checkpoints: int
    """Files of networks."""

    micro_batches: int
    """Positions of the ledger: images, captions, time steps, losses, rates."""

    repeated: int
    """Micro-batches that an attempt trained again after a kill, with the same result."""

    optimizer_steps: int
    """Lines of the metrics."""

    attempts: int
    """Of the interrupted run."""

    evaluations: int
    """Of held-out posts at optimizer steps at which both were measured."""

    def describe(self) -> str:
        held_out = f", {self.evaluations} evaluations" if self.evaluations else ""
        return (
            f"{self.tensors} tensors in {self.checkpoints} networks, {self.micro_batches} micro-batches "
            f"({self.repeated} trained again), {self.optimizer_steps} optimizer steps{held_out}, "
            f"{self.attempts} attempts"
        )


def compare_runs(whole: Run, interrupted: Run) -> Likeness:
    """What is the same in both. Raises Difference with the first thing that is not.

    A branch is compared together with the part of its parent that it began from.
    """
    records, repeated = read_positions(whole)[0], read_positions(interrupted)
    compare_records(records, repeated[0])
    steps = compare_metrics(whole, interrupted)
    names = compare_names(whole, interrupted)
    tensors = sum(
        compare_networks(
            whole.checkpoints / f"{whole.output_name}{name}",
            interrupted.checkpoints / f"{interrupted.output_name}{name}",
        )
        for name in names
    )
    measured = compare_evaluations(whole, interrupted)
    return Likeness(tensors, len(names), len(records), repeated[1], steps, len(list_attempts(interrupted)), measured)


def read_positions(run: Run) -> tuple[Records, int]:
    """The last record of each position, in order, and how many positions were trained again.

    Raises Difference where two attempts trained one position differently.
    """
    files = [read_ledger_file(path).records for _, _, path in list_ledger_files(run.ledger)]
    if parent := find_parent(run):
        earlier = read_positions(parent)[0]
        files.append(earlier[earlier["optimizer_step"] <= run.first_optimizer_step])
    records = np.concatenate(files)
    records = records[np.lexsort((records["attempt"], records["position"], records["epoch"]))]
    again = (records["epoch"][1:] == records["epoch"][:-1]) & (records["position"][1:] == records["position"][:-1])
    for index in np.flatnonzero(again):
        compare_record(records[index], records[index + 1], "an attempt and the one before it")
    last = np.append(~again, True)
    return records[last], int(again.sum())


def compare_records(whole: Records, interrupted: Records) -> None:
    if len(whole) != len(interrupted):
        raise Difference(f"{len(whole)} micro-batches uninterrupted, {len(interrupted)} with kills")
    for one, other in zip(whole, interrupted, strict=True):
        compare_record(one, other, "the two runs")


def compare_record(one: Any, other: Any, who: str) -> None:
    where = f"epoch {one['epoch']}, position {one['position']}"
    if (one["epoch"], one["position"]) != (other["epoch"], other["position"]):
        raise Difference(f"{where} is missing or out of order")
    for name, words in CHECKED_FIELDS.items():
        if one[name].tobytes() != other[name].tobytes():
            raise Difference(f"{who} differ in the {words} of {where}: {one[name]}, {other[name]}")


def compare_metrics(whole: Run, interrupted: Run) -> int:
    lines, others = read_lines(whole), read_lines(interrupted)
    if len(lines) != len(others):
        raise Difference(f"{len(lines)} optimizer steps uninterrupted, {len(others)} with kills")
    for line, other in zip(lines, others, strict=True):
        for name in METRICS:
            if line.get(name) != other.get(name):
                step = line["optimizer_step"]
                raise Difference(f"{name} of optimizer step {step}: {line.get(name)}, {other.get(name)}")
        if other.get("skipped_images_loaded"):
            raise Difference(f"{other['skipped_images_loaded']} images were loaded for positions already trained")
    return len(lines)


def compare_evaluations(whole: Run, interrupted: Run) -> int:
    """How many evaluations of held-out posts both runs have at one optimizer step."""
    sides = [{each.optimizer_step: each for each in read_evaluations(run)} for run in (whole, interrupted)]
    common = sides[0].keys() & sides[1].keys()
    for step in sorted(common):
        one, other = (side[step] for side in sides)
        if one.losses.tobytes() != other.losses.tobytes() or one.posts.tobytes() != other.posts.tobytes():
            raise Difference(f"held-out losses after optimizer step {step}: {one.loss}, {other.loss}")
    return len(common)


def find_parent(run: Run) -> Run | None:
    """The run beside it that a branch began from; None for a run that is none."""
    origin = run.lock.origin
    return Run(run.folder.with_name(origin.run)) if origin else None


def read_lines(run: Run) -> list[dict[str, Any]]:
    """The metrics that count, of a branch with those of its parent up to its beginning."""
    parent = find_parent(run)
    earlier = read_lines(parent) if parent else []
    return [line for line in earlier if line["optimizer_step"] <= run.first_optimizer_step] + read_metrics(run)


def compare_names(whole: Run, interrupted: Run) -> list[str]:
    """What checkpoints are called after the run's name; the names of states must agree too.

    A run that was made longer keeps the network that it ended with before; a branch has none of before its beginning.
    """
    ends = {
        f"{STEP_ENDING.format(chapter.total_optimizer_steps)}.safetensors" for chapter in interrupted.lock.chapters[:-1]
    }
    for what, folder, pattern in (("states left", "states", "[!.]*"), ("checkpoints", "checkpoints", "*.safetensors")):
        names, others = (
            sorted(path.name.removeprefix(run.output_name) for path in (run.folder / folder).glob(pattern))
            for run in (whole, interrupted)
        )
        names = [name for name in names if step_of(name) > interrupted.first_optimizer_step]
        others = [name for name in others if name in names or name not in ends]
        if names != others:
            raise Difference(f"{what}: {', '.join(names)}; {', '.join(others)}")
    return names


def step_of(name: str) -> float:
    """The optimizer step in the name of a state or a checkpoint; beyond all for the last one."""
    found = STEP_IN_NAME.search(name)
    return int(found[1]) if found else math.inf


def compare_networks(one: Path, other: Path) -> int:
    """The number of tensors, when names, shapes, dtypes and every bit agree."""
    first, second = read_tensors(one), read_tensors(other)
    if first.keys() != second.keys():
        raise Difference(f"{other.name}: {len(first.keys() ^ second.keys())} tensors are in one network only")
    unlike = [name for name in first if first[name] != second[name]]
    if unlike:
        raise Difference(f"{other.name}: {len(unlike)} of {len(first)} tensors differ, the first {unlike[0]}")
    return len(first)


def read_tensors(path: Path) -> Mapping[str, tuple[str, tuple[int, ...], bytes]]:
    """Each tensor's dtype, shape and bytes, the same ones in whichever of the trainer's formats; numpy has no bf16."""
    if path.suffix != ".safetensors":
        import torch
        from safetensors.torch import save_file

        tensors: Mapping[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        with tempfile.TemporaryDirectory() as folder:
            same = Path(folder, "network.safetensors")
            save_file({name: each.detach().contiguous() for name, each in tensors.items()}, same)
            return read_tensors(same)
    header, data = read_header(path), path.read_bytes()
    start = header.data_start
    return {
        name: (spot.dtype, spot.shape, data[start + spot.begin : start + spot.end])
        for name, spot in header.tensors.items()
    }
