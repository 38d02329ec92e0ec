"""Whole files or none: atomic writes, reads of regular files alone, and where kwrap keeps and finds its own."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from kohaku_wrap.errors import UsageError
from kohaku_wrap.locks import making_folder

Kept = TypeVar("Kept")

REMOVED_SUFFIX = ".removed"
"""Of the hidden name that a folder has while it is removed."""

Progress = Callable[[int, int], None]
"""Called with what is done and the total, in the unit that the caller announced."""


def unheard(done: int, total: int) -> None:
    """Progress that nobody looks at."""


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def blamed_on(path: Path, part: Path) -> Iterator[None]:
    """Let a failure to write `part` name `path`, which it becomes; a write to a full disk names no file by itself."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if unnamed or error.filename == str(part):
            error.filename = str(path)
        raise


@contextmanager
def becoming(path: Path, part: Path) -> Iterator[None]:
    """Give `part`, which the block writes, the name `path`; it is removed on any failure, an interrupt included."""
    try:
        with blamed_on(path, part):
            yield
            part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path` and give it the name only when all is on disk.

    On any failure, an interrupt included, the neighbour is removed and `path` stays as it was. Raises OSError for a
    folder, a pipe or a device of that name: root would replace /dev/null.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, describe_absence(path), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    encoding = None if "b" in mode else "utf-8"
    with becoming(path, part), part.open(mode, encoding=encoding, newline=None if "b" in mode else "\n") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    fsync_folder(path.parent)


def open_regular(path: Path) -> IO[bytes]:
    """Open a file to read it; a pipe or a device, which might never end, is refused with OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise not_regular(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_regular(path)
    return os.fdopen(descriptor, "rb")


def not_regular(path: Path) -> OSError:
    """The error for a pipe, a socket, a device or a folder where a file belongs."""
    return OSError(errno.EINVAL, "not a regular file", str(path))


def sort_files(paths: Iterable[Path]) -> list[Path]:
    """The files among what a pattern found, sorted; folders are left out.

    Raises UsageError for a pipe, a socket, a device or a link to nothing: left out too, the file that belongs there
    would be missing and nobody would know why.
    """
    found = [path for path in sorted(paths) if not path.is_dir()]
    for path in found:
        if not path.is_file():
            what = "not a regular file" if path.exists() else "a link to nothing"
            raise UsageError(f"{path}: {what}", "Remove it, or put the file there that belongs there.")
    return found


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Folders from the top down, as os.walk gives them.

    Raises OSError for one that cannot be listed: passed by, what is in it would be missing and nobody would know.
    """

    def refuse(error: OSError) -> None:
        if Path(str(error.filename)).name != "lost+found":  # The system's own, at the top of many disks.
            raise error

    return os.walk(folder, onerror=refuse)


def list_below(folder: Path) -> Iterator[Path]:
    """All files and folders below a folder, in any order. Raises OSError as `walk` does."""
    for parent, folders, files in walk(folder):
        yield from (Path(parent, name) for name in (*folders, *files))


def describe_absence(path: Path, wanted: str = "file") -> str:
    """Why there is no regular file to read: nothing of the name, a folder, or a pipe, a socket or a device."""
    if not path.exists():
        return f"no such {wanted}"
    return "a folder" if path.is_dir() else "not a regular file"


def read_regular(path: Path) -> str:
    """The UTF-8 text of a regular file; raises UnicodeDecodeError, and OSError for what is none."""
    with open_regular(path) as stream:
        return stream.read().decode("utf-8")


def read_tail(path: Path, size_bytes: int) -> str:
    """The end of a regular file as text, so many bytes at most. Raises OSError."""
    with open_regular(path) as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - size_bytes))
        return stream.read().decode("utf-8", "replace")


def match_names(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[re.Match[str], Path]]:
    """What lies in a folder under names of that pattern, with what it finds there; nothing where there is no folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := pattern.fullmatch(path.name):
            yield match, path


def parse_json(text: str | bytes) -> Any:
    """The document; raises ValueError, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where it is not there, cannot be read, or is none."""
    with suppress(OSError, ValueError):
        document = parse_json(read_regular(path))
        return document if isinstance(document, dict) else {}
    return {}


def kept_answer(path: Path | None, parse: Callable[[Any], Kept], ask: Callable[[], Any]) -> Kept:
    """What `parse` makes of the JSON that was kept at `path`; where none can be read, `ask`, keep the answer, parse it.

    Where it cannot be kept it is no failure.
    """
    if path is not None:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            return parse(parse_json(read_regular(path)))
    document = ask()
    if path is not None:
        with suppress(OSError):
            write_json(path, document, 1)
    return parse(document)


def has_size(path: Path, size_bytes: int) -> bool:
    """Whether a file is there and as long as it was."""
    with suppress(OSError):
        return path.stat().st_size == size_bytes
    return False


def place_folder(part: Path, final: Path) -> None:
    """Rename a filled folder to `final`, flushed; what another process put there meanwhile stays."""
    try:
        part.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    fsync_folder(final.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a crash on the way leaves no half of it under its name."""
    away = folder.with_name(f".{folder.name}{REMOVED_SUFFIX}")
    shutil.rmtree(away, ignore_errors=True)
    folder.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def link_file(source: Path, place: Path) -> None:
    """Give a file another name: a hard link, or a flushed copy on another disk and on one without hard links."""
    try:
        os.link(source, place)
    except OSError:
        with source.open("rb") as reader, place.open("wb") as writer:
            shutil.copyfileobj(reader, writer)
            writer.flush()
            os.fsync(writer.fileno())


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write(text)


def write_json(path: Path, document: Any, indent: int | None = 2) -> None:
    """Write a document as JSON with a line break at its end, whole or not at all."""
    write_text(path, json.dumps(document, indent=indent) + "\n")


def write_new_text(path: Path, text: str) -> None:
    """Write `text` to a name that nothing has, whole or not at all.

    Raises FileExistsError, also where another process was first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with making_folder(path.parent, f".{path.name}.") as folder:
        part = folder / path.name
        write_text(part, text)
        try:
            os.link(part, path, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS) or os.path.lexists(path):
                raise
            part.rename(path)  # A disk without hard links.
    fsync_folder(path.parent)


def expand_user(path: Path | str) -> Path:
    """The path with `~` and `~name` filled in. Raises UsageError for a user that is not there."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(
            f"{path}: {Path(path).parts[0]} is no user of this machine", "Write ./~name for a folder of that name."
        ) from None


def home_folder() -> Path:
    """Where kwrap keeps what is not part of a project: `$KWRAP_HOME`, else the platform's data folder."""
    if home := os.environ.get("KWRAP_HOME"):
        return Path(home)
    from platformdirs import user_data_path

    return user_data_path("kwrap", appauthor=False)


def shipped_folder(name: str) -> Path:
    """The `templates`, `datasets` or `proofs` folder that came with kwrap, from a wheel or a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
