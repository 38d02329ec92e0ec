"""Results of another call, read to be laid over this one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import UsageError, refusing
from kohaku_wrap.files import parse_json, read_regular

FORMAT = 1
"""Of `ccip.json`, `loss.json` and `judged-KIND.json`."""


class OtherResult(UsageError):
    """A result that cannot be compared with this one."""


def read_result(path: Path, command: str, measures: Collection[str], usual_name: str) -> dict[str, Any]:
    """A document that `kwrap evaluate COMMAND` wrote. Raises OtherResult."""
    with refusing(OtherResult, f"{path}: no result of `kwrap evaluate {command}`", f"Give its {usual_name}."):
        document = parse_json(read_regular(path))
        if document["format"] != FORMAT or document["measure"] not in measures or not document["models"]:
            raise ValueError("another form")
    return dict(document)


def name_apart(title: str, path: Path, titles: Collection[str]) -> str:
    """What a model of another result is called beside these."""
    return title if title not in titles else f"{path.parent.name}/{title}"
