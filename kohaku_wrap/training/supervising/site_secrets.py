"""What `[secrets]` of the site says of a run's logs: in no file of the run, read when it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kohaku_wrap.config.site import load_site
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.records.folder import Run

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
