"""git, asked in a folder: it speaks English, asks no questions, and no variable leads it to another repository."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kohaku_wrap.trainer.requirements import InstallFailed


def run_git(arguments: Sequence[str], folder: Path) -> str:
    """What git prints, in `folder`; raises InstallFailed with git's own words."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=own | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise InstallFailed("git is not installed", "Install git and run the same command again.") from error
    if result.returncode:
        words = result.stderr.strip() or f"exit code {result.returncode}"
        raise InstallFailed(
            f"git {' '.join(arguments[:2])}: {words}",
            "Check the source, or give another: kwrap trainer install --source URL_OR_PATH",
        )
    return result.stdout


def succeeds(arguments: Sequence[str], folder: Path) -> bool:
    """Whether git does it, or says yes."""
    with suppress(InstallFailed):
        run_git(arguments, folder)
        return True
    return False


def read_commit(folder: Path) -> str:
    """The git commit of the repository that holds `folder`; empty where there is none or git is not there."""
    with suppress(InstallFailed):
        return run_git(["rev-parse", "HEAD"], folder).strip()
    return ""
