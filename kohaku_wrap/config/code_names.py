"""Values of a template that name Python code: known ones, trusted ones, and all others, which are refused.

sd-scripts imports an optimizer, a schedule, a network module or a dataset class by its dotted name and calls it with
the template's arguments: `pydoc.pipepager` as a schedule runs a shell command.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import UsageError
from kohaku_wrap.wording import suggest

KNOWN_CODE = Path(__file__).with_name("known_code.toml")

RECORDED_SIGNATURES = Path(__file__).with_name("options_optimizers.json")
"""Written by `planning/workers/list_optimizers.py` with the pinned packages."""

KINDS: Mapping[str, str] = {
    "optimizer_type": "optimizer",
    "lr_scheduler_type": "schedule",
    "network_module": "network module",
    "dataset_class": "dataset class",
}
"""sd-scripts' options that name code, and what each names."""

HOMES: Mapping[str, str] = {"optimizer_type": "torch.optim", "lr_scheduler_type": "torch.optim.lr_scheduler"}
"""The module in which sd-scripts looks a name without a dot up."""

MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@cache
def load_signatures() -> dict[str, dict[str, Any]]:
    """The recorded optimizers by lower-case name; `name` is the trainer's spelling."""
    document = json.loads(RECORDED_SIGNATURES.read_text(encoding="utf-8"))
    return {name.lower(): {"name": name, **entry} for name, entry in document.items()}


@cache
def known_code() -> Mapping[str, Mapping[str, str]]:
    """By option: what one may write, and the dotted name behind it."""
    document = tomllib.loads(KNOWN_CODE.read_text(encoding="utf-8"))
    known: dict[str, dict[str, str]] = {"network_module": {name: name for name in document["networks"]}}
    for option, table in (("optimizer_type", "optimizers"), ("lr_scheduler_type", "schedules")):
        listed = {f"{module}.{name}" for module, names in document[table].items() for name in names}
        home = HOMES[option]
        short = {name.removeprefix(f"{home}."): name for name in listed if name.startswith(f"{home}.")}
        known[option] = {**{name: name for name in sorted(listed)}, **short}
    return known


def find_known(option: str, name: str) -> str:
    """The dotted name that the list of known code has for a value of `option`; empty where it has none."""
    if option == "optimizer_type" and (entry := load_signatures().get(name.lower())):
        return str(entry["class"])
    return known_code().get(option, {}).get(name, "")


def is_trusted(name: str, trust: Iterable[str]) -> bool:
    """Whether a dotted name is one of the trusted modules, or lies in one."""
    return MODULE.fullmatch(name) is not None and any(f"{name}.".startswith(f"{module}.") for module in trust)


def find_unknown(values: Mapping[str, Any], trust: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each option whose value names code that is neither known nor trusted, and what is wrong with it."""
    for option, kind in KINDS.items():
        value = values.get(option)
        if not value or find_known(option, str(value)) or is_trusted(str(value), trust):
            continue
        yield option, f'"{value}" is an unknown {kind}{advise(option, str(value))}'


def advise(option: str, name: str) -> str:
    """What was probably meant, or how to run code of one's own."""
    names = [entry["name"] for entry in load_signatures().values()] if option == "optimizer_type" else []
    names += known_code().get(option, {})
    module = name if option == "network_module" else name.rpartition(".")[0]
    if not MODULE.fullmatch(module):
        return suggest(name, [known for known in names if "." not in known]) or "; see docs/trust.md for the known ones"
    near = suggest(name, names) if module.partition(".")[0] in {known.partition(".")[0] for known in names} else ""
    if module.partition(".")[0] in sys.stdlib_module_names:
        return ": its code is not run"
    return f"{near or '.'} Its code is not run; if you know who wrote it and want it: --trust {module}"


def list_trusted(values: Mapping[str, Any], trust: Sequence[str]) -> list[tuple[str, str, str]]:
    """What runs only as it is trusted: the option, its value and the module of `trust` that lets it."""
    return [
        (option, str(values[option]), next(module for module in trust if is_trusted(str(values[option]), [module])))
        for option in KINDS
        if values.get(option) and not find_known(option, str(values[option])) and is_trusted(str(values[option]), trust)
    ]


def check_trust(modules: Iterable[str]) -> tuple[str, ...]:
    """The modules of `--trust`, each once. Raises UsageError for what is no module's name."""
    for module in modules:
        if not MODULE.fullmatch(module):
            raise UsageError(
                f"--trust {module}: not the name of a Python module", "Write for example --trust my_optimizers."
            )
    return tuple(dict.fromkeys(modules))
