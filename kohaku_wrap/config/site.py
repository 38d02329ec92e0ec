"""What is true of one machine: its paths, its GPUs, and the trainer options that only it needs.

How several machines train together, `[machine] accelerate`, is checked against accelerate's own parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kohaku_wrap.config.code_names import MODULE
from kohaku_wrap.config.schema import SECRET_OPTIONS
from kohaku_wrap.errors import Problem, ProblemsFound, UsageError
from kohaku_wrap.files import describe_absence, expand_user, kept_answer
from kohaku_wrap.processes import NoAnswer
from kohaku_wrap.toml_files import TableReader, load_toml
from kohaku_wrap.trainer.engines import ENGINES
from kohaku_wrap.trainer.installed import ask_reader
from kohaku_wrap.trainer.options import Option, UnfitValue, cached_table_file, check_value
from kohaku_wrap.trainer.requirements import find_version
from kohaku_wrap.wording import suggest

PATH_DEFAULTS = {
    "db": "danbooru.db",
    "tars": "tars",
    "images": "images",
    "base_model": "base/model.safetensors",
    "runs": "runs",
}
"""Where each thing lies, relative to the site file, when the file does not say."""

PATH_NAMES = (*PATH_DEFAULTS, "vae", "tokenizers", "latents")

SMALLEST = {"gpus": 0, "processes": 1, "batch_per_gpu": 1, "workers": 0}
"""Whole numbers of `[machine]`, each with the smallest that there can be."""


AFTER = "after"
"""As `sample_device`: pictures are drawn when an attempt has ended."""

SAMPLE_DEVICE = re.compile(r"cpu|after|cuda:[0-9]{1,3}")
MACHINE_KEYS = (*SMALLEST, "engine", "sample_device", "accelerate")


EXAMPLE = """\
[paths]
images = "images"                              # what kwrap import or extract wrote
base_model = "/models/sdxl-base.safetensors"
tokenizers = "/models/tokenizers"              # of both CLIP text encoders
runs = "runs"

[machine]
engine = "sd-scripts"
gpus = 1
batch_per_gpu = 2
workers = 4
"""
"""A site for one GPU, as docs/guide.md has it."""


class MissingSite(UsageError):
    """The site file is not there."""


@dataclass(frozen=True)
class SitePaths:
    """Absolute paths; that they exist is checked by the step that needs them."""

    db: Path
    """The metadata database."""

    tars: Path
    """The folder of image tars."""

    images: Path
    """Where extract and caption write."""

    base_model: Path
    """The single-file SDXL that training starts from."""

    vae: Path | None
    """A VAE in place of the base model's own."""

    tokenizers: Path | None
    """The folder of both CLIP tokenizers; None: the hub's cache."""

    runs: Path
    """Where runs are kept."""

    latents: Path
    """Where latents are cached; beside the images where the file does not say."""


@dataclass(frozen=True)
class Machine:
    """What the machine has and should give."""

    engine: str = "sd-scripts"
    """The trainer: sd-scripts or builtin."""

    gpus: int = 1
    """GPUs of each machine to train on; 0 trains on the CPU."""

    processes: int = 1
    """Training processes of all machines together: one a GPU, unless the file says otherwise."""

    batch_per_gpu: int = 1
    """Images in one micro-batch of one process."""

    workers: int | None = None
    """Loader workers per process; None: as the template says."""

    sample_device: str = ""
    """Where kwrap draws pictures while it trains: cuda:N, cpu, or `after` for when the attempt ends; empty: cpu where
    the training has no GPU, else `after`."""

    accelerate: Mapping[str, Any] = field(default_factory=dict)
    """Options of `accelerate launch` that say how several machines find each other."""

    @property
    def draws_on(self) -> str:
        """Where kwrap draws pictures while it trains, as `sample_device` has it."""
        return self.sample_device or (AFTER if self.gpus else "cpu")

    @property
    def draws_where_it_trains(self) -> bool:
        """Whether pictures take memory on a GPU while that one trains."""
        kind, _, index = self.sample_device.partition(":")
        return kind == "cuda" and int(index) < self.gpus

    @property
    def machines(self) -> int:
        """Machines that train together."""
        return int(self.accelerate.get("num_machines", 1))

    @property
    def processes_here(self) -> int:
        """Training processes of one machine."""
        return self.processes // self.machines


@dataclass(frozen=True)
class Site:
    """One site.toml."""

    path: Path
    """The file, absolute."""

    paths: SitePaths
    """`[paths]`, resolved against the file's folder."""

    machine: Machine
    """`[machine]`."""

    trainer: Mapping[str, Any] = field(default_factory=dict)
    """`[trainer]`: sd-scripts options that win over the template's."""

    trust: tuple[str, ...] = ()
    """`trust`: Python modules whose code a template may name."""

    secrets: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """`[secrets]`: tokens and uploads, handed to the trainer alone; in no file of a run."""


def load_site(path: Path | str) -> Site:
    """Read and check a site file. Raises ProblemsFound with every fault of it."""
    file = expand_user(path).absolute()
    if not file.is_file():
        raise MissingSite(
            f"{path}: {describe_absence(file, 'site file')}",
            f"It says what is true of your machine. Write one:\n\n{EXAMPLE}\n"
            "docs/guide.md says how to get what it names. Then run the same command again.",
        )
    document = load_toml(file)
    problems: list[Problem] = []
    top = TableReader("", document, (*TABLES, "trust"), problems)
    paths = resolve_paths(TableReader("paths", top.table("paths"), PATH_NAMES, problems), file.parent)
    machine = read_machine(TableReader("machine", top.table("machine"), MACHINE_KEYS, problems))
    trust = read_trust(document.get("trust", []), problems)
    secrets = top.table("secrets")
    check_secrets(TableReader("secrets", secrets, tuple(SECRET_OPTIONS), problems))
    trainer = top.table("trainer")
    if problems:
        raise ProblemsFound(str(path), problems, "Fix these keys; `kwrap demo DIR` writes a site.toml to compare with.")
    return Site(file, paths, machine, trainer, trust, secrets)


TABLES = ("paths", "machine", "trainer", "secrets")


def read_trust(value: Any, problems: list[Problem]) -> tuple[str, ...]:
    """The site's `trust`; faults go to `problems`."""
    if not isinstance(value, list) or not all(isinstance(module, str) for module in value):
        problems.append(Problem("trust", 'must be a list of Python modules: trust = ["my_optimizers"]'))
        return ()
    problems += [
        Problem("trust", f"{module!r} is not the name of a Python module")
        for module in value
        if not MODULE.fullmatch(module)
    ]
    return tuple(value)


def check_secrets(reader: TableReader) -> None:
    """Note the faults of `[secrets]`; no message holds a value."""
    for name, kind in SECRET_OPTIONS.items():
        value = reader.table_values.get(name, kind())
        if not isinstance(value, kind):
            reader.fault(name, "must be true or false" if kind is bool else "must be text")
        elif name == "log_tracker_config" and str(value).startswith("~"):
            try:
                expand_user(str(value))
            except UsageError:
                reader.fault(name, "begins with no user of this machine; write ./~name for a folder of that name")


def resolve_paths(reader: TableReader, folder: Path) -> SitePaths:
    """`[paths]` as absolute paths."""
    values: dict[str, Any] = {"vae": None, "tokenizers": None}
    values |= {name: folder / default for name, default in PATH_DEFAULTS.items()}
    for name in [name for name in PATH_NAMES if name in reader.table_values]:
        value = reader.table_values[name]
        if not isinstance(value, str) or not value:
            reader.fault(name, "must be a path in quotes")
            continue
        try:
            values[name] = folder / expand_user(value)
        except UsageError as fault:
            reader.fault(name, fault.message)
    values.setdefault("latents", values["images"].with_name(f"{values['images'].name}-latents"))
    return SitePaths(**values)


def find_path(value: Any, folder: Path) -> Any:
    """A path below `folder` unless it is absolute or begins with `~`; what is no path, a `data:` URL too, as it is."""
    if not isinstance(value, str) or not value or value.startswith("data:"):
        return value
    try:
        return str(folder / expand_user(value))
    except UsageError as fault:
        raise UnfitValue(fault.message) from fault


OWN_OPTIONS = {
    "machine_rank": "differs from machine to machine: `kwrap train` is 0, `kwrap resume RUN --machine-rank K` is K",
    "max_restarts": "torchrun would start anew without a state: `--restarts N` of `kwrap train` and `kwrap resume`",
    "rdzv_backend": "stays static: rank 0, which writes the records, belongs to machine 0",
    "gpu_ids": "set CUDA_VISIBLE_DEVICES on the machine",
    "num_processes": "follows from gpus and num_machines",
    "mixed_precision": "is the template's",
}
"""Options of accelerate that kwrap gives itself, and where to say them instead."""


@cache
def ask_launcher() -> Mapping[str, Any]:
    """What `list_launch_options` prints, asked once per version; empty where accelerate cannot be asked."""
    version = find_version("accelerate")
    if not version:
        return {}
    kept = cached_table_file(f"accelerate-{version}")
    with suppress(NoAnswer):
        return kept_answer(
            kept,
            lambda table: {**table, "options": {**table["options"]}},
            lambda: ask_reader("list_launch_options", "launch"),
        )
    return {}


def check_accelerate(table: Mapping[str, Any]) -> list[Problem]:
    """Every fault of `[machine] accelerate`.

    Names and types are left to `kwrap train` where accelerate is not installed; it needs accelerate itself.
    """
    launcher = ask_launcher()
    faults = [*find_misfits(table, launcher)] if launcher else []
    if not faults:
        faults = [*find_contradictions(table)]
    return [Problem(f"machine.accelerate.{name}", what) for name, what in faults]


def find_misfits(table: Mapping[str, Any], launcher: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names that accelerate does not take, and values that do not fit."""
    options = launcher["options"]
    for name, value in table.items():
        if name in OWN_OPTIONS:
            yield name, OWN_OPTIONS[name]
        elif name in launcher["others"]:
            yield (
                name,
                f"is kwrap's to decide; there are {', '.join(each for each in options if each not in OWN_OPTIONS)}",
            )
        elif name not in options:
            yield name, f"`accelerate launch` takes no such option{suggest(name, options)}"
        else:
            entry = options[name]
            choices = tuple(entry["choices"]) if "choices" in entry else None
            try:
                check_value(Option(name, (entry["type"],), choices=choices), value)
            except UnfitValue as unfit:
                yield name, unfit.message


def find_contradictions(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What machines could not find each other with."""
    machines = table.get("num_machines", 1)
    if not isinstance(machines, int) or machines < 1:
        yield "num_machines", f"{machines!r} is not a whole number from 1"
        return
    if machines > 1 and not table.get("main_process_ip"):
        yield "main_process_ip", "is not set: the address of machine 0, as the other machines reach it"
    if machines > 1 and table.get("main_process_port") == 0:
        yield "main_process_port", "0 is a free port of machine 0 that the others would not know: write one, 29500"


def read_machine(reader: TableReader) -> Machine:
    """`[machine]`, with what it leaves open."""
    given = {name: reader.integer(name, least) for name, least in SMALLEST.items()}
    numbers = {name: value for name, value in given.items() if value is not None}
    accelerate = reader.table("accelerate")
    if faults := check_accelerate(accelerate) if accelerate else []:
        reader.problems += faults
        accelerate = {}
    processes = numbers.pop("processes", max(numbers.get("gpus", 1), 1)) * int(accelerate.get("num_machines", 1))
    engine = reader.choice("engine", tuple(ENGINES))
    device = reader.text("sample_device")
    if device and not SAMPLE_DEVICE.fullmatch(device):
        reader.fault("sample_device", f'{device!r} is none of "cpu", "after" and a GPU such as "cuda:1"')
    return Machine(engine=engine, processes=processes, sample_device=device, accelerate=accelerate, **numbers)
