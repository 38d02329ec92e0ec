"""A checkout of one commit of sd-scripts out of a repository, by git."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kohaku_wrap.files import expand_user
from kohaku_wrap.trainer.commits import SUPPORTED
from kohaku_wrap.trainer.git import run_git, succeeds
from kohaku_wrap.trainer.requirements import InstallFailed

NEWEST = "newest"
"""In place of a commit: what the source has checked out."""

SMALL_FILE_BYTES = 1 << 20
"""Larger files of `configs/` are left out: mirrors may lack them and SDXL training does not read them."""

SPARSE_PATTERNS = ("/*.py", "/library/", "/networks/", "/requirements.txt", "/LICENSE.md")
"""All that SDXL training needs of the repository."""

NOT_THERE = re.compile("couldn't find remote ref|not our ref")
"""What git says of a tag, branch or commit that the source does not have; `run_git` has it speak English."""


def clone_commit(source: str, commit: str, folder: Path, on_note: Callable[[str], None]) -> None:
    """A checkout of what SDXL training needs of one commit; the rest is not fetched where git can leave it out."""
    local = expand_user(source.removeprefix("file://"))
    if local.exists():
        run_git(["clone", "--quiet", "--no-checkout", str(local.resolve()), str(folder)], folder.parent)
    else:
        run_git(["clone", "--quiet", "--no-checkout", "--filter=blob:none", source, str(folder)], folder.parent)
    if commit.lower() == NEWEST:
        # What the source itself has checked out: for a server its default branch.
        commit = run_git(["rev-parse", "HEAD"], folder).strip()
        on_note(describe_newest(source, folder))
    elif not succeeds(["cat-file", "-e", f"{commit}^{{commit}}"], folder):
        fetch_commit(source, commit, folder)
        commit = run_git(["rev-parse", "FETCH_HEAD"], folder).strip()
    patterns = [*SPARSE_PATTERNS, *(f"/{name}" for name in small_configs(folder, commit))]
    run_git(["sparse-checkout", "set", "--no-cone", *patterns], folder)
    run_git(["-c", "advice.detachedHead=false", "checkout", "--quiet", "--detach", commit], folder)


def fetch_commit(source: str, commit: str, folder: Path) -> None:
    """Get a tag, branch or commit from the source of a clone. Raises InstallFailed."""
    try:
        run_git(["fetch", "--quiet", "origin", commit], folder)
    except InstallFailed as failed:
        if not NOT_THERE.search(failed.message):
            raise
        raise InstallFailed(
            f"{source} has no tag, branch or commit {commit}",
            f"See what it has: git ls-remote {shlex.quote(source)}. A commit is named by its full hash.",
        ) from failed


def describe_newest(source: str, folder: Path) -> str:
    """Which commit stands for `newest`, and how far it is from the last one that kwrap supports."""
    branch = run_git(["rev-parse", "--abbrev-ref", "HEAD"], folder).strip().replace("HEAD", "no branch")
    about = run_git(["log", "-1", "--format=%h of %cs (%s)"], folder).strip()
    later = [
        (int(run_git(["rev-list", "--count", f"{known.commit}..HEAD"], folder)), known.name)
        for known in SUPPORTED
        if succeeds(["merge-base", "--is-ancestor", known.commit, "HEAD"], folder)
    ]
    if later:
        count, name = min(later)
        about += f", {count:,} commit{'s' * (count != 1)} after {name}" if count else f", which is {name}"
    return (
        f"The newest is what {source} has checked out: {branch}, {about}. In a fork these may be the fork's own "
        "commits; choose another by --commit TAG, HASH or BRANCH"
    )


def small_configs(folder: Path, commit: str) -> list[str]:
    """The JSON files of `configs/` that are there and small."""
    names = run_git(["ls-tree", "-r", "--name-only", commit, "configs/"], folder).split("\n")
    small = []
    for name in (name for name in names if name.endswith(".json")):
        with suppress(InstallFailed):  # a mirror may lack it
            if int(run_git(["cat-file", "-s", f"{commit}:{name}"], folder)) < SMALL_FILE_BYTES:
                small.append(name)
    return small
