"""What a judge says of pictures, kept so that each is looked at once."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from kohaku_wrap.evaluation.judges import Features, Judge, UnreadablePicture
from kohaku_wrap.file_hashes import sha256_of_file
from kohaku_wrap.files import atomic_write

DIGITS = 32


class Looker:
    """A judge and where its answers are kept: a file a picture, by the sha256 of both."""

    def __init__(self, judge: Judge, folder: Path) -> None:
        self.judge = judge
        self.folder = folder / judge.digest

    def look_at(self, path: Path) -> Features:
        """(outputs,) of one picture, kept or new. Raises UnreadablePicture."""
        try:
            kept = self.folder / f"{sha256_of_file(path)[:DIGITS]}.npy"
        except OSError:
            return self.judge.look_at(path)
        with suppress(OSError, ValueError, EOFError):
            row = np.load(io.BytesIO(kept.read_bytes()), allow_pickle=False)
            if row.ndim == 1 and row.dtype == np.float32:
                return np.asarray(row, dtype=np.float32)
        row = self.judge.look_at(path)
        with suppress(OSError), atomic_write(kept, "wb") as stream:  # of a folder that nobody may write to
            np.save(stream, row, allow_pickle=False)
        return row

    def look_at_each(self, paths: Iterable[Path], unreadable: list[str], on_look: Callable[[], None]) -> list[Features]:
        """The same of all that can be read; why others cannot is added to `unreadable`."""
        rows = []
        for path in paths:
            try:
                rows.append(self.look_at(path))
            except UnreadablePicture as error:
                unreadable.append(error.message)
            on_look()
        return rows
