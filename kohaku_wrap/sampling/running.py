"""A sheet drawn by one process or several, each of which takes cells that are not drawn and that no other one has."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kohaku_wrap.errors import LACKS_MEMORY, KwrapError
from kohaku_wrap.files import Progress, take_lock, write_text
from kohaku_wrap.merging.hashes import FileHashes
from kohaku_wrap.processes import python_command, safe_environment
from kohaku_wrap.sampling.checkpoints import Model, files_of
from kohaku_wrap.sampling.expanding import KnownModel, PlacedCell
from kohaku_wrap.sampling.pictures import VAE, is_drawn
from kohaku_wrap.training.records.samples import SHEET_RECORD, read_sheet_record

WORKER = "kohaku_wrap.sampling.drawing.worker"
LOCKS = ".locks"
"""Below the pictures: a locked file for each cell that a process draws now."""

STOP_SECONDS = 10


class DrawingFailed(KwrapError):
    """A process that draws ended, and did not say why."""


@dataclass(frozen=True)
class DrawingJob:
    """What is drawn, and by whom."""

    cells: Sequence[PlacedCell]
    """All of the sheet."""

    models: Sequence[KnownModel]
    """Those that its cells are drawn with."""

    hashes: Mapping[Path, FileHashes]
    """Of the models' files."""

    tokenizers: tuple[Path, Path]
    """Both folders."""

    out: Path
    """Where the pictures go."""

    processes: int = 1
    """How many draw at once."""

    offload: bool = False
    """Whether parts of the model are on the device only while they are used."""

    def compose(self, cells: Sequence[PlacedCell], index: int) -> dict[str, Any]:
        """The job of one process as JSON."""
        places = {known.model: number for number, known in enumerate(self.models)}
        return {
            "out": str(self.out),
            "index": index,
            "offload": self.offload,
            "tokenizers": [str(folder) for folder in self.tokenizers],
            "models": [self.describe(known) for known in self.models],
            "cells": [[places[each.model], each.cell.describe()] for each in cells],
        }

    def describe(self, known: KnownModel) -> dict[str, Any]:
        """One model as JSON."""
        model = known.model
        weights = [("", ""), *(("", each.weight) for each in model.networks), (VAE, "")]
        return {
            "path": str(model.path),
            "networks": [[str(each.path), each.weight] for each in model.networks],
            "vae": str(model.vae) if model.vae else None,
            "files": [
                {"name": path.name, "sha256": self.hashes[path].sha256, "data_sha256": self.hashes[path].data_sha256,
                 "weight": weight, "part": part}
                for path, (part, weight) in zip(files_of(model), weights, strict=False)
            ],
            "optimizer_step": model.optimizer_step,
            "prediction_from": known.prediction.source,
        }  # fmt: skip


def find_waiting(job: DrawingJob) -> list[PlacedCell]:
    """The cells whose whole picture is not there yet."""
    return [each for each in job.cells if not is_drawn(job.out / each.cell.name, each.cell)]


def draw_sheet(job: DrawingJob, waiting: Sequence[PlacedCell], on_progress: Progress) -> None:
    """Draw the cells that wait; `on_progress` is told cells.

    Raises what ended a process: KwrapError, OSError, MemoryError; the other processes are stopped then.
    """
    record_sheet(job)
    if not waiting:
        return
    answers: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    running = [
        Process(job.compose(waiting, index), index, answers) for index in range(min(job.processes, len(waiting)))
    ]
    drawn: set[str] = set()
    on_progress(0, len(waiting))
    try:
        left = len(running)
        while left:
            index, answer = answers.get()
            if answer is None:
                running[index].check_end()
                left -= 1
            elif "drawn" in answer:
                drawn.add(answer["drawn"])
                on_progress(len(drawn), len(waiting))
            else:
                raise_answer(answer)
    finally:
        for process in running:
            process.stop()
    clear_leavings(job.out)


def clear_leavings(out: Path) -> None:
    """Remove what killed processes left: locks that nobody holds, and records that were half written."""
    for path in (out / LOCKS).glob("*.lock"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if take_lock(descriptor, path):
                    path.unlink()
            finally:
                os.close(descriptor)
    with suppress(OSError):
        (out / LOCKS).rmdir()
    for part in (*out.glob(f".{SHEET_RECORD}.*.part"), *out.glob(".contact-sheet.png.*.part")):
        number = part.name.split(".")[-2]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            part.unlink(missing_ok=True)


class Process:
    """One process that draws."""

    def __init__(self, document: dict[str, Any], index: int, answers: queue.Queue[Any]) -> None:
        # Threads that wait for each other in a loop take the processor from the other processes.
        settings = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_WAIT_POLICY": "PASSIVE"}
        self.child = subprocess.Popen(
            python_command("-m", "kohaku_wrap.processes", os.getpid(), WORKER),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=safe_environment(settings), start_new_session=True,
        )  # fmt: skip
        self.errors: list[str] = []
        self.readers = [
            threading.Thread(target=self.send, args=(json.dumps(document),), daemon=True),
            threading.Thread(target=self.read, args=(index, answers), daemon=True),
            threading.Thread(target=self.read_errors, daemon=True),
        ]
        for reader in self.readers:
            reader.start()

    def send(self, text: str) -> None:
        assert self.child.stdin
        try:
            with self.child.stdin as stream:
                stream.write(text)
        except OSError:
            return  # it has ended, and its end says why

    def read(self, index: int, answers: queue.Queue[Any]) -> None:
        """Hand on each answer, and None at the end."""
        assert self.child.stdout
        for line in self.child.stdout:
            answers.put((index, json.loads(line)))
        answers.put((index, None))

    def read_errors(self) -> None:
        assert self.child.stderr
        for line in self.child.stderr:
            self.errors = [*self.errors[-40:], line]

    def check_end(self) -> None:
        """Raise MemoryError or DrawingFailed where the process ended without its work."""
        code = self.child.wait()
        self.readers[-1].join(STOP_SECONDS)
        if code == 0:
            return
        said = "".join(self.errors)
        if LACKS_MEMORY.search(said) or code == -9:
            raise MemoryError
        last = said.strip().splitlines()[-1:] or [f"it ended with code {code}"]
        raise DrawingFailed(f"a process that draws failed: {last[0]}", "What was drawn is kept; run it again to go on.")

    def stop(self) -> None:
        """End the process where it still runs."""
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()


def raise_answer(answer: Mapping[str, Any]) -> None:
    """Raise what a process said of its end."""
    if told := answer.get("os_error"):
        raise OSError(told["errno"], told["strerror"], told["filename"] or None)
    raise KwrapError(answer["error"]["message"], answer["error"]["next_step"])


def record_sheet(job: DrawingJob) -> None:
    """Write where the files lie, and each picture's place; what an earlier sheet of the folder wrote is kept."""
    path = job.out / SHEET_RECORD
    held = read_sheet_record(job.out)
    files = {**held.get("files", {}), **{hashes.sha256: str(file.absolute()) for file, hashes in job.hashes.items()}}
    digest = job.cells[0].cell.tokenizers
    tokenizers = {**held.get("tokenizers", {}), digest: [str(folder.absolute()) for folder in job.tokenizers]}
    pictures = {**held.get("pictures", {}), **{each.cell.name: dict(each.labels) for each in job.cells}}
    document = {"format": 1, "files": files, "tokenizers": tokenizers, "pictures": pictures}
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    job.out.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def list_models(cells: Sequence[PlacedCell], models: Sequence[KnownModel]) -> list[Model]:
    """The models that cells are drawn with, in order."""
    used = {each.model for each in cells}
    return [known.model for known in models if known.model in used]
