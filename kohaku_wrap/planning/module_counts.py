"""LoKr modules and parameters of a template, counted once per preset and kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.config.effective import Effective, Faults
from kohaku_wrap.config.trainer_arguments import render_network_args
from kohaku_wrap.errors import KwrapError, refusing
from kohaku_wrap.files import home_folder, kept_answer
from kohaku_wrap.processes import NoAnswer, ask_python
from kohaku_wrap.trainer.installed import find_trainer, list_versions, read_trainer_commit

WORKER_TIMEOUT_SECONDS = 600
WORKER_SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""Variables of a worker that only looks: one thread, no hub."""

COUNTED_BY = ("lycoris_lora", "lycoris-lora", "diffusers", "transformers", "torch")


class NotCounted(KwrapError):
    """The modules could not be counted here."""


@dataclass(frozen=True)
class ModuleCounts:
    """What a preset makes of a base model."""

    counted_on: str
    """`diffusers` or `sd-scripts`: whose UNet was looked at."""

    unet_modules: int
    """LyCORIS modules of the UNet."""

    text_encoder_modules: int
    """LyCORIS modules of both text encoders."""

    unet_parameters: int
    """Trained numbers of the UNet's modules."""

    text_encoder_parameters: int
    """Trained numbers of the text encoders' modules."""

    module_kinds: dict[str, int]
    """Modules by LyCORIS class."""

    tensors: int
    """Tensors in the network's file."""

    unmatched: tuple[str, ...]
    """`key: pattern` of the preset that fits no module."""

    base_unet_parameters: int
    """Numbers of the base model's UNet."""

    base_text_encoder_parameters: int
    """Numbers of both text encoders."""

    base_vae_parameters: int
    """Numbers of the VAE."""

    @property
    def parameters(self) -> int:
        """Trained numbers in all."""
        return self.unet_parameters + self.text_encoder_parameters


def count_network(effective: Effective, checkout: Path | None = None) -> ModuleCounts:
    """Count a template's network on the meta device, in a process of its own, or read the kept count.

    `checkout`: count on this sd-scripts' own UNet instead of diffusers'. Raises NotCounted.
    """
    request = describe_request(effective, checkout)
    kept = home_folder() / "counts" / f"{digest_request(request, checkout)}.json"
    return kept_answer(
        kept,
        lambda counted: ModuleCounts(**{**counted, "unmatched": tuple(counted["unmatched"])}),
        lambda: ask_worker(request),
    )


def describe_request(effective: Effective, checkout: Path | None) -> dict[str, Any]:
    """What the worker needs to know."""
    base_model = effective.site.paths.base_model if effective.site else None
    has_sizes = base_model is not None and base_model.with_name("config.json").is_file()
    return {
        "preset": dict(effective.preset),
        "network_args": render_network_args(effective.subtable("network_args")),
        "network_dim": effective.get("network_dim", 4),
        "network_alpha": effective.get("network_alpha", 1),
        "base_model": str(base_model) if has_sizes else None,
        "checkout": str(checkout) if checkout else None,
    }


def digest_request(request: dict[str, Any], checkout: Path | None) -> str:
    """A key of everything that the counts depend on."""
    versions = {name: version for name, version in list_versions().items() if name in COUNTED_BY}
    parts: dict[str, Any] = {**request, "versions": versions, "form": 2}
    if request["base_model"]:
        parts["base_model"] = Path(request["base_model"]).with_name("config.json").read_text(encoding="utf-8")
    if checkout:
        parts["checkout"] = read_trainer_commit(checkout)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def ask_worker(request: dict[str, Any]) -> dict[str, Any]:
    """The worker's answer. Raises NotCounted."""
    advice = "Run `kwrap doctor`; counting needs the packages of kohaku-wrap[train]."
    with refusing(NotCounted, "the network's modules could not be counted:", advice, NoAnswer):
        document: dict[str, Any] = ask_python(
            "kohaku_wrap.planning.workers.count_modules",
            request=request,
            added=WORKER_SETTINGS,
            timeout_seconds=WORKER_TIMEOUT_SECONDS,
        )
    return document


def count_network_everywhere(effective: Effective) -> list[ModuleCounts]:
    """The count on diffusers' UNet, and on the installed trainer's where the base model is a full SDXL."""
    counts = [count_network(effective)]
    checkout = find_trainer()
    if checkout and describe_request(effective, None)["base_model"] is None:
        counts.append(count_network(effective, checkout))
    return counts


def find_unmatched(counts: ModuleCounts) -> Faults:
    """Patterns of the preset that fit nothing in the base model."""
    for each in counts.unmatched:
        key, _, pattern = each.partition(": ")
        yield f"preset.{key}", f"{pattern!r} matches no module of the base model; LyCORIS would go on without it"
    if not counts.unet_modules + counts.text_encoder_modules:
        yield "preset", "makes no module at all"
