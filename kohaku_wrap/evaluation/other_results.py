"""Results of another call, read to be laid over this one."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kohaku_wrap
from kohaku_wrap.errors import UsageError, refusing
from kohaku_wrap.files import parse_json, read_regular
from kohaku_wrap.wording import name_apart

FORMAT = 1
"""Of `ccip.json`, `loss.json` and `judged-KIND.json`."""


def list_versions(*packages: str) -> dict[str, str]:
    """Of kwrap, Python and the packages that compute, without loading them."""
    own = {"kwrap": kohaku_wrap.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}


Facts = Mapping[str, tuple[str, str]]
"""What must be the same, by the words for what is not: the table of a result, and the key in it."""


class OtherResult(UsageError):
    """A result that cannot be compared with this one."""


def read_result(
    path: Path, command: str, measures: Collection[str], usual_name: str, check: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """A document that `kwrap evaluate COMMAND` wrote. Raises OtherResult, also where `check` misses something."""
    with refusing(OtherResult, f"{path}: no result of `kwrap evaluate {command}`", f"Give its {usual_name}."):
        document = dict(parse_json(read_regular(path)))
        titles = [each["title"] for each in document["models"]]
        is_titled = bool(titles) and all(isinstance(title, str) for title in titles)
        if document["format"] != FORMAT or document["measure"] not in measures or not is_titled:
            raise ValueError("another form")
        check(document)
    return document


def refuse_differing(
    path: Path, made: str, advice: str, here: Mapping[str, Any], there: Mapping[str, Any], facts: Facts
) -> None:
    """Raise OtherResult where a fact of the result at `path` is not that of the one here; `made`: with or on what."""
    for what, (table, name) in facts.items():
        if here[table][name] != there.get(table, {}).get(name):
            raise OtherResult(f"{path}: {made} {what}", advice)


def add_models(result: dict[str, Any], models: Iterable[Mapping[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Add models of the result at `path`, each with a title of its own; they as they were added."""
    added = []
    for model in models:
        titles = {each["title"] for each in result["models"]}
        title = model["title"] if model["title"] not in titles else f"{path.absolute().parent.name}/{model['title']}"
        added.append({**model, "title": name_apart(title, titles), "from_other_result": True})
        result["models"].append(added[-1])
    return added
