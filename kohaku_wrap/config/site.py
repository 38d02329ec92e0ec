"""What is true of one machine: its paths, its GPUs, and the trainer options that only it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kohaku_wrap.config.code_names import MODULE
from kohaku_wrap.config.machines import check_accelerate
from kohaku_wrap.config.schema import SECRET_OPTIONS
from kohaku_wrap.config.templates import read_toml
from kohaku_wrap.errors import Problem, ProblemsFound, UsageError
from kohaku_wrap.files import expand_user
from kohaku_wrap.trainer.options import suggest

ENGINES = ("sd-scripts", "builtin")

PATH_DEFAULTS = {
    "db": "danbooru.db",
    "tars": "tars",
    "images": "images",
    "base_model": "base/model.safetensors",
    "runs": "runs",
}
"""Where each thing lies, relative to the site file, when the file does not say."""

PATH_NAMES = (*PATH_DEFAULTS, "vae", "tokenizers")

MACHINE_TYPES: dict[str, type] = {
    "engine": str,
    "gpus": int,
    "processes": int,
    "batch_per_gpu": int,
    "workers": int,
    "accelerate": dict,
}
SMALLEST = {"gpus": 0, "processes": 1, "batch_per_gpu": 1, "workers": 0}


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

    accelerate: Mapping[str, Any] = field(default_factory=dict)
    """Options of `accelerate launch` that say how several machines find each other."""

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
        raise MissingSite(f"{path}: no such site file", "`kwrap demo DIR` writes one to look at and to copy.")
    document = read_toml(file)
    problems = [
        Problem(name, f"unknown table{suggest(name, TABLES)}; there are {', '.join(TABLES)}")
        for name in document
        if name not in (*TABLES, "trust")
    ]
    trust, trust_problems = read_trust(document.get("trust", []))
    tables: dict[str, dict[str, Any]] = {}
    for name in TABLES:
        table = document.get(name, {})
        if not isinstance(table, dict):
            problems.append(Problem(name, f"must be a table: [{name}]"))
            table = {}
        tables[name] = table
    paths, path_problems = resolve_paths(tables["paths"], file.parent)
    machine, machine_problems = read_machine(tables["machine"])
    problems += path_problems + machine_problems + trust_problems + check_secrets(tables["secrets"])
    if problems:
        raise ProblemsFound(
            str(path), problems, "Mend these keys; `kwrap demo DIR` writes a site.toml to compare with."
        )
    return Site(file, paths, machine, tables["trainer"], trust, tables["secrets"])


TABLES = ("paths", "machine", "trainer", "secrets")


def read_trust(value: Any) -> tuple[tuple[str, ...], list[Problem]]:
    """The site's `trust`, and its faults."""
    if not isinstance(value, list) or not all(isinstance(module, str) for module in value):
        return (), [Problem("trust", 'must be a list of Python modules: trust = ["my_optimizers"]')]
    faults = [
        Problem("trust", f"{module!r} is not the name of a Python module")
        for module in value
        if not MODULE.fullmatch(module)
    ]
    return tuple(value), faults


def check_secrets(table: Mapping[str, Any]) -> list[Problem]:
    """Faults of `[secrets]`; no message holds a value."""
    faults = []
    for name, value in table.items():
        where = f"secrets.{name}"
        if name not in SECRET_OPTIONS:
            what = f"unknown key{suggest(name, SECRET_OPTIONS)}; there are {', '.join(SECRET_OPTIONS)}"
            faults.append(Problem(where, what))
        elif not isinstance(value, SECRET_OPTIONS[name]):
            faults.append(Problem(where, "must be true or false" if SECRET_OPTIONS[name] is bool else "must be text"))
    return faults


def resolve_paths(table: dict[str, Any], folder: Path) -> tuple[SitePaths, list[Problem]]:
    """`[paths]` as absolute paths, and its faults."""
    problems: list[Problem] = []
    values = {name: folder / default for name, default in PATH_DEFAULTS.items()}
    for name, value in table.items():
        if name not in PATH_NAMES:
            problems.append(Problem(f"paths.{name}", f"unknown key{suggest(name, PATH_NAMES)}"))
        elif not isinstance(value, str) or not value:
            problems.append(Problem(f"paths.{name}", "must be a path in quotes"))
        else:
            try:
                values[name] = folder / expand_user(value)
            except UsageError as fault:
                problems.append(Problem(f"paths.{name}", fault.message))
    paths = SitePaths(
        db=values["db"],
        tars=values["tars"],
        images=values["images"],
        base_model=values["base_model"],
        vae=values.get("vae"),
        tokenizers=values.get("tokenizers"),
        runs=values["runs"],
    )
    return paths, problems


def read_machine(table: dict[str, Any]) -> tuple[Machine, list[Problem]]:
    """`[machine]`, and its faults."""
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    for name, value in table.items():
        where = f"machine.{name}"
        if name not in MACHINE_TYPES:
            problems.append(Problem(where, f"unknown key{suggest(name, MACHINE_TYPES)}"))
        elif MACHINE_TYPES[name] is int and (not isinstance(value, int) or isinstance(value, bool)):
            problems.append(Problem(where, f"{value!r} is not a whole number"))
        elif name == "accelerate" and not isinstance(value, dict):
            problems.append(Problem(where, "must be a table: accelerate = { num_machines = 2, … }"))
        elif name == "accelerate" and (faults := check_accelerate(value)):
            problems += faults
        elif MACHINE_TYPES[name] is int and value < SMALLEST[name]:
            problems.append(Problem(where, f"{value} is below {SMALLEST[name]}"))
        elif name == "engine" and value not in ENGINES:
            problems.append(
                Problem(where, f"{value!r} is not one of {', '.join(ENGINES)}{suggest(str(value), ENGINES)}")
            )
        else:
            values[name] = value
    values.setdefault("processes", max(values.get("gpus", 1), 1))
    values["processes"] *= int(values.get("accelerate", {}).get("num_machines", 1))
    return Machine(**values), problems
