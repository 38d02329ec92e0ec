"""The commits of sd-scripts that kwrap knows how to correct, and where checkouts of them are installed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.files import home_folder


@dataclass(frozen=True)
class SupportedCommit:
    """A commit whose loop kwrap knows how to correct."""

    name: str
    """The tag, or the short hash where there is none."""

    commit: str
    """The full hash."""

    digest: str
    """Of its scripts and library, so that a changed file is seen, and a checkout without git is known."""


SUPPORTED = (
    SupportedCommit(
        "v0.10.1",
        "ae72efb92babe89ff8e70f057e42db68440e8d61",
        "ef7a3291a0c7c464e3178e00176b74b45ff2660799db6cfb527bcbf1ee3a13d0",
    ),
    SupportedCommit(
        "v0.10.0",
        "966e9d7f6bb4058abbddb815dd40462b35ffb1d2",
        "6b1957d73a57b059441fe1edd9f83c568201b828236d84c891accc24768174c0",
    ),
    SupportedCommit(
        "48d368f",
        "48d368fa557731ad0488c07304dfeba8c07910eb",
        "135dd5368cb7851215d7a8b72a661179968b218ee4647c92330847267a6bc7f7",
    ),
)
"""The default first."""

SUPPORTED_TEXT = ", ".join(f"{each.name} ({each.commit[:10]})" for each in SUPPORTED)


def digest_sources(checkout: Path) -> str:
    """One digest over the scripts and the library; line ends do not count."""
    digest = hashlib.sha256()
    paths = [*checkout.glob("library/*.py"), checkout / "sdxl_train_network.py", checkout / "train_network.py"]
    for name, path in sorted((path.relative_to(checkout).as_posix(), path) for path in paths if path.is_file()):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def find_known(checkout: Path) -> SupportedCommit | None:
    """The supported commit whose very files these are."""
    digest = digest_sources(checkout)
    return next((known for known in SUPPORTED if known.digest == digest), None)


def trainer_folder() -> Path:
    """Where checkouts and the trainer's own packages lie, each checkout in a folder named by its commit."""
    return home_folder() / "trainer"


def installed_checkouts(first: str = "") -> list[Path]:
    """The folders of the installed checkouts: that of the commit `first`, then the default's."""
    folders = [trainer_folder() / known.commit for known in sorted(SUPPORTED, key=lambda known: known.commit != first)]
    return [folder for folder in folders if (folder / "sdxl_train_network.py").is_file()]
