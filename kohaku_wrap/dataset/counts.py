"""Counts of pieces of work, added up."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Counts:
    """What was counted of some of the work; each kind derives its fields, which can be added."""

    def add(self, other: Counts) -> None:
        """Count the other's too."""
        for each in fields(other):
            total = getattr(self, each.name)
            total += getattr(other, each.name)
            setattr(self, each.name, total)
