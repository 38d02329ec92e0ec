"""The chapters of a run: how long it was planned to be at first, and each time that it was made longer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

STRETCH, AGAIN = "stretch", "again"
RULES = (STRETCH, AGAIN)
"""What a schedule that depends on the length does in a new chapter: the longer plan's rates, or a new cycle."""

EPOCHS, STEPS = "max_train_epochs", "max_train_steps"
"""The trainer's options that say how long it trains; the first one wins where both are there."""


@dataclass(frozen=True)
class Chapter:
    """One length of a run, from the optimizer step at which it was decided."""

    from_optimizer_step: int
    """Optimizer steps done when it begins; 0 for the first one."""

    from_updates: int
    """Of them, those that changed the weights: the schedule counts these."""

    total_optimizer_steps: int
    """Of the whole run, as this chapter plans it."""

    length: Mapping[str, int] = field(default_factory=dict)
    """The trainer's options of that length: `max_train_epochs` or `max_train_steps`."""

    schedule: str = ""
    """One of RULES; empty where the rates do not depend on the length."""

    repeats_warmup: bool = False
    """Whether a new cycle begins with the schedule's warm-up once more."""

    unix_seconds: float = 0.0
    """When it was decided; 0 for the first one."""

    def document(self) -> dict[str, Any]:
        """For the lock."""
        return asdict(self) | {"length": dict(self.length)}


@dataclass(frozen=True)
class Cycle:
    """What the schedule goes through once, from its first update to the end of the run."""

    from_optimizer_step: int
    """Optimizer steps done before it."""

    from_updates: int
    """Updates done before it; the schedule counts from 0 after them."""

    optimizer_steps: int
    """Its length, which the schedule is made for."""

    has_warmup: bool
    """Whether it begins with the warm-up."""


def read_chapters(documents: Sequence[Mapping[str, Any]]) -> tuple[Chapter, ...]:
    """The chapters of a lock, in order. Raises ValueError, TypeError."""
    chapters = tuple(Chapter(**each) for each in documents)
    if any(each.schedule not in ("", *RULES) for each in chapters):
        raise ValueError("a chapter has an unknown schedule")
    return chapters


def find_cycle(chapters: Sequence[Chapter]) -> Cycle:
    """The cycle that the last of these chapters is in."""
    last = chapters[-1]
    first = next((each for each in reversed(chapters) if each.schedule == AGAIN), None)
    if first is None:
        return Cycle(0, 0, last.total_optimizer_steps, has_warmup=True)
    steps = last.total_optimizer_steps - first.from_optimizer_step
    return Cycle(first.from_optimizer_step, first.from_updates, steps, first.repeats_warmup)
