"""A process that draws cells of a sheet until all are drawn: it takes a batch that no other process has, draws, writes.

Started as `python -m kohaku_wrap.processes PID kohaku_wrap.sampling.drawing.worker`, with the job as JSON on stdin. It
answers in lines of JSON: `drawn` with a file's name, or what failed. The job's form is that of `running.compose_job`.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import kohaku_wrap
from kohaku_wrap.errors import lacks_memory
from kohaku_wrap.locks import Claims
from kohaku_wrap.processes import answer_in_lines
from kohaku_wrap.sampling.cells import Cell, Compute, read_cell
from kohaku_wrap.sampling.checkpoints import Model
from kohaku_wrap.sampling.chunks import cut_chunks, read_tokenizer
from kohaku_wrap.sampling.drawing.drawing import Artist
from kohaku_wrap.sampling.drawing.models import choose_device, load_drawer
from kohaku_wrap.sampling.grammar import parse_prompt
from kohaku_wrap.sampling.pictures import ModelFile, Record, hash_pixels, is_drawn, write_picture

WAIT_SECONDS = 0.5
"""Between two looks at cells that other processes draw."""

VERSIONS = {
    "kwrap": kohaku_wrap.__version__,
    "torch": torch.__version__,
    "diffusers": diffusers.__version__,
    "transformers": transformers.__version__,
    "python": platform.python_version(),
}


class SheetWorker:
    """One process's share of a sheet."""

    def __init__(self, job: dict[str, Any], tell: Callable[..., None]) -> None:
        """`tell` writes one line of the answer."""
        self.tell = tell
        self.out = Path(job["out"])
        self.index, self.offload = int(job["index"]), bool(job["offload"])
        self.tokenizers = (read_tokenizer(Path(job["tokenizers"][0])), read_tokenizer(Path(job["tokenizers"][1])))
        self.models = [Model.of_files(each) for each in job["models"]]
        self.described = job["models"]
        self.cells: list[list[Cell]] = [[] for _ in self.models]
        for number, document in job["cells"]:
            self.cells[number].append(read_cell(document))
        self.claims = Claims(self.out)
        self.done: set[str] = set()
        self.artist: tuple[int, Artist] | None = None
        self.compute = next(cell.compute for cells in self.cells for cell in cells)
        self.device = choose_device(self.compute.device, self.index)

    def run(self) -> None:
        """Draw until every cell is drawn, by this process or by another; each begins with another model."""
        count = len(self.models)
        order = [(at + self.index) % count for at in range(count)]
        while waiting := [number for number in order if self.list_waiting(number)]:
            if not any(self.draw_model(number) for number in waiting):
                time.sleep(WAIT_SECONDS)

    def list_waiting(self, number: int) -> list[Cell]:
        """A model's cells that are not drawn yet."""
        waiting = []
        for cell in self.cells[number]:
            if cell.name not in self.done and is_drawn(self.out / cell.name, cell):
                self.done.add(cell.name)
            if cell.name not in self.done:
                waiting.append(cell)
        return waiting

    def draw_model(self, number: int) -> bool:
        """Draw what is free of a model's cells; whether anything was."""
        drew = False
        for cells in self.group_cells(self.list_waiting(number)):
            with self.claimed(cells) as own:
                if own:
                    self.draw(number, own)
                    drew = True
        return drew

    def group_cells(self, cells: Sequence[Cell]) -> Iterator[list[Cell]]:
        """Batches of cells that can be drawn together."""
        groups: dict[Any, list[Cell]] = {}
        for cell in cells:
            groups.setdefault((cell.group, *self.count_chunks(cell)), []).append(cell)
        size = self.compute.batch
        for group in groups.values():
            yield from (group[at : at + size] for at in range(0, len(group), size))

    def count_chunks(self, cell: Cell) -> tuple[int, ...]:
        """How many chunks its prompts have: rows of one batch have as many."""
        return tuple(
            max(len(cut_chunks(parse_prompt(text, cell.lenient), tokenizer)) for tokenizer in self.tokenizers)
            for text in (cell.prompt, cell.negative)
        )

    @contextmanager
    def claimed(self, cells: Sequence[Cell]) -> Iterator[list[Cell]]:
        """Those of the cells that no other process draws, and none has drawn meanwhile."""
        try:
            taken = [cell for cell in cells if self.claims.take(cell.name)]
            yield [cell for cell in taken if not is_drawn(self.out / cell.name, cell)]
        finally:
            self.claims.release()

    def draw(self, number: int, cells: list[Cell]) -> None:
        """Draw one batch and write its pictures."""
        try:
            pictures = self.load(number).draw(cells)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, torch.OutOfMemoryError) or lacks_memory(error):
                self.give_up(number, cells[0])
                return
            raise
        described = self.described[number]
        files = tuple(ModelFile(**each) for each in described["files"])
        for cell, picture in zip(cells, pictures, strict=True):
            record = Record(
                cell, files, VERSIONS, hash_pixels(picture), described["optimizer_step"], described["prediction_from"],
                name_device(self.device),
            )  # fmt: skip
            write_picture(self.out / cell.name, picture, record)
            self.done.add(cell.name)
            self.tell(drawn=cell.name)

    def give_up(self, number: int, cell: Cell) -> None:
        """Leave to other processes what memory ran out at: a cell, and those of the model that need as much."""
        alike = [each.name for each in self.list_waiting(number) if each.group == cell.group]
        self.done.update(alike)
        self.artist = None
        batch = f"a batch of {cell.compute.batch} at {cell.width}x{cell.height} in {cell.compute.dtype}"
        self.tell(too_large=alike, what=f"too little memory on {self.device} for {batch}")

    def load(self, number: int) -> Artist:
        """The model, loaded where it is not the last one used."""
        if self.artist is None or self.artist[0] != number:
            self.artist = None
            drawer = load_drawer(self.models[number], self.compute)
            self.artist = number, Artist(drawer, self.tokenizers, self.device, self.offload)
        return self.artist[1]


def name_device(device: torch.device) -> str:
    """The processor by name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def pin(compute: Compute) -> None:
    """Let torch compute the same bits every time."""
    torch.set_num_threads(compute.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def draw(job: dict[str, Any], tell: Callable[..., None]) -> None:
    """Do a job."""
    worker = SheetWorker(job, tell)
    pin(worker.compute)
    worker.run()


if __name__ == "__main__":
    sys.exit(answer_in_lines(draw))
