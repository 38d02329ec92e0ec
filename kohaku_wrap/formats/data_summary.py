"""`data-summary.json`: a dataset at a glance, beside its captions and in each run that is trained on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kohaku_wrap.files import read_json, read_regular, write_text

SUMMARY_FILE = "data-summary.json"
FORMAT = 1


def write_summary(images: Path, digest: str, summary: Mapping[str, Any]) -> None:
    """Keep the summary beside the columns whose digest it is bound to; the same one is left alone. Raises OSError."""
    text = json.dumps({"format": FORMAT, "captions_digest": digest, **summary}, indent=1, ensure_ascii=False) + "\n"
    path = images / SUMMARY_FILE
    with suppress(OSError, ValueError):
        if read_regular(path) == text:
            return
    write_text(path, text)


def read_summary(folder: Path, digest: str) -> dict[str, Any]:
    """The summary in a folder of images or of a run; empty where there is none, or it is of other captions."""
    document = read_json(folder / SUMMARY_FILE)
    return document if (document.get("format"), document.get("captions_digest")) == (FORMAT, digest) else {}
