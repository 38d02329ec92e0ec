"""What a resume needs, written so that it is whole or not there: sealed, fsynced, renamed, verified before use."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import kohaku_wrap
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import fsync_folder, sha256_of_file
from kohaku_wrap.training.runs.folder import STATE_NAME

MANIFEST = "manifest.json"
FORMAT = 1
PART_SUFFIX = ".partial"
REMOVED_SUFFIX = ".removed"
HASHING_THREADS = 4
SPARE_BYTES = 1 << 20
SIZE_MARGIN = 1.05
"""A state may be a little larger than the one before it."""


class DamagedState(KwrapError):
    """A state is not what its manifest says; never loaded."""

    def __init__(self, state: Path, what: str) -> None:
        super().__init__(f"{state}: {what}", "Resume from another state: `kwrap resume` takes the newest whole one.")
        self.state = state
        self.what = what


class DiskFull(KwrapError):
    """There is no room for a state; nothing was written under a final name."""


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


def state_folder(states: Path, optimizer_step: int) -> Path:
    """Where the state of that step lies."""
    return states / f"optimizer-step-{optimizer_step:08d}"


def list_states(states: Path) -> list[tuple[int, Path]]:
    """The states under a final name with their optimizer steps, ascending; whole or not."""
    if not states.is_dir():
        return []
    found = [(STATE_NAME.fullmatch(path.name), path) for path in states.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def write_state(
    states: Path,
    optimizer_step: int,
    fill: Callable[[Path], None],
    fingerprint: Fingerprint,
    *,
    attempt: int = 0,
    scheduled: bool = True,
    extra: Mapping[str, Any] | None = None,
    expected_bytes: int = 0,
) -> Path:
    """Let `fill` write a state into a hidden folder, seal it and give it its name; its path.

    Raises DiskFull, before writing where it can be foreseen, and leaves nothing behind. A whole state of the same
    step and fingerprint is kept as it is; a damaged one is replaced.
    """
    states.mkdir(parents=True, exist_ok=True)
    remove_leftovers(states)
    final = state_folder(states, optimizer_step)
    if final.exists():
        try:
            if verify_state(final).fingerprint == fingerprint:
                return final
        except DamagedState:
            pass
    check_space(states, expected_bytes)
    part = states / f".{final.name}{PART_SUFFIX}"
    try:
        part.mkdir()
        fill(part)
        seal_state(part, optimizer_step, fingerprint, attempt, scheduled, extra or {})
        fsync_folder(states)
        if final.exists():
            remove_state(final)
        part.rename(final)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if is_disk_full(error):
            raise DiskFull(*disk_full_message(states, optimizer_step)) from error
        raise
    fsync_folder(states)
    return final


def seal_state(
    folder: Path,
    optimizer_step: int,
    fingerprint: Fingerprint,
    attempt: int,
    scheduled: bool,
    extra: Mapping[str, Any],
) -> Manifest:
    """Make the files of a state durable and write its manifest, last."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        sealed = dict(zip((relative_name(path, folder) for path in paths), threads.map(seal_file, paths), strict=True))
    manifest = Manifest(optimizer_step, fingerprint, sealed, attempt, scheduled, time.time(), dict(extra))
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(manifest_text(manifest))
        stream.flush()
        os.fsync(stream.fileno())
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        fsync_folder(inner)
    fsync_folder(folder)
    return manifest


def seal_file(path: Path) -> SealedFile:
    """Size and sha256 of a file whose content is then on disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return SealedFile(path.stat().st_size, sha256_of_file(path))


def relative_name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def manifest_text(manifest: Manifest) -> str:
    """The manifest as JSON with the digest of its own content, so that a flipped byte in it is seen too."""
    body = {"format": FORMAT, "kwrap_version": kohaku_wrap.__version__, **asdict(manifest)}
    return json.dumps({**body, "digest": document_digest(body)}, indent=2, ensure_ascii=False) + "\n"


def document_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(state: Path) -> Manifest:
    """The manifest alone, proved by its own digest; raises DamagedState."""
    path = state / MANIFEST
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        digest = body.pop("digest")
    except FileNotFoundError:
        raise DamagedState(state, f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DamagedState(state, f"{MANIFEST} is damaged ({error})") from error
    if document_digest(body) != digest:
        raise DamagedState(state, f"{MANIFEST} is damaged (its content does not match its digest)")
    if body["format"] != FORMAT:
        raise DamagedState(state, f"{MANIFEST} has format {body['format']}; this kwrap reads {FORMAT}")
    return Manifest(
        optimizer_step=body["optimizer_step"],
        fingerprint=Fingerprint(**body["fingerprint"]),
        files={name: SealedFile(**sealed) for name, sealed in body["files"].items()},
        attempt=body["attempt"],
        scheduled=body["scheduled"],
        written_unix_seconds=body["written_unix_seconds"],
        extra=body["extra"],
    )


def verify_state(state: Path, on_bytes: Callable[[int], None] | None = None) -> Manifest:
    """The manifest of a state whose every file has been read and found right; raises DamagedState naming the file."""
    manifest = check_state_sizes(state)
    names = list(manifest.files)
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        digests = list(threads.map(lambda name: digest_or_none(state / name, on_bytes), names))
    for name, digest in zip(names, digests, strict=True):
        if digest != manifest.files[name].sha256:
            raise DamagedState(state, f"{name} is damaged (its sha256 is not the manifest's)")
    return manifest


def check_state_sizes(state: Path) -> Manifest:
    """The manifest of a state whose files are there in full length; their content is not read."""
    manifest = read_manifest(state)
    for name, sealed in manifest.files.items():
        path = state / name
        if not path.is_file():
            raise DamagedState(state, f"{name} is missing")
        size_bytes = path.stat().st_size
        if size_bytes != sealed.size_bytes:
            raise DamagedState(state, f"{name} is damaged ({size_bytes:,} bytes instead of {sealed.size_bytes:,})")
    return manifest


def digest_or_none(path: Path, on_bytes: Callable[[int], None] | None) -> str | None:
    try:
        return sha256_of_file(path, on_bytes)
    except OSError:
        return None


def newest_whole_state(
    states: Path,
    at_most: int | None = None,
    on_damaged: Callable[[DamagedState], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> tuple[Path, Manifest] | None:
    """The newest state that verifies, and its manifest; each damaged one on the way is told to `on_damaged`."""
    for step, path in reversed(list_states(states)):
        if at_most is not None and step > at_most:
            continue
        try:
            return path, verify_state(path, on_bytes)
        except DamagedState as damaged:
            if on_damaged:
                on_damaged(damaged)
    return None


def remove_state(state: Path) -> None:
    """Remove a state so that a crash on the way leaves no half of it under its name."""
    away = state.with_name(f".{state.name}{REMOVED_SUFFIX}")
    shutil.rmtree(away, ignore_errors=True)
    state.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def remove_leftovers(states: Path) -> None:
    """Remove what crashes left behind under hidden names."""
    for path in states.glob(".optimizer-step-*"):
        if path.name.endswith((PART_SUFFIX, REMOVED_SUFFIX)):
            shutil.rmtree(path, ignore_errors=True)


def check_space(states: Path, expected_bytes: int = 0) -> None:
    """Raise DiskFull when a state as large as the largest of those here, or as expected, would not fit."""
    needed_bytes = max([expected_bytes, *known_sizes(states)])
    if needed_bytes and shutil.disk_usage(states).free < needed_bytes * SIZE_MARGIN + SPARE_BYTES:
        raise DiskFull(*disk_full_message(states, None, needed_bytes))


def known_sizes(states: Path) -> Iterator[int]:
    for _, path in list_states(states):
        try:
            yield read_manifest(path).size_bytes
        except DamagedState:
            continue


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a failed write says that the disk or the quota is full; torch hides the number in a text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error)
        if isinstance(error, Exception) and ("No space left on device" in text or "unexpected pos" in text):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_message(states: Path, optimizer_step: int | None, needed_bytes: int = 0) -> tuple[str, str]:
    free_mib = shutil.disk_usage(states).free / (1 << 20)
    needs = f", a state needs {needed_bytes / (1 << 20):,.0f} MiB" if needed_bytes else ""
    step = "" if optimizer_step is None else f" (optimizer step {optimizer_step})"
    return (
        f"{states}: the disk is full, no state can be written{step}: {free_mib:,.0f} MiB free{needs}",
        "Free some space, or keep fewer states ([states] keep); nothing is half-written.",
    )
