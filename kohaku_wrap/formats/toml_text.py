"""TOML as text, by the package that sd-scripts reads it with; its own way to write strings breaks some of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import toml


def quote(text: str) -> str:
    r"""A basic string, which is JSON's but for DEL; toml 0.10.2 writes `\x` unescaped and fails on some others."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


class Encoder(toml.TomlEncoder):  # type: ignore[type-arg]  # generic in its stubs alone
    """The package's encoder with strings of our own."""

    def __init__(self, _dict: Any = dict, preserve: bool = False) -> None:
        super().__init__(_dict, preserve)
        self.dump_funcs[str] = quote


def toml_text(document: Mapping[str, Any]) -> str:
    """A document as TOML."""
    return toml.dumps(dict(document), encoder=Encoder())
