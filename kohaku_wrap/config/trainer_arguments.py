"""Tables of a template as the trainer takes them: lists of `key=value` strings, a prompt file, accelerate's file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

BRACKETS = re.compile(r"(?<!\\)([()\[\]])")
MACHINES_IN_FILE = ("num_machines", "main_process_ip", "main_process_port")
"""Options of `accelerate launch` for several machines that its file takes too."""

WEIGHTED = re.compile(r"^\((?P<words>.+):(?P<weight>\d+(?:\.\d+)?)\)$")


def render_literals(table: Mapping[str, Any]) -> list[str]:
    """`optimizer_args` and `lr_scheduler_args`: values as Python literals, which the trainer evaluates."""
    return [f"{key}={render_literal(value)}" for key, value in table.items()]


def render_literal(value: Any) -> str:
    """A Python literal without spaces; a list becomes a bare tuple, as in betas=0.9,0.95."""
    if isinstance(value, (list, tuple)):
        return ",".join(render_literal(item) for item in value) + ("," if len(value) == 1 else "")
    return repr(value)


def render_network_args(table: Mapping[str, Any]) -> list[str]:
    """`network_args`: every value as text, which LyCORIS converts itself.

    `decompose_both` is left out when false: LyCORIS takes any text for it, "False" too, as true.
    """
    return [
        f"{key}={value}"
        for key, value in table.items()
        if not (key == "decompose_both" and str(value).lower() == "false")
    ]


def escape_tags(prompt: str) -> str:
    """Plain tags, separated by commas, as the front ends read them: one line, brackets of a tag escaped, weights kept.

    `hatsune miku (cosplay), (azuuru:1.1)` becomes `hatsune miku \\(cosplay\\), (azuuru:1.1)`.
    """
    return ", ".join(escape_tag(" ".join(tag.split())) for tag in prompt.split(",") if tag.strip())


def escape_tag(tag: str) -> str:
    """One tag with its brackets escaped, unless they are a weight's."""
    if weighted := WEIGHTED.match(tag):
        return f"({escape_tag(weighted['words'])}:{weighted['weight']})"
    return BRACKETS.sub(r"\\\1", tag)


def render_prompts(samples: Mapping[str, Any]) -> str:
    """sd-scripts' prompt file: one line a prompt, with its size, steps, guidance and seed.

    A line that begins with # it takes for a comment, and there are such tags.
    """
    negative = escape_tags(samples.get("negative") or "")
    lines = []
    for index, prompt in enumerate(samples.get("prompts") or ()):
        parts = [escape_tags(prompt)]
        if negative:
            parts.append(f"--n {negative}")
        parts.append(f"--w {samples['width']} --h {samples['height']}")
        parts.append(f"--s {samples['steps']} --l {samples['guidance']:g} --d {samples['seed'] + index}")
        lines.append(" " * parts[0].startswith("#") + " ".join(parts))
    return "\n".join(lines) + "\n"


def render_yaml(table: Mapping[str, Any]) -> str:
    """A flat YAML mapping; JSON's scalars are YAML's."""
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in table.items())


def describe_accelerate(
    processes: int, gpus: int, mixed_precision: str, machines: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """accelerate's own file for a run, so that a person's default file cannot leak in.

    `machines`: how several find each other. GPUs are those that the caller's CUDA_VISIBLE_DEVICES leaves.
    """
    distributed = "NO" if processes == 1 else "MULTI_GPU" if gpus else "MULTI_CPU"
    table: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": distributed,
        "downcast_bf16": "no",
        "enable_cpu_affinity": False,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": mixed_precision,
        "num_machines": 1,
        "num_processes": processes,
        "rdzv_backend": "static",
        "same_network": True,
        "tpu_use_cluster": False,
        "tpu_use_sudo": False,
        "use_cpu": gpus == 0,
    }
    if gpus:
        table["gpu_ids"] = "all"
    table |= {name: value for name, value in (machines or {}).items() if name in MACHINES_IN_FILE}
    return table


def section_of(name: str, sections: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    """The section of trainer.toml that an option is put under, for the eye alone."""
    for section, starts in sections:
        if name.startswith(starts):
            return section
    return "training"
