"""The Python packages that sd-scripts imports: which are there, and the missing ones beside its checkout."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import place_folder
from kohaku_wrap.locks import making_folder
from kohaku_wrap.processes import python_command, safe_environment
from kohaku_wrap.trainer.commits import trainer_folder


class InstallFailed(KwrapError):
    """git or pip could not do its part."""


class MissingRequirements(KwrapError):
    """Packages that the trainer imports are not there."""

    def __init__(self, missing: Sequence[Requirement]) -> None:
        super().__init__(
            f"sd-scripts lacks {', '.join(f'{each.distribution} {each.version}' for each in missing)}",
            "Install what is missing, for the trainer alone: kwrap trainer install --requirements-only",
        )


@dataclass(frozen=True)
class Requirement:
    """A package that the trainer imports."""

    module: str
    """The name it is imported by."""

    distribution: str
    """The name it is installed by."""

    version: str
    """The tested version."""

    @property
    def pinned(self) -> str:
        """For pip: `name==version`."""
        return f"{self.distribution}=={self.version}"


TORCH = Requirement("torch", "torch", "2.13.0")

REQUIREMENTS = (
    Requirement("accelerate", "accelerate", "1.15.0"),
    Requirement("transformers", "transformers", "4.57.6"),
    Requirement("diffusers", "diffusers", "0.36.0"),
    Requirement("huggingface_hub", "huggingface-hub", "0.36.2"),
    Requirement("lycoris", "lycoris-lora", "4.1.3"),
    Requirement("bitsandbytes", "bitsandbytes", "0.50.2"),
    Requirement("safetensors", "safetensors", "0.8.0"),
    Requirement("einops", "einops", "0.8.2"),
    Requirement("toml", "toml", "0.10.2"),
    Requirement("voluptuous", "voluptuous", "0.16.0"),
    # The trainer asks for 1.4.1, which takes a pixel off both sides of WebP with a profile. Later ones turn the size of
    # an image that has a tag, where the trainer does not turn its pixels: extract and import leave no such tag.
    Requirement("imagesize", "imagesize", "2.0.1"),
    Requirement("ftfy", "ftfy", "6.3.1"),
    Requirement("cv2", "opencv-python-headless", "5.0.0.93"),
    Requirement("rich", "rich", "15.0.0"),
    Requirement("schedulefree", "schedulefree", "1.4.1"),
    Requirement("lion_pytorch", "lion-pytorch", "0.2.5"),
)
"""What sd-scripts needs besides torch and torchvision, which goes with the torch that is there."""

TESTED = {each.distribution: each for each in (TORCH, *REQUIREMENTS)}
"""The one place of versions; a test holds setup.cfg, constraints.txt, the Makefile and all texts to it."""

SETS: Mapping[str, Mapping[str, str]] = {
    "": {},
    "transformers-5": {"transformers": "5.5.4", "diffusers": "0.42.1", "huggingface-hub": "1.33.0"},
}
"""Sets of versions that were proved, by the name that `make setup SET=` takes: in what each differs from TESTED."""

STRICT = frozenset(
    {"accelerate", "transformers", "diffusers", "huggingface-hub", "lycoris-lora", "bitsandbytes", "imagesize"}
)
"""Packages where another version is told: these decide whether the trainer runs, and its last bits."""


@dataclass(frozen=True)
class RequirementState:
    """Whether one package is there, and in which version."""

    requirement: Requirement
    """What was looked for."""

    found: str
    """The version found; empty when missing."""

    folder: Path | None
    """Where it lies outside the environment; None when it is in the environment, or missing."""

    @property
    def is_missing(self) -> bool:
        return not self.found

    @property
    def is_untested(self) -> bool:
        name = self.requirement.distribution
        return bool(self.found) and name in STRICT and self.found != self.requirement.version


def torchvision_requirement() -> Requirement:
    """The torchvision that was built for the torch that is there: 0.28.0 for 2.13.0."""
    built = (re.match(r"2\.(\d+)\.(\d+)", version) for version in (installed_version(TORCH), TORCH.version))
    minor, patch = next(release.groups() for release in built if release)
    return Requirement("torchvision", "torchvision", f"0.{int(minor) + 15}.{patch}")


def packages_folder(requirement: Requirement) -> Path:
    """Where a package lies that only the trainer's process sees."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return trainer_folder() / ".packages" / f"{requirement.distribution}-{requirement.version}-{python}"


def find_set() -> str:
    """The name of the set of versions that is installed: the one with this release line of transformers."""
    line = installed_version(TESTED["transformers"]).split(".")[0]
    return next((name for name, own in SETS.items() if own.get("transformers", "").split(".")[0] == line), "")


def packages_of(set_name: str) -> dict[str, Requirement]:
    """The tested packages of a set, by distribution."""
    own = SETS[set_name]
    return {name: replace(each, version=own.get(name, each.version)) for name, each in TESTED.items()}


def check_requirements() -> list[RequirementState]:
    """Every package that the trainer imports, without importing any."""
    states = []
    tested = packages_of(find_set())
    for requirement in (*(tested[each.distribution] for each in REQUIREMENTS), torchvision_requirement()):
        folder = packages_folder(requirement)
        if importlib.util.find_spec(requirement.module) is not None:
            states.append(RequirementState(requirement, installed_version(requirement), None))
        elif folder.is_dir():
            states.append(RequirementState(requirement, requirement.version, folder))
        else:
            states.append(RequirementState(requirement, "", None))
    return states


def require_requirements() -> None:
    """Raises MissingRequirements with every package that the trainer would not find."""
    missing = [state.requirement for state in check_requirements() if state.is_missing]
    if missing:
        raise MissingRequirements(missing)


def installed_version(requirement: Requirement) -> str:
    return find_version(requirement.distribution) or "of unknown version"


def requirement_paths() -> list[Path]:
    """The folders that the trainer's process adds to its import path."""
    return [state.folder for state in check_requirements() if state.folder is not None]


def install_requirements(on_note: Callable[[str], None] = lambda note: None) -> list[Requirement]:
    """Install what is missing in the tested versions and return it; nothing in the environment changes.

    Each package goes without its dependencies into its own folder under `$KWRAP_HOME`, which only the trainer's
    process adds to its path: torch cannot be replaced, and a torchvision built for CUDA cannot break diffusers and
    transformers elsewhere. Raises InstallFailed.
    """
    missing = [state.requirement for state in check_requirements() if state.is_missing]
    for requirement in missing:
        on_note(f"Installing {requirement.distribution} {requirement.version}")
        install_package(requirement)
    return missing


def install_package(requirement: Requirement) -> None:
    final, pinned = packages_folder(requirement), requirement.pinned
    with making_folder(final.parent, ".part-") as part:
        command = python_command("-m", "pip", "install", "--quiet", "--no-deps", "--target", part / "packages", pinned)
        result = subprocess.run(
            command, env=safe_environment(), capture_output=True, text=True, errors="replace", check=False
        )
        if result.returncode:
            words = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
            raise InstallFailed(
                f"pip could not install {pinned}: {words[-1]}",
                f"Install it yourself (pip install --no-deps {pinned}), then: kwrap trainer show",
            )
        place_folder(part / "packages", final)


def find_version(package: str) -> str:
    """The installed version without its build; empty where the package is missing."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package).split("+")[0]
    return ""
