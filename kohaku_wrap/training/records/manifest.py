"""The seal of a state: what it belongs to, its files with their sha256, and a digest of the seal itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import kohaku_wrap
from kohaku_wrap.errors import KwrapError, reason_of
from kohaku_wrap.files import read_regular

MANIFEST = "manifest.json"
FORMAT = 2

READABLE_FORMATS = (1, FORMAT)
"""1 is that of kwrap 0.1: its fingerprint names no run and no options."""


class DamagedState(KwrapError):
    """A state is not what its manifest says; never loaded."""

    kind = "bad-state"

    def __init__(self, state: Path, what: str) -> None:
        super().__init__(f"{state}: {what}", "Resume from another state: `kwrap resume` takes the newest whole one.")
        self.state = state
        self.what = what


class UnfitState(KwrapError):
    """A whole state that this training cannot go on from: of another network, or of a schedule with a history."""

    kind = "bad-state"


@dataclass(frozen=True)
class Fingerprint:
    """What must be equal for a state to continue a run, and where in the run it stands."""

    engine: str
    """Which trainer made it."""

    data: str
    """`kwrap`, or `sd-scripts` for the trainer's own dataset."""

    seed: int
    """Of order, captions and noise."""

    group: int
    """Batches in one optimizer step: processes times accumulation."""

    processes: int
    """Of the attempt that wrote it."""

    accumulation: int
    """Of the attempt that wrote it."""

    batch_size: int
    """Images of one batch."""

    batches: int
    """Batches of one epoch, all buckets together."""

    images: int
    """Images of the dataset."""

    dataset_digest: str
    """Of ids, sizes and captions."""

    trainer_commit: str
    """Of sd-scripts; empty for the builtin engine."""

    epoch: int
    """Counted from 0, of the next optimizer step."""

    position: int
    """Global batch positions of that epoch already trained."""

    micro_batch: int
    """Micro-batches of that epoch already done by each process."""

    run_id: str = ""
    """The id of the run that wrote it; empty in a state of kwrap 0.1."""

    options_digest: str = ""
    """Of all options that decide the weights; empty in a state of kwrap 0.1."""


@dataclass(frozen=True)
class SealedFile:
    """One file of a state."""

    size_bytes: int
    """Its length."""

    sha256: str
    """Of its content, in hex."""


@dataclass(frozen=True)
class Manifest:
    """The seal of a state."""

    optimizer_step: int
    """Optimizer steps done."""

    fingerprint: Fingerprint
    """What it belongs to."""

    files: Mapping[str, SealedFile]
    """By path relative to the state, with forward slashes."""

    attempt: int
    """The attempt that wrote it."""

    scheduled: bool
    """False for one that was saved because of a stop; it goes as soon as a scheduled one follows."""

    written_unix_seconds: float
    """When it was sealed."""

    extra: Mapping[str, Any]
    """What the engine wants to find again."""

    @property
    def size_bytes(self) -> int:
        return sum(each.size_bytes for each in self.files.values())


def manifest_text(manifest: Manifest) -> str:
    """The manifest as JSON with the digest of its own content, so that a flipped byte in it is seen too."""
    body = {"format": FORMAT, "kwrap_version": kohaku_wrap.__version__, **asdict(manifest)}
    return json.dumps({**body, "digest": document_digest(body)}, indent=2, ensure_ascii=False) + "\n"


def document_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_of_state(state: Path) -> str:
    """The digest that the manifest has of itself, and so of all files of the state; raises DamagedState."""
    read_manifest(state)
    return str(json.loads(read_regular(state / MANIFEST))["digest"])


def read_manifest(state: Path) -> Manifest:
    """The manifest alone, proved by its own digest; raises DamagedState."""
    path = state / MANIFEST
    try:
        body = json.loads(read_regular(path))
        digest = body.pop("digest")
    except FileNotFoundError:
        raise DamagedState(state, f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedState(state, f"{MANIFEST} is damaged ({reason_of(error)})") from error
    if document_digest(body) != digest:
        raise DamagedState(state, f"{MANIFEST} is damaged (its content does not match its digest)")
    if body.get("format") not in READABLE_FORMATS:
        raise DamagedState(state, f"{MANIFEST} has format {body.get('format')}; this kwrap reads 1 to {FORMAT}")
    try:
        values = {each.name: body[each.name] for each in fields(Manifest)}
        values["fingerprint"] = Fingerprint(**body["fingerprint"])
        values["files"] = {name: SealedFile(**sealed) for name, sealed in body["files"].items()}
        return Manifest(**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedState(state, f"{MANIFEST} is not as this kwrap writes it ({error})") from error
