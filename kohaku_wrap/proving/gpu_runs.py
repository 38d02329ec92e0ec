"""The runs of `make gpu`: their scale, their site, and how each is trained, with kwrap and by plain sd-scripts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.site import load_site
from kohaku_wrap.files import read_json
from kohaku_wrap.formats.sdxl import SDXL_SIZES
from kohaku_wrap.formats.untrained import write_untrained
from kohaku_wrap.processes import accelerate_command, ask_python
from kohaku_wrap.proving.killing import PLAIN_WORKER, Kill, ProcessFailed, run_logged, train_with_kills
from kohaku_wrap.proving.prove import Bench, write_site_of
from kohaku_wrap.proving.step_clock import StepClock
from kohaku_wrap.streams import seed_of
from kohaku_wrap.training.records.attempts import ATTEMPT_FILE
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.supervising.processes import list_processes


@dataclass(frozen=True)
class Scale:
    """What is trained."""

    name: str
    """full or tiny."""

    template: str
    """Its recipe."""

    steps: int
    """Optimizer steps of each run."""

    batch_per_gpu: int
    """Images of a micro-batch."""

    accumulation: int
    """Micro-batches of a step on one process."""

    settings: tuple[str, ...]
    """Over the template."""

    kill: Kill
    """When the killed runs are killed."""


SMALL_PICTURES = ("resolution=[64, 64]", "min_bucket_reso=32", "max_bucket_reso=128")
EQUAL_BATCHES = (
    "dataset_options.bucket_no_upscale=false",
    "dataset_options.num_repeats=4",
    "dataset_options.min_bucket_reso=1024",
    "dataset_options.max_bucket_reso=1024",
)
"""Every batch is full and of one shape, so that all steps of two runs cost the same in any order.

The first step of each shape takes twice as long on a GPU, as kernels are chosen for it.
"""

SCALES = {
    "full": Scale("full", "epsilon", 16, 4, 1, EQUAL_BATCHES, Kill(0.6)),
    "tiny": Scale("tiny", "demo", 6, 2, 1, tuple(f"dataset_options.{each}" for each in SMALL_PICTURES), Kill(0.5)),
}


WORKERS = 2
"""Loader workers of a process; the runs end in the middle of an epoch, with batches made ahead."""


@dataclass(frozen=True)
class Workplace:
    """One call's folder, machine and scale."""

    folder: Path
    """Where everything is made; the world and the large model in it are kept for the next call."""

    engine: str
    """builtin or sd-scripts."""

    scale: Scale
    """What is trained."""

    gpus: int
    """GPUs that torch sees."""

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.folder, self.engine)

    @property
    def logs(self) -> Path:
        return self.folder / "logs" / self.engine

    def make_inputs(self, *, keep_runs: bool) -> None:
        """The embedded world, and at full scale the large model."""
        self.bench.make_world()
        if not keep_runs:
            shutil.rmtree(self.bench.runs, ignore_errors=True)
        if self.scale.name == "full":
            write_random_sdxl(self.base_model)

    @property
    def base_model(self) -> Path:
        return (self.folder if self.scale.name == "full" else self.bench.world) / "base" / "model.safetensors"

    def write_site(self, processes: int = 1) -> Path:
        """The machine for runs of so many processes."""
        paths = {"base_model": self.base_model, "runs": self.bench.runs}
        machine = {"engine": self.engine, "gpus": min(self.gpus, processes), "batch_per_gpu": self.scale.batch_per_gpu}
        path = self.folder / "sites" / f"{self.engine}-{processes}.toml"
        return write_site_of(self.bench.world, path, paths, machine | {"workers": WORKERS})

    def settings(self, processes: int = 1) -> tuple[str, ...]:
        """Over the template, for runs of so many processes."""
        batch = processes * self.scale.accumulation * self.scale.batch_per_gpu
        steps = self.scale.steps
        saving = (f"save_every_n_steps={steps // 2}", "save_precision=float", "states.keep=2")
        length = (f"max_train_steps={steps}", "lr_warmup_steps=2")
        return (f"effective_batch={batch}", *length, *saving, *self.scale.settings)

    def arguments(self, name: str, processes: int = 1) -> tuple[str, ...]:
        """What follows `kwrap` to train a run."""
        settings = (part for setting in self.settings(processes) for part in ("--set", setting))
        site = str(self.write_site(processes))
        return ("train", self.scale.template, "--site", site, "--run", name, *settings)

    def effective(self) -> Effective:
        """The recipe as the runs train it."""
        return resolve_template(self.scale.template, load_site(self.write_site()), self.settings())

    def train(
        self,
        name: str,
        kills: tuple[Kill, ...] = (),
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> Run:
        """A run to its end, through kills, with `environment` added to the caller's."""
        run = Run(self.bench.runs / name)
        shutil.rmtree(run.folder, ignore_errors=True)
        train_with_kills(run, self.arguments(name, processes), kills, (WORKERS,), self.logs, environment)
        return run

    def forget(self, run: Run) -> None:
        """Remove the gigabytes of a run that was compared; its records stay."""
        for folder in (run.checkpoints, run.states):
            shutil.rmtree(folder, ignore_errors=True)

    def clock(self, run: Run, log: Path) -> StepClock:
        return StepClock(log, lambda: list_processes(run), on_gpu=self.gpus > 0)

    def train_timed(self, name: str) -> tuple[Run, StepClock]:
        """A run, its steps and its memory watched."""
        run = Run(self.bench.runs / name)
        with self.clock(run, run.folder / "attempts" / "1" / "rank-000.log") as clock:
            self.train(name)
        return run, clock

    def train_plain(self, like: Run, name: str) -> StepClock:
        """Plain sd-scripts by the very files of a run. Raises ProcessFailed."""
        folder = self.folder / "plain" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [
            *accelerate_command(),
            # The run's own file for accelerate, too: the person's default one may ask for anything.
            *("launch", "--config_file", str(like.accelerate_config), "--num_processes", "1", "-m", PLAIN_WORKER),
            *("--config_file", str(like.trainer_config), "--dataset_config", str(like.dataset_config)),
            *("--gradient_accumulation_steps", str(self.scale.accumulation), "--output_dir", str(folder / "out")),
        ]
        kernels = {name: value for name, value in environment_of(like).items() if name.startswith(("LYCORIS", "OMP"))}
        hidden = {} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}
        log = folder / "log"
        with self.clock(like, log) as clock:
            variables = {**kernels, **hidden, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            exit_code = run_logged(command, log, variables, like.folder)
        if exit_code:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise ProcessFailed(f"plain sd-scripts ended with exit code {exit_code}: {''.join(last)}", f"See {log}.")
        shutil.rmtree(folder / "out")
        return clock


def environment_of(run: Run) -> dict[str, str]:
    """What the first attempt of a run was started with."""
    environment: dict[str, str] = read_json(run.attempts / "1" / ATTEMPT_FILE)["environment"]
    return environment


SHAPES_WORKER = "kohaku_wrap.planning.workers.list_sgm_tensors"


def write_random_sdxl(path: Path, sizes: Any = SDXL_SIZES) -> None:
    """Write the fp16 checkpoint, 6.9 GB in SDXL's sizes, a tensor at a time; what is there is kept.

    Raises NoAnswer where the shapes cannot be had (torch, diffusers or transformers are missing).
    """
    if path.is_file():
        return
    shapes: dict[str, list[int]] = ask_python(SHAPES_WORKER, request=sizes)
    write_untrained(path, shapes, {"format": "pt", "modelspec.title": "random weights of full size"}, draw)


def draw(name: str, count: int) -> npt.NDArray[np.float32]:
    """The draws of a tensor: the same on every machine with this numpy."""
    return np.random.default_rng(seed_of("random sdxl", name)).random(count, dtype=np.float32)
