"""The site file that a run goes by now, and what it took from it: `site.json`, no part of what the run is.

What `[secrets]` of it says of a run's logs is in no file of the run, and read when it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kohaku_wrap.config.site import load_site
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import write_json
from kohaku_wrap.training.records.documents import read_record
from kohaku_wrap.training.records.folder import Run

SITE_FILE = "site.json"
FORMAT = 1


@dataclass(frozen=True)
class Remembered:
    """What the last attempt went by."""

    site: str
    """The site file, absolute; empty where there was none."""

    taken: Mapping[str, Any] = field(default_factory=dict)
    """The site's paths and numbers that the run has by now: `base_model`, `images`, `processes`, `workers`, …"""

    images: str = ""
    """The image folder of the last attempt."""

    format: int = FORMAT
    """Of the file."""


def read_remembered(run: Run) -> Remembered:
    """What the run remembers, else what its lock says of the site that it was made on."""
    if (kept := read_record(run.folder, SITE_FILE, Remembered)) and kept.format == FORMAT:
        return kept
    inputs = run.lock.table("inputs")
    taken = {name: inputs[name] for name in ("base_model", "vae", "tokenizers", "images") if name in inputs}
    taken |= {"processes": run.lock.processes, "workers": run.lock.workers}
    return Remembered(str(inputs.get("site", "")), taken, str(inputs.get("images", "")))


def write_remembered(run: Run, remembered: Remembered) -> None:
    """Keep it, whole or not at all."""
    write_json(run.folder / SITE_FILE, asdict(remembered))


CONFIG = "log_tracker_config"


def read_secrets(run: Run) -> Mapping[str, Any]:
    """The secrets of the site that the run was made on, a relative path as beside that file; none where it is gone."""
    site = Path(run.lock.secrets_file)
    with suppress(KwrapError):
        secrets = dict(load_site(site).secrets) if run.lock.secrets_file else {}
        if secrets.get(CONFIG):
            secrets[CONFIG] = str(site.parent / Path(secrets[CONFIG]).expanduser())
        return secrets
    return {}
