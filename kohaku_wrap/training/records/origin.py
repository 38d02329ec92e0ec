"""What a branched run began from: another run's state, of which it holds its own links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.files import parse_json, read_regular, write_json
from kohaku_wrap.training.records.documents import read_record

ORIGIN_FOLDER = "parent"
"""Of a run: holds the state that it began from."""

ORIGIN_FILE = "parent.json"
"""At the head of its ledger."""

TAKEN_FILE = "taken.json"
"""Of the attempt that began a branch."""


@dataclass(frozen=True)
class Origin:
    """A state of another run, and how it was taken up."""

    run: str
    """The parent's name when it was branched from."""

    run_id: str
    """Its id, which stays when it is renamed."""

    options_digest: str
    """Of its options."""

    optimizer_step: int
    """Its optimizer steps done at the state."""

    attempt: int
    """Its attempt that trained up to the state."""

    state: str
    """The state's name, within the run's own folder `parent/`."""

    state_digest: str
    """Of the state's manifest, which holds the sha256 of each file."""

    optimizer: str
    """The class of its optimizer."""

    start_optimizer_step: int
    """Where the run begins: at the parent's step, with its epoch and position, or at 0."""

    begins_anew: tuple[str, ...] = ()
    """Why it begins its own epoch 0; empty where it goes on at the parent's place."""

    @property
    def continues(self) -> bool:
        """Whether the run goes on at the parent's epoch and position."""
        return not self.begins_anew

    def document(self) -> dict[str, Any]:
        """For the lock and the ledger."""
        return asdict(self) | {"begins_anew": list(self.begins_anew)}


def read_origin(document: Mapping[str, Any]) -> Origin:
    """The origin in a lock or a ledger. Raises TypeError, ValueError."""
    return Origin(**{**document, "begins_anew": tuple(document.get("begins_anew", ()))})


def write_origin(ledger: Path, origin: Origin) -> None:
    """Put it at the head of a ledger."""
    write_json(ledger / ORIGIN_FILE, origin.document())


def read_ledger_origin(ledger: Path) -> Origin | None:
    """What stands at the head of a ledger; None where nothing readable does."""
    try:
        return read_origin(parse_json(read_regular(ledger / ORIGIN_FILE)))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def name_optimizer(values: Mapping[str, Any]) -> str:
    """The class of the optimizer that the trainer's options choose."""
    older = "AdamW8bit" if values.get("use_8bit_adam") else "Lion" if values.get("use_lion_optimizer") else "AdamW"
    return str(values.get("optimizer_type") or older)


@dataclass(frozen=True)
class Taken:
    """What the first step of a branch found of its parent's state, in words."""

    taken: Sequence[str]
    """Weights, and moments of groups of the optimizer."""

    left: Sequence[str]
    """What was not taken, and why."""


def write_taken(attempt_folder: Path, taken: Taken) -> None:
    """Keep it with the attempt that began the branch."""
    write_json(attempt_folder / TAKEN_FILE, asdict(taken))


def read_taken(attempt_folder: Path) -> Taken | None:
    """What an attempt took of a parent's state; None where it did not begin a branch, or is not so far."""
    return read_record(attempt_folder, TAKEN_FILE, Taken)
