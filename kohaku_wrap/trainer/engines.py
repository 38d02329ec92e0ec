"""The engines by name: what is known of each before a process of it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from kohaku_wrap.errors import MissingExtra, UsageError
from kohaku_wrap.trainer.requirements import require_requirements, requirement_paths

NEEDED_PACKAGES = ("torch", "accelerate", "transformers", "diffusers", "lycoris", "bitsandbytes", "safetensors")
"""What every engine imports."""


@dataclass(frozen=True)
class EngineFacts:
    """One engine."""

    worker: str
    """The module that accelerate starts in a run's folder."""

    has_checkout: bool
    """Whether it is a checkout of sd-scripts, with packages of its own."""

    def package_folders(self) -> Sequence[Path]:
        """Where packages lie that only its process sees."""
        return requirement_paths() if self.has_checkout else ()

    def require_packages(self) -> None:
        """Raise MissingExtra or MissingRequirements where its process would fail at an import."""
        if any(find_spec(name) is None for name in NEEDED_PACKAGES):
            raise MissingExtra("training", "train")
        if self.has_checkout:
            require_requirements()


ENGINES: Mapping[str, EngineFacts] = {
    "sd-scripts": EngineFacts("kohaku_wrap.training.engines.sd_scripts.worker", has_checkout=True),
    "builtin": EngineFacts("kohaku_wrap.training.engines.builtin.worker", has_checkout=False),
}
"""The first is the default."""


def find_engine(name: str) -> EngineFacts:
    """The engine of that name. Raises UsageError."""
    if name not in ENGINES:
        raise UsageError(f"{name}: no such engine", f"Engines: {', '.join(ENGINES)}.")
    return ENGINES[name]
