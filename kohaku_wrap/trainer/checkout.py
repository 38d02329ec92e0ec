"""The sd-scripts checkout that kwrap trains with: where it is, whether it is one that kwrap knows, how to get it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.errors import KwrapError, UsageError
from kohaku_wrap.files import expand_user, place_folder
from kohaku_wrap.locks import making_folder
from kohaku_wrap.trainer.cloning import clone_commit
from kohaku_wrap.trainer.commits import (
    SCRIPT,
    SUPPORTED,
    SUPPORTED_TEXT,
    SupportedCommit,
    find_known,
    installed_checkouts,
    is_checkout,
    list_known,
    trainer_folder,
)
from kohaku_wrap.trainer.corrections import AnchorMatch, match_anchors, require_anchors
from kohaku_wrap.trainer.git import run_git
from kohaku_wrap.trainer.installed import CHECKOUT_VARIABLE, find_trainer, read_trainer_commit
from kohaku_wrap.trainer.requirements import (
    TESTED,
    InstallFailed,
    RequirementState,
    check_requirements,
    installed_version,
    packages_of,
)

INSTALLED = "kwrap trainer install"
"""What chose a checkout that kwrap installed itself."""

DEFAULT_SOURCE = "https://github.com/kohya-ss/sd-scripts"


class TrainerMissing(KwrapError):
    """There is no sd-scripts checkout to train with."""


class UnsupportedTrainer(KwrapError):
    """The checkout is not at a supported commit, or its files were changed."""


class ImpossiblePair(KwrapError):
    """The checkout cannot be imported with the packages that are installed."""


GONE = ("CLIPFeatureExtractor",)
"""What transformers 5 no longer has, of what releases of sd-scripts import."""

IMPORTED = re.compile(r"^from transformers import +(\([^)]*\)|.*)$", re.MULTILINE)
FIRST_WITHOUT_TEXT_MODEL = (5, 6)
"""The release of transformers in which the weights of text encoders got other names: no supported commit knows them."""


@dataclass(frozen=True)
class Checkout:
    """One sd-scripts checkout on this machine."""

    path: Path
    """Its folder, absolute."""

    commit: str
    """The full hash; empty where neither git nor the files tell."""

    name: str
    """The tag or short hash of a supported commit, else the commit's first characters or `unknown`."""

    is_supported: bool
    """Whether it is at a supported commit, or one proved here, with its files as they were."""

    is_changed: bool
    """Whether git names a supported commit and the files are not that commit's."""

    support: str
    """How kwrap knows it: `supported`, what was proved on this machine, `files were changed` or `not supported`."""

    chosen_by: str
    """`KWRAP_SD_SCRIPTS` or `kwrap trainer install`."""


@dataclass(frozen=True)
class TrainerReport:
    """All that `kwrap trainer show` says."""

    checkout: Checkout
    """The one that a training would use."""

    anchors: tuple[AnchorMatch, ...]
    """Every place that kwrap relies on."""

    requirements: tuple[RequirementState, ...]
    """Every package that the trainer imports."""

    installed: tuple[Checkout, ...]
    """All checkouts under `$KWRAP_HOME`."""

    @property
    def is_ready(self) -> bool:
        """Whether a training could start."""
        anchors_stand = all(match.count == 1 for match in self.anchors)
        return self.checkout.is_supported and anchors_stand and not any(each.is_missing for each in self.requirements)


def inspect_checkout(path: Path, chosen_by: str) -> Checkout:
    """What the folder is. Raises TrainerMissing when it is no sd-scripts at all."""
    path = expand_user(path).resolve()
    if not is_checkout(path):
        raise TrainerMissing(f"{path}: no sd-scripts checkout ({SCRIPT} is not there)", install_advice(chosen_by))
    if known := find_known(path):
        return Checkout(path, known.commit, known.name, True, False, known.support, chosen_by)
    commit = read_trainer_commit(path)
    known_commit = next((known for known in SUPPORTED if known.commit == commit), None)
    name = known_commit.name if known_commit else commit[:10] or "unknown"
    support = "files were changed" if known_commit else "not supported"
    return Checkout(path, commit, name, False, known_commit is not None, support, chosen_by)


def install_advice(chosen_by: str) -> str:
    if chosen_by == CHECKOUT_VARIABLE:
        return f"Point {CHECKOUT_VARIABLE} at a checkout of sd-scripts, or unset it and run: kwrap trainer install"
    return "Install it again: kwrap trainer install"


def list_installed() -> list[Checkout]:
    """The checkouts under `$KWRAP_HOME`, in the order of SUPPORTED."""
    return [inspect_checkout(folder, INSTALLED) for folder in installed_checkouts()]


def list_later(checkout: Checkout) -> list[str]:
    """The names of the installed checkouts whose commits are later than a checkout's, by their dates."""

    def date_of(path: Path) -> int:
        return int(run_git(["log", "-1", "--format=%ct"], path))

    found = []
    for each in list_installed():
        with suppress(InstallFailed):  # no repository: of no known date
            if date_of(each.path) > date_of(checkout.path):
                found.append(each.name)
    return found


def find_checkout(commit: str = "") -> Checkout:
    """The checkout that `find_trainer` names; where a commit is asked for, an installed one must be at it.

    Raises TrainerMissing. Whether it is supported is for `require_supported`.
    """
    if given := os.environ.get(CHECKOUT_VARIABLE):
        return inspect_checkout(Path(given), CHECKOUT_VARIABLE)
    folder = find_trainer(commit)
    if folder and commit in ("", folder.name):
        return inspect_checkout(folder, INSTALLED)
    own = f"point {CHECKOUT_VARIABLE} at a checkout"
    if not commit:
        raise TrainerMissing(
            "sd-scripts is not installed",
            f"Install it: kwrap trainer install\nOr {own}, or use --engine builtin.",
        )
    there = ", ".join(each.name for each in list_installed())
    raise TrainerMissing(
        f"sd-scripts {commit[:10]} is not installed" + (f"; installed: {there}" if there else ""),
        f"Install it: kwrap trainer install --commit {commit[:10]}"
        if any(commit == known.commit for known in list_known())
        else f"kwrap does not install this commit: {own} of sd-scripts at it.",
    )


def require_supported(checkout: Checkout) -> Checkout:
    """The checkout, if kwrap may correct its loop.

    Raises AnchorsMissing that names the places that differ, UnsupportedTrainer, or ImpossiblePair.
    """
    if checkout.is_supported:
        require_transformers(checkout)
        return checkout
    require_anchors(checkout.path, checkout.name)
    if checkout.is_changed:
        raise UnsupportedTrainer(
            f"{checkout.path}: files of sd-scripts {checkout.name} were changed",
            f"Restore them (git -C {checkout.path} checkout -- .), or install a fresh one: kwrap trainer install",
        )
    raise UnsupportedTrainer(
        f"{checkout.path}: sd-scripts {checkout.name} is not supported",
        f"Supported: {SUPPORTED_TEXT}. Install one: kwrap trainer install\nOr try this one here: kwrap trainer prove",
    )


def require_transformers(checkout: Checkout) -> None:
    """Raise ImpossiblePair where the checkout cannot train with the transformers that is installed.

    Of a commit that is not supported only its imports are looked at; the rest is for its proof.
    """
    version = installed_version(TESTED["transformers"])
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    lacks, do = "", "make setup"
    if release >= FIRST_WITHOUT_TEXT_MODEL and any(checkout.commit == known.commit for known in SUPPORTED):
        lacks = "it loads SDXL's text encoders by names that changed in 5.6"
        do = f"make setup, or make setup SET=transformers-5 ({packages_of('transformers-5')['transformers'].pinned})"
    for path in sorted((checkout.path / "library").glob("**/*.py")) if release >= (5,) else ():
        for names in IMPORTED.findall(path.read_text(encoding="utf-8")):
            if found := {words.split()[0] for words in names.strip("()").split(",") if words.strip()} & {*GONE}:
                lacks = f"library/{path.name} imports {', '.join(found)}, which is gone there"
                do = "make setup. Or take a newer commit: kwrap trainer install"
    if lacks:
        raise ImpossiblePair(
            f"sd-scripts {checkout.name} does not train with transformers {version}: {lacks}",
            f"Use the environment with transformers {TESTED['transformers'].version}: {do}",
        )


def report_trainer() -> TrainerReport:
    """What a training would use, and all that kwrap relies on in it."""
    checkout = find_checkout()
    return TrainerReport(
        checkout, tuple(match_anchors(checkout.path)), tuple(check_requirements()), tuple(list_installed())
    )


def find_commit(wanted: str) -> SupportedCommit | None:
    """The supported or proved commit of that tag or hash; the default for none."""
    for known in list_known():
        if wanted in ("", known.name) or (len(wanted) >= 7 and known.commit.startswith(wanted.lower())):
            return known
    return None


def install_checkout(
    source: str = "",
    commit: str = "",
    on_note: Callable[[str], None] = lambda note: None,
    examine: Callable[[Checkout], object] | None = None,
) -> tuple[Checkout, bool]:
    """Put a commit under `$KWRAP_HOME`, whole or not at all; with whether it was there already.

    `source`: a git URL or a local repository, whose large files may be missing. `examine` is given what was got, and
    proves it where it is not supported; without it such a commit raises UsageError. Raises InstallFailed, and what
    `examine` raises.
    """
    known = find_commit(commit)
    if known is None and examine is None:
        raise UsageError(
            f"sd-scripts {commit} is not supported",
            f"Supported: {SUPPORTED_TEXT}. Try another on this machine: add --prove.",
        )
    name, source = known.name if known else commit, source or DEFAULT_SOURCE
    with making_folder(trainer_folder(), f".{Path(name).name}-") as part:
        if known and is_checkout(final := trainer_folder() / known.commit):
            checkout = inspect_checkout(final, INSTALLED)
            if checkout.is_supported:
                return require_supported(checkout), True
            on_note(f"{final} was changed; it is replaced")
        on_note(f"Getting sd-scripts {name} from {source}")
        clone_commit(source, known.commit if known else commit, part / "checkout", on_note)
        checkout = inspect_checkout(part / "checkout", INSTALLED)
        if examine:
            examine(checkout)
        final = trainer_folder() / require_supported(inspect_checkout(checkout.path, INSTALLED)).commit
        was_there = is_checkout(final) and inspect_checkout(final, INSTALLED).is_supported
        if final.exists() and not was_there:
            final.rename(part / "replaced")
        place_folder(part / "checkout", final)
    return inspect_checkout(final, INSTALLED), was_there
