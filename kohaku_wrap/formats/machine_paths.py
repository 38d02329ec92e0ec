"""Metadata without paths of the machine: a network that travels does not say who made it, or where."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOTS = frozenset(
    (
        "Users", "Volumes", "autofs", "cache", "checkpoints", "cluster", "content", "data", "datasets", "gpfs", "home",
        "kaggle", "lustre", "media", "mnt", "models", "nfs", "notebooks", "opt", "private", "projects", "root", "run",
        "runs", "scratch", "shared", "srv", "storage", "teamspace", "tmp", "usr", "var", "work", "workspace",
    )
)  # fmt: skip
"""First folders of absolute paths on machines that train, beside those of this one."""

HOMES = frozenset(("home", "Users"))
"""Folders whose folders are called like people."""

MARKS = r"\s\"'=,;:()\[\]{}<>|`"
EMBEDDED = re.compile(
    rf"(?:(?<=[{MARKS}])|^)(?:file://)?"
    rf"(?:~[\w.-]*/[^{MARKS}]*|/[^/{MARKS}][^{MARKS}]*|[A-Za-z]:[\\/][^{MARKS}]+|\\\\[\w.-]+\\[^{MARKS}]+)"
)
"""What may be an absolute path within a text: of POSIX, from a home folder, of Windows."""


def without_paths(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the last part of each absolute path in its place, within JSON too."""
    return {name: clean_text(text) for name, text in metadata.items()}


def clean_value(value: Any) -> Any:
    """A value of JSON with all its texts cleaned."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_text(name): clean_value(inner) for name, inner in value.items()}
    return [clean_value(inner) for inner in value] if isinstance(value, list) else value


def clean_text(text: str) -> str:
    """One text: JSON is cleaned within, a whole path becomes its last part, and so do paths among other words."""
    if text.startswith(("{", "[")):
        try:
            value = json.loads(text)
            cleaned = clean_value(value)
        except (ValueError, RecursionError):
            pass
        else:
            return text if cleaned == value else json.dumps(cleaned)
    home = str(Path.home())
    if "\n" not in text and is_path(text.removeprefix("file://")):
        text = last_part(text)
    else:
        text = EMBEDDED.sub(
            lambda found: last_part(found[0]) if is_path(found[0].removeprefix("file://")) else found[0], text
        )
    return text.replace(home, "~") if home.count("/") > 1 else text


def parts_of(path: str) -> list[str]:
    return [part for part in re.split(r"[/\\]+", path) if part]


def is_path(text: str) -> bool:
    """Whether a text is an absolute path as machines have them; tags such as `/v/` and addresses are none."""
    parts = parts_of(text)
    if re.match(r"[A-Za-z]:[\\/]", text):
        return len(parts) > 2
    if text.startswith("\\\\") or re.match(r"~[\w.-]*/", text):
        return len(parts) > 1
    return text.startswith("/") and bool(parts) and (parts[0] in ROOTS or parts[0] in roots_here())


def roots_here() -> frozenset[str]:
    """The first folders of this machine's paths."""
    with suppress(OSError):
        return frozenset(path.name for path in Path("/").iterdir())
    return frozenset()


def last_part(path: str) -> str:
    """The name of the file or folder; `~` for a home folder, which is called like its owner."""
    parts = parts_of(path.removeprefix("file://"))
    if re.match(r"[A-Za-z]:$", parts[0]) and len(parts) > 1:
        parts = parts[1:]
    return "~" if len(parts) < 2 or (parts[0] in HOMES and len(parts) == 2) else parts[-1]
