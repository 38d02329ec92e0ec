"""The recipe inside a merged file, read again: JSON that anyone may have written, and the command of kwrap's own."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kohaku_wrap.merging.hashes import AUTO_V2_DIGITS
from kohaku_wrap.merging.notes import LIKE, VAE
from kohaku_wrap.merging.plan import MergeOptions
from kohaku_wrap.merging.recipes import type_options

RECIPE_TYPE = "kwrap"
NESTING_LIMIT = 64


def parse_json(text: str | None) -> Any:
    """The value of JSON text; the text itself where it is none, or holds what could not be written again."""
    if text is None:
        return None
    try:
        value = json.loads(text)
        dump_json(value).encode("utf-8")  # escapes can hold halves of characters
    except (ValueError, RecursionError):
        return text
    return value if is_shallow(value, NESTING_LIMIT) else text


def is_shallow(value: Any, levels: int) -> bool:
    """Whether JSON is nested at most so many levels deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(is_shallow(item, levels - 1) for item in inner)


def dump_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def command_of_recipe(
    recipe: Mapping[str, Any], parents: Mapping[str, Any], metadata: Mapping[str, str], output: str
) -> str:
    """The command that would make a merged file again, from its `sd_merge_recipe` and `sd_merge_models`.

    Files are called by the names that they had, with their hash for a folder where two had the same; LIKE and VAE
    stand-ins are options, not models.
    """
    formula = str(recipe.get("formula", ""))
    bound = {**as_table(recipe.get("models")), **as_table(recipe.get("networks"))}
    hashes_of_file: dict[str, set[str]] = {}
    files = {}
    for name, sha256 in bound.items():
        files[name] = str(as_table(parents.get(str(sha256))).get("name", f"{name}.safetensors"))
        hashes_of_file.setdefault(files[name], set()).add(str(sha256))
    words: list[str] = []
    for name, file in files.items():
        if name not in (LIKE, VAE):
            folder = f"{str(bound[name])[:AUTO_V2_DIGITS]}/" if len(hashes_of_file[file]) > 1 else ""
            words += ["-m", f"{name}={folder}{file}"]
    asked = as_table(recipe.get("options"))
    said = {name: metadata.get(f"modelspec.{name}", "") for name in ("title", "date")}
    words += type_options({option.name: asked.get(option.name) for option in fields(MergeOptions)})
    words += type_options({name: text for name, text in said.items() if text != formula})
    words += ["-o", output]
    # What begins with a minus would be read as an option.
    return shlex.join(["kwrap", "merge", *([*words, "--", formula] if formula.startswith("-") else [formula, *words])])


def as_table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
