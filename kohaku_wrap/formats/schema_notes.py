"""What a table of kwrap's says of itself: one JSON object in its Arrow schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

KEY = b"kwrap"


def write_notes(about: Mapping[str, Any]) -> dict[bytes, bytes]:
    """The metadata of a schema that says this."""
    return {KEY: json.dumps(about).encode()}


def read_notes(schema: Any) -> dict[str, Any]:
    """What a schema says; empty for nothing. Raises ValueError or RecursionError for what is no JSON object."""
    found = json.loads((schema.metadata or {}).get(KEY, b"{}"))
    if not isinstance(found, dict):
        raise ValueError("what it says of itself is no JSON object")
    return found
