"""How several machines train together: `[machine] accelerate` of a site, checked against accelerate's own parser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from kohaku_wrap.errors import Problem
from kohaku_wrap.files import kept_answer
from kohaku_wrap.processes import NoAnswer
from kohaku_wrap.trainer.installed import ask_reader, find_version
from kohaku_wrap.trainer.options import Option, UnfitValue, cached_table_file, check_value, suggest

OWN = {
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
    try:
        return kept_answer(
            kept,
            lambda table: {**table, "options": {**table["options"]}},
            lambda: ask_reader("list_launch_options", "launch"),
        )
    except NoAnswer:
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
        if name in OWN:
            yield name, OWN[name]
        elif name in launcher["others"]:
            yield (
                name,
                f"is kwrap's to decide; there are {', '.join(each for each in options if each not in OWN)}",
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
    if machines < 1:
        yield "num_machines", f"{machines} is below 1"
    if machines > 1 and not table.get("main_process_ip"):
        yield "main_process_ip", "is not set: the address of machine 0, as the other machines reach it"
    if machines > 1 and table.get("main_process_port") == 0:
        yield "main_process_port", "0 is a free port of machine 0 that the others would not know: write one, 29500"
