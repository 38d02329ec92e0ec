"""One call that writes captions in an image folder at a time, and nothing left of one that was killed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import take_lock

LOCK_FILE = ".captioning"
PART_NAMES = (".captions.*.part", ".metadata_cache.json.*.part")
"""Temporary names of the files for the whole folder."""


class CaptionsBusy(KwrapError):
    """Another call writes captions in the same folder."""


@contextlib.contextmanager
def lock_captions(folder: Path) -> Iterator[None]:
    """Hold `folder` against a second call, and remove what a killed one left half-written. Raises CaptionsBusy."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    with path.open("ab") as lock:
        if not take_lock(lock.fileno(), path):
            raise CaptionsBusy(f"another `kwrap caption` writes in {folder}", "Wait for it to end, or stop it.")
        try:
            for name in PART_NAMES:
                for part in folder.glob(name):
                    part.unlink()
            yield
        finally:
            path.unlink()
