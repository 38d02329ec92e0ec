"""The files of a merge: inputs that are read at places, and one output that gets its name only when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import blamed_on, fsync_folder
from kohaku_wrap.formats.safetensors import Header
from kohaku_wrap.locks import take_lock

DISK_RESERVE_BYTES = 16 << 20


class BadOutput(KwrapError):
    """An output path that cannot be written to."""


class ChangedInput(KwrapError):
    """A file that became shorter while it was read."""


class Files:
    """The open inputs of a merge."""

    def __init__(self, headers: Mapping[str, Header]) -> None:
        self.headers = headers
        self.descriptors = {name: os.open(header.path, os.O_RDONLY) for name, header in headers.items()}

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)

    def read(self, name: str, begin: int, buffer: NDArray[Any]) -> None:
        """Fill `buffer` from byte `begin` of a file's data."""
        view = memoryview(buffer.view(np.uint8).data)
        place = self.headers[name].data_start + begin
        while len(view):
            count = os.preadv(self.descriptors[name], [view], place)
            if not count:
                raise ChangedInput(f"{self.headers[name].path}: it became shorter while it was read", "Start again.")
            view, place = view[count:], place + count


def write_at(descriptor: int, buffer: NDArray[Any], place: int) -> None:
    """Write all of `buffer` at byte `place` of a file."""
    view = memoryview(buffer.view(np.uint8).data)
    while len(view):
        count = os.pwrite(descriptor, view, place)
        view, place = view[count:], place + count


def check_space(folder: Path, size_bytes: int) -> None:
    """Raise BadOutput where the disk has no room for the output."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes + DISK_RESERVE_BYTES:
        raise BadOutput(
            f"{folder}: the output takes {size_bytes:,} bytes and only {free_bytes:,} are free",
            "Free some space, or choose another place with -o.",
        )


@contextmanager
def new_file(path: Path, size_bytes: int) -> Iterator[int]:
    """A descriptor of `<path>.part`, which gets its name only when all is on disk; nothing is left on failure."""
    part = path.with_name(f"{path.name}.part")
    if part.is_symlink():
        raise BadOutput(f"{part} is a link to another file", "Remove it, or choose another name with -o.")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        if not take_lock(descriptor, part):
            raise BadOutput(f"{part}: another merge is writing it", "Wait for it, or choose another name.")
        with blamed_on(path, part):
            os.ftruncate(descriptor, 0)
            check_space(path.parent, size_bytes)
            yield descriptor
            os.fsync(descriptor)
            part.replace(path)
    except BaseException:
        # Asked again, since a signal may come before the first answer: what another merge holds is not ours.
        if take_lock(descriptor, part):
            part.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    fsync_folder(path.parent)


def check_output(output: Path, inputs: Mapping[str, Header]) -> None:
    """Raise BadOutput where the output is one of the inputs, is a folder, or has no folder to lie in."""
    if output.is_dir() or not output.name:
        raise BadOutput(f"{output} is a folder", "Name a file with -o, such as merged.safetensors.")
    if output.suffix != ".safetensors":
        raise BadOutput(f"{output}: kwrap writes .safetensors files", f"Try -o {output.with_suffix('.safetensors')}")
    if not output.parent.is_dir():
        raise BadOutput(f"{output.parent} does not exist", "Make the folder first, or choose another place with -o.")
    part = output.with_name(f"{output.name}.part")
    for name, header in inputs.items():
        for candidate in (output, part):
            if candidate.exists() and candidate.samefile(header.path):
                raise BadOutput(
                    f"{candidate} is the input {name}", "Choose another name with -o; inputs are never overwritten."
                )
