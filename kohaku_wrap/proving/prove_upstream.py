"""What plain sd-scripts does with the demo's training when it is resumed its own way: the reason for kwrap.

Each case trains to the end, then again from a state in the middle with `--resume` and `--skip_until_initial_step`,
and compares the final networks. Every process is sd-scripts' own script; only the model's sizes are the demo's.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from kohaku_wrap.config.layers import resolve_template
from kohaku_wrap.config.render import compose_run
from kohaku_wrap.config.run_files import DATASET_FILE, TRAINER_FILE
from kohaku_wrap.config.site import load_site
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import shipped_folder
from kohaku_wrap.formats.caption_rows import read_folder_sizes
from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.planning.step_plan import plan_steps
from kohaku_wrap.processes import python_command
from kohaku_wrap.proving.killing import ON_THE_CPU, PLAIN_WORKER, run_kwrap, run_logged
from kohaku_wrap.trainer.installed import find_trainer
from kohaku_wrap.training.records.networks import STEP_ENDING

RUN_TIMEOUT_SECONDS = 900
FLIPPED_BYTE_FROM_END = 1000


class TrainerNotInstalled(KwrapError):
    """There is no sd-scripts checkout to show anything with."""


class PlainRunFailed(KwrapError):
    """Plain sd-scripts ended with an error."""


@dataclass(frozen=True)
class Shape:
    """A way to train the demo."""

    accumulation: int = 1
    """Micro-batches in an optimizer step."""

    epochs: int = 1
    """Times that all images are trained."""

    processes: int = 1
    """Ranks, on the CPU."""

    workers: int = 0
    """Loader workers of each rank."""

    state_every: int = 4
    """Optimizer steps between states."""


@dataclass(frozen=True)
class Outcome:
    """One case."""

    name: str
    """What was done."""

    is_identical: bool
    """Whether the final networks are equal to the bit."""

    remark: str
    """What else was seen."""

    def line(self) -> str:
        """As `make prove-upstream` prints it."""
        word = "identical" if self.is_identical else "DIFFERENT"
        return f"{word}  {self.name}" + (f": {self.remark}" if self.remark else "")


@dataclass
class PlainRuns:
    """A demo world with its images, and the plain runs made in it."""

    site: Path
    """The world's `site.toml`; its images and captions are there."""

    folder: Path
    """Where the runs go."""

    count: int = field(default=0, init=False)
    """Runs made so far."""

    def options(self, shape: Shape) -> tuple[dict[str, Any], str]:
        """The demo template's options for plain sd-scripts, and its dataset file's text."""
        site = load_site(self.site)
        effective = resolve_template("demo", site, ["kwrap.data=sd-scripts"])
        rendered = compose_run(
            effective,
            site,
            self.folder / "rendered",
            "plain",
            plan_steps(effective, read_folder_sizes(site.paths.images)),
        ).write()
        options = {
            **rendered.trainer,
            "gradient_accumulation_steps": shape.accumulation,
            "max_train_epochs": shape.epochs,
            "max_data_loader_n_workers": shape.workers,
            "persistent_data_loader_workers": shape.workers > 0,
            "save_every_n_steps": shape.state_every,
            "save_state": True,
            "lr_warmup_steps": 2,
        }
        return options, (self.folder / "rendered" / DATASET_FILE).read_text(encoding="utf-8")

    def train(self, shape: Shape, resume: Path | None = None) -> Path:
        """One run of plain sd-scripts; its output folder. Raises PlainRunFailed."""
        self.count += 1
        folder = self.folder / f"run-{self.count}"
        folder.mkdir(parents=True)
        options, dataset = self.options(shape)
        options |= {"output_dir": str(folder / "out"), "output_name": "plain"}
        if resume is not None:
            options |= {"resume": str(resume), "skip_until_initial_step": True}
        (folder / TRAINER_FILE).write_text(toml_text({"all": options}), encoding="utf-8")
        (folder / DATASET_FILE).write_text(dataset, encoding="utf-8")
        several = ("--multi_gpu", "--main_process_port", "0") if shape.processes > 1 else ()
        command = [
            *python_command("-m", "accelerate.commands.accelerate_cli", "launch", *several),
            *("--num_processes", str(shape.processes), "--num_machines", "1", "--mixed_precision", "no"),
            *("--dynamo_backend", "no", "-m", PLAIN_WORKER),
            *("--config_file", TRAINER_FILE, "--dataset_config", DATASET_FILE),
        ]
        if exit_code := run_logged(command, folder / "log", ON_THE_CPU, folder, RUN_TIMEOUT_SECONDS):
            raise PlainRunFailed(f"plain sd-scripts ended with exit code {exit_code}", f"Its log: {folder / 'log'}")
        return folder / "out"


def compare_networks(first: Path, second: Path) -> tuple[bool, str]:
    """Whether two output folders hold the same final network, and how many values differ."""
    left, right = read_network(first / "plain.safetensors"), read_network(second / "plain.safetensors")
    differing = sum(int(np.count_nonzero(left[name] != right[name])) for name in left if name in right)
    total = sum(values.size for values in left.values())
    if left.keys() == right.keys() and not differing:
        return True, ""
    return False, f"{100 * differing / max(total, 1):.0f} % of the weights differ"


def read_network(path: Path) -> Mapping[str, Any]:
    from safetensors.numpy import load_file

    arrays: Mapping[str, Any] = load_file(str(path))
    return arrays


def state_of(output: Path, step: int) -> Path:
    """Where plain sd-scripts keeps the state of a step."""
    return output / f"plain{STEP_ENDING.format(step)}-state"


def damage_state(state: Path) -> None:
    """Flip one byte of the network in a state, as a disk might."""
    path = state / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-FLIPPED_BYTE_FROM_END] ^= 0x40
    path.write_bytes(content)


def is_unchanged(state: Path, output: Path) -> bool:
    """Whether a resumed run ended with the very weights that it began with."""
    network = read_network(output / "plain.safetensors")
    kept = read_network(state / "model.safetensors")
    return all(np.array_equal(kept[name].astype(values.dtype), values) for name, values in network.items())


def iterate_cases(runs: PlainRuns) -> Iterator[Outcome]:
    """Train and compare the cases of proofs/upstream.toml, one after another; equal shapes share the whole run."""
    wholes: dict[Shape, Path] = {}

    def whole_run(shape: Shape) -> Path:
        if shape not in wholes:
            wholes[shape] = runs.train(shape)
        return wholes[shape]

    names = {option.name for option in fields(Shape)}
    document = tomllib.loads((shipped_folder("proofs") / "upstream.toml").read_text(encoding="utf-8"))
    for case in document["case"]:
        shape = {name: value for name, value in case.items() if name in names}
        whole = whole_run(Shape(**{**shape, **case.get("as", {})}))
        if "resume" not in case:
            equal, remark = compare_networks(whole, runs.train(Shape(**shape)))
        elif case.get("damage"):
            damage_state(state_of(whole, case["resume"]))
            equal, remark = compare_networks(whole, runs.train(Shape(**shape), state_of(whole, case["resume"])))
            remark += ", loaded without a word" if remark else ""
        else:
            equal, remark = resume_and_compare(runs, Shape(**shape), whole, case["resume"])
        yield Outcome(case["says"], equal, remark)


def resume_and_compare(runs: PlainRuns, shape: Shape, whole: Path, step: int) -> tuple[bool, str]:
    """Resume the run's state of `step` in sd-scripts' own way; whether it ends as the whole run did."""
    state = state_of(whole, step)
    try:
        resumed = runs.train(shape, state)
    except PlainRunFailed as failed:
        return False, failed.message
    equal, remark = compare_networks(whole, resumed)
    if not equal and is_unchanged(state, resumed):
        remark += "; nothing was trained, exit code 0 (kohya-ss/sd-scripts#2407)"
    return equal, remark


def prove_upstream(world: Path, folder: Path) -> tuple[int, int]:
    """Print one line a case; the number of cases and of identical ones. Raises TrainerNotInstalled, PlainRunFailed.

    `world`: a demo world with its images extracted and captioned; `folder`: where the plain runs go, made anew.
    """
    if find_trainer() is None:
        raise TrainerNotInstalled("sd-scripts is not installed", "Get it with `kwrap trainer install`.")
    shutil.rmtree(folder, ignore_errors=True)
    site = world / "site.toml"
    write_captions_cache(world, folder)
    total = identical = 0
    for outcome in iterate_cases(PlainRuns(site, folder)):
        print(outcome.line(), flush=True)
        total += 1
        identical += outcome.is_identical
    return total, identical


def write_captions_cache(world: Path, folder: Path) -> None:
    """Have `metadata_cache.json` written, by which plain sd-scripts finds images in folders of folders."""
    paths = load_site(world / "site.toml").paths
    selection = world / "demo.parquet"
    arguments = ("caption", str(selection), "--db", str(paths.db), "--out", str(paths.images))
    run_kwrap((*arguments, "--dataset", "demo", "--format", "cache"), folder / "captions.log")
