"""Contradictions between effective values that cost people days, each with the layer that brought it in."""

from __future__ import annotations

from kohaku_wrap.config.layers import Effective
from kohaku_wrap.errors import Problem


def check_effective(effective: Effective) -> list[Problem]:
    """Every contradiction of a template, on its site where one is given."""
    return []
