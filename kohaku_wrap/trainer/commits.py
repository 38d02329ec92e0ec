"""The commits of sd-scripts that kwrap knows how to correct or that were proved here, and where they are installed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kohaku_wrap.files import home_folder, parse_json, read_regular, write_text


@dataclass(frozen=True)
class SupportedCommit:
    """A commit whose loop kwrap knows how to correct."""

    name: str
    """The tag, or the short hash where there is none."""

    commit: str
    """The full hash."""

    digest: str
    """Of its scripts, library and networks, so that a changed file is seen, and a checkout without git is known."""

    joins_by_separator: bool = False
    """Whether shuffled tags are joined by caption_separator and a space, where others join by a comma and a space."""

    support: str = "supported"
    """How it is known: `supported` by kwrap itself, or what was proved on this machine, and when."""


SUPPORTED = (
    SupportedCommit(
        "v0.11.1",
        "6721028c79ee85a78b3a06dfd8954dae310a1cce",
        "ea99741d29b99ad531d07ebb35e2936b7e9858c45b4c6fa75146ed5b05298862",
    ),
    SupportedCommit(
        "c162e90",
        "c162e9039cc3228057b3fc6ae64ce770b87ab9bf",
        "7585a164e893b38d0a821742c5fee8663ceaf3dfefa1ba0f610768765b1546f4",
        joins_by_separator=True,
    ),
    SupportedCommit(
        "v0.10.6",
        "6e14642f3bc756cd947803eac0e7c9be4acdf964",
        "66b445ce4260c1a640bc9ff245e044da1c37ca952d9e5b3bb5c77d2895281b1b",
    ),
    SupportedCommit(
        "v0.10.1",
        "ae72efb92babe89ff8e70f057e42db68440e8d61",
        "738ec7136b7811d01f5e98cb8f2c5e4a50a6ed0a2c8945f807972a0351220f49",
    ),
    SupportedCommit(
        "v0.10.0",
        "966e9d7f6bb4058abbddb815dd40462b35ffb1d2",
        "cb9d13d497fc7274b0b83e7d6845fc5ddcb062200e30fe55406c4b537fb4ff94",
    ),
    SupportedCommit(
        "48d368f",
        "48d368fa557731ad0488c07304dfeba8c07910eb",
        "13150aedfbb0a76f03b741543770bea98cee2996ca300a1832bc8faa021929f8",
    ),
)
"""The default first."""

SUPPORTED_TEXT = ", ".join(f"{each.name} ({each.commit[:10]})" for each in SUPPORTED)


TRIAL_VARIABLE = "KWRAP_TRAINER_PROOF"
"""The environment variable by which a proof lets its own trainings take the checkout that it tries."""

SCRIPT = "sdxl_train_network.py"
"""What a training of an SDXL network runs."""

TRAINING_SCRIPTS = (SCRIPT, "train_network.py")
IMPORTED_FOLDERS = ("library", "networks")
"""All that a training of an SDXL network can import of a checkout, packages in them too."""


def digest_sources(checkout: Path) -> str:
    """One digest over the training scripts, the library and the networks; line ends do not count."""
    digest = hashlib.sha256()
    paths = [path for folder in IMPORTED_FOLDERS for path in checkout.glob(f"{folder}/**/*.py")]
    paths += [checkout / script for script in TRAINING_SCRIPTS]
    for name, path in sorted((path.relative_to(checkout).as_posix(), path) for path in paths if path.is_file()):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def find_known(checkout: Path) -> SupportedCommit | None:
    """The supported or proved commit whose very files these are."""
    digest = digest_sources(checkout)
    return next((known for known in list_known() if known.digest == digest), None)


def list_known() -> Iterator[SupportedCommit]:
    """The supported commits, those proved on this machine, and the one that a proof is trying now."""
    yield from SUPPORTED
    paths = sorted((home_folder() / "proofs").glob("*.json"))
    for path in [*paths, *map(Path, filter(None, [os.environ.get(TRIAL_VARIABLE)]))]:
        with suppress(OSError, ValueError, TypeError, KeyError):  # of no proof of this kwrap nothing is known
            document = parse_json(read_regular(path))
            yield SupportedCommit(**{field.name: document[field.name] for field in fields(SupportedCommit)})


def write_proof(proved: SupportedCommit, about: Mapping[str, Any], path: Path | None = None) -> Path:
    """Keep what was proved of a checkout, with `about` beside it; under `$KWRAP_HOME` by its digest, else at `path`."""
    path = path or home_folder() / "proofs" / f"{proved.digest}.json"
    write_text(path, json.dumps({"format": 1, **asdict(proved), **about}, indent=1))
    return path


def trainer_folder() -> Path:
    """Where checkouts and the trainer's own packages lie, each checkout in a folder named by its commit."""
    return home_folder() / "trainer"


def installed_checkouts(first: str = "") -> list[Path]:
    """The folders of the installed checkouts: that of the commit `first`, then the default's."""
    commits = dict.fromkeys(known.commit for known in sorted(list_known(), key=lambda known: known.commit != first))
    return [folder for folder in map(trainer_folder().joinpath, commits) if is_checkout(folder)]


def is_checkout(folder: Path) -> bool:
    """Whether the trainer's script lies there."""
    return (folder / SCRIPT).is_file()
