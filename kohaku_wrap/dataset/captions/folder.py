"""One call that writes captions in an image folder at a time, and nothing left of one that was killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.locks import locking

PART_NAMES = (".captions.*.part", ".metadata_cache.json.*.part", ".captioning")
"""Temporary names of the files for the whole folder, and the lock file of kwrap 0.1."""


class CaptionsBusy(KwrapError):
    """Another call writes captions in the same folder."""


@contextlib.contextmanager
def lock_captions(folder: Path) -> Iterator[None]:
    """Hold `folder` against a second call, and remove what a killed one left half-written. Raises CaptionsBusy."""
    folder.mkdir(parents=True, exist_ok=True)
    # The folder itself is locked: a file for it could be left behind.
    with locking(folder, os.O_DIRECTORY) as is_ours:
        if not is_ours:
            writer = "another `kwrap caption` or `kwrap import`"
            raise CaptionsBusy(f"{writer} writes in {folder}", "Wait for it to end, or stop it.")
        for name in PART_NAMES:
            for part in folder.glob(name):
                part.unlink()
        yield
