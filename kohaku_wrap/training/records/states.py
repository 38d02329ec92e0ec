"""What a resume needs, written so that it is whole or not there: sealed, fsynced, renamed, verified before use."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.file_hashes import sha256_of_file
from kohaku_wrap.files import REMOVED_SUFFIX, fsync_folder, match_names, remove_folder, write_text
from kohaku_wrap.training.records.folder import STATE_NAME, name_of_step
from kohaku_wrap.training.records.manifest import (
    MANIFEST,
    DamagedState,
    Fingerprint,
    Manifest,
    SealedFile,
    manifest_text,
    read_manifest,
)
from kohaku_wrap.wording import show_bytes

PART_SUFFIX = ".partial"
HASHING_THREADS = 4
SPARE_BYTES = 1 << 20
SIZE_MARGIN = 1.05
"""A state may be a little larger than the one before it."""


class DiskFull(KwrapError):
    """There is no room for a state; nothing was written under a final name."""

    kind = "disk-full"


def state_folder(states: Path, optimizer_step: int) -> Path:
    """Where the state of that step lies."""
    return states / name_of_step(optimizer_step)


def list_states(states: Path) -> list[tuple[int, Path]]:
    """The states under a final name with their optimizer steps, ascending; whole or not."""
    return sorted((int(match[1]), path) for match, path in match_names(states, STATE_NAME) if path.is_dir())


def read_manifests(states: Path) -> Iterator[tuple[int, Manifest]]:
    """The manifests of the states with the optimizer steps of their names, ascending; damaged ones are left out."""
    for step, path in list_states(states):
        with suppress(DamagedState):
            yield step, read_manifest(path)


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
        with suppress(DamagedState):
            if verify_state(final).fingerprint == fingerprint:
                return final
    check_space(states, expected_bytes)
    part = states / f".{final.name}{PART_SUFFIX}"
    try:
        part.mkdir()
        fill(part)
        sealed = seal_files(part)
        write_manifest(
            part, Manifest(optimizer_step, fingerprint, sealed, attempt, scheduled, time.time(), extra or {})
        )
        fsync_folder(states)
        if final.exists():
            remove_folder(final)
        part.rename(final)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if is_disk_full(error):
            raise DiskFull(*disk_full_message(states, optimizer_step)) from error
        raise
    fsync_folder(states)
    return final


def seal_files(folder: Path) -> dict[str, SealedFile]:
    """Make the files of a state durable; size and sha256 of each by its name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        names = (path.relative_to(folder).as_posix() for path in paths)
        return dict(zip(names, threads.map(seal_file, paths), strict=True))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the seal of a state, last, and make all names durable."""
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        fsync_folder(inner)
    write_text(folder / MANIFEST, manifest_text(manifest))


def seal_file(path: Path) -> SealedFile:
    """Size and sha256 of a file whose content is then on disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return SealedFile(path.stat().st_size, sha256_of_file(path))


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
    """The manifest of a state whose files are there in full length and whose name tells its step; nothing else is read.

    Raises DamagedState.
    """
    manifest = read_manifest(state)
    named = STATE_NAME.fullmatch(state.name)
    if named and int(named.group(1)) != manifest.optimizer_step:
        raise DamagedState(state, f"it is the state of optimizer step {manifest.optimizer_step:,} under another name")
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


def remove_old_states(states: Path, keep: int, every: int = 0) -> list[int]:
    """Apply retention after a state was written; the steps removed.

    Kept are the newest `keep` scheduled states, those at multiples of `every`, and the newest state that is whole.
    """
    scheduled: list[int] = []
    unscheduled: list[int] = []
    for step, manifest in read_manifests(states):
        (scheduled if manifest.scheduled else unscheduled).append(step)
    kept = set(scheduled[-max(keep, 1) :])
    kept |= {step for step in scheduled if every and step % every == 0}
    kept |= {step for step in unscheduled if not scheduled or step > scheduled[-1]}
    surplus = [step for step in (*scheduled, *unscheduled) if step not in kept]
    if surplus and not any(is_state_there(state_folder(states, step)) for step in kept):
        surplus.remove(max(surplus))
    for step in surplus:
        remove_folder(state_folder(states, step))
    return sorted(surplus)


def is_state_there(state: Path) -> bool:
    """Whether the state's manifest and sizes are right; its content is not read."""
    try:
        check_state_sizes(state)
    except DamagedState:
        return False
    return True


def remove_leftovers(states: Path) -> None:
    """Remove what crashes left behind under hidden names."""
    for path in states.glob(".*"):
        if path.suffix in (PART_SUFFIX, REMOVED_SUFFIX) and STATE_NAME.fullmatch(path.stem[1:]):
            shutil.rmtree(path, ignore_errors=True)


def check_space(states: Path, expected_bytes: int = 0) -> None:
    """Raise DiskFull when a state as large as the largest of those here, or as expected, would not fit."""
    needed_bytes = max([expected_bytes, *(manifest.size_bytes for _, manifest in read_manifests(states))])
    if needed_bytes and shutil.disk_usage(states).free < needed_bytes * SIZE_MARGIN + SPARE_BYTES:
        raise DiskFull(*disk_full_message(states, None, needed_bytes))


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a failed write says that the disk or the quota is full; torch hides the number in a text."""
    while error is not None:
        if isinstance(error, DiskFull):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error)
        if isinstance(error, Exception) and ("No space left on device" in text or "unexpected pos" in text):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_message(states: Path, optimizer_step: int | None, needed_bytes: int = 0) -> tuple[str, str]:
    free = show_bytes(shutil.disk_usage(states).free)
    needs = f", a state needs {show_bytes(needed_bytes)}" if needed_bytes else ""
    step = "" if optimizer_step is None else f" (optimizer step {optimizer_step})"
    return (
        f"{states}: the disk is full, no state can be written{step}: {free} free{needs}",
        "Free some space, or keep fewer states ([states] keep); nothing is half-written.",
    )
