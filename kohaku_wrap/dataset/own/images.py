"""Images of a person's folders checked and put into the image folder: linked, copied, or written anew."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kohaku_wrap.dataset.images.checking import ImageRefused, check_image
from kohaku_wrap.dataset.images.extract_shard import PART_SUFFIX
from kohaku_wrap.dataset.images.extracted import IMPORTED_FILE
from kohaku_wrap.dataset.images.pool import count_processes, run_in_pool, tie_to_parent
from kohaku_wrap.dataset.images.tars import Refusal
from kohaku_wrap.errors import KwrapError, refusing
from kohaku_wrap.files import Progress, atomic_write, becoming, open_regular
from kohaku_wrap.formats.schema_notes import write_notes

JOURNAL_FILE = ".importing.jsonl"
IMAGES_A_TASK = 16
AGAIN = "Remove it and import all its folders again: images are checked anew, ids stay."
FORMAT = 1
"""Of imported.parquet and the journal."""


@dataclass(frozen=True)
class ImageTask:
    """An image to check."""

    id: int
    """From its label and path."""

    label: str
    """Of its folder."""

    path: str
    """Below that folder, with `/`, in Unicode's NFC."""

    subset: str
    """Its subset's name."""

    source: str
    """The file that it comes from, absolute."""

    file: str
    """Where it goes below the image folder, unless its format has another ending; where it lies, once it is there."""


@dataclass(frozen=True)
class ImportedImage(ImageTask):
    """One image that was checked, and what of it lies in the image folder."""

    source_bytes: int
    """Length of the source."""

    source_mtime_ns: int
    """Its time of change; another one has it checked again."""

    width: int
    """Real width in pixels, as it is trained."""

    height: int
    """Real height in pixels."""

    sha256: str
    """Of the file that it came from, in hex."""

    likeness: int
    """The picture's difference hash, as a signed number of 64 bits."""

    how: str
    """`linked`, `copied`, or `rewritten`: turned upright, laid on white or scaled to 8 bits."""


class NoLinks(KwrapError):
    """The disk of the image folder has no symbolic links, such as exFAT."""


class ImportedUnreadable(KwrapError):
    """The record of the imported images is damaged."""


def read_imported(images: Path) -> dict[int, ImportedImage]:
    """What earlier calls put into the folder, by id: finished ones, and one that was stopped.

    Raises ImportedUnreadable.
    """
    found: dict[int, ImportedImage] = {}
    path, journal = images / IMPORTED_FILE, images / JOURNAL_FILE
    if path.is_file():
        with refusing(ImportedUnreadable, f"{path}: damaged:", AGAIN, pa.ArrowException):
            found = {row["id"]: ImportedImage(**row) for row in pq.read_table(path).to_pylist()}
    if journal.is_file():
        text = journal.read_bytes()
        with refusing(ImportedUnreadable, f"{journal}: damaged:", AGAIN):
            for line in text[: text.rfind(b"\n") + 1].splitlines():
                image = ImportedImage(**json.loads(line))
                found[image.id] = image
    return found


def write_imported(images: Path, rows: Iterable[ImportedImage]) -> None:
    """Write imported.parquet; the journal is not needed from then on."""
    columns = sorted(rows, key=lambda row: row.id)
    kinds = {"int": pa.int64(), "str": pa.string()}
    schema = pa.schema([(each.name, kinds[str(each.type)]) for each in fields(ImportedImage)])
    schema = schema.with_metadata(write_notes({"format": FORMAT}))
    with atomic_write(images / IMPORTED_FILE, "wb") as stream:
        pq.write_table(pa.Table.from_pylist([vars(row) for row in columns], schema=schema), stream)
    (images / JOURNAL_FILE).unlink(missing_ok=True)


def is_kept(image: ImportedImage, task: ImageTask, images: Path, copy: bool) -> bool:
    """Whether an image is there as this call would put it."""
    with suppress(OSError):
        status = Path(task.source).stat()
        place = images / image.file
        same = (image.source_bytes, image.source_mtime_ns) == (status.st_size, status.st_mtime_ns)
        if not same or (image.subset, image.source) != (task.subset, task.source):
            return False
        if image.how == "linked":
            return not copy and place.is_symlink() and place.samefile(task.source)
        return (copy or image.how == "rewritten") and place.is_file() and not place.is_symlink()
    return False


def check_images(
    tasks: Sequence[ImageTask],
    images: Path,
    copy: bool,
    dry_run: bool,
    jobs: int | None,
    on_progress: Progress,
) -> Iterator[ImportedImage | Refusal]:
    """Check images and put them into the folder, in any order; each is in the journal before it is given back.

    Raises WorkerDied when a process is killed.
    """
    pieces = (tasks[start : start + IMAGES_A_TASK] for start in range(0, len(tasks), IMAGES_A_TASK))
    processes = count_processes(jobs, len(tasks))
    work = partial(take_images, images=images, copy=copy, dry_run=dry_run)
    alone = (work([task]) for task in tasks)
    taken = alone if processes <= 1 else run_in_pool(work, pieces, processes, tie_to_parent)
    journal = Path(os.devnull) if dry_run else images / JOURNAL_FILE
    if journal.is_file():  # What a full disk cut would make one line with the next.
        os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)
    with journal.open("a", encoding="utf-8") as stream:
        for done, result in enumerate(itertools.chain.from_iterable(taken), 1):
            if isinstance(result, ImportedImage):
                stream.write(json.dumps(vars(result)) + "\n")
                stream.flush()
            on_progress(done, len(tasks))
            yield result


def take_images(tasks: Sequence[ImageTask], images: Path, copy: bool, dry_run: bool) -> list[ImportedImage | Refusal]:
    """Check and place a piece of the images."""
    return [take_image(task, images, copy, dry_run) for task in tasks]


def take_image(task: ImageTask, images: Path, copy: bool, dry_run: bool) -> ImportedImage | Refusal:
    """Check one image and place it. Raises OSError where it cannot be written."""
    source = Path(task.source)
    try:
        with open_regular(source) as stream:
            status, content = os.fstat(stream.fileno()), stream.read()
        checked = check_image(content, source.suffix[1:].lower(), with_likeness=True)
    except ImageRefused as refusal:
        return Refusal(task.source, refusal.message)
    except OSError as error:
        return Refusal(task.source, f"cannot be read: {error.strerror}")
    fits = checked.extension == source.suffix[1:].lower()
    file = task.file if fits else f"{task.file}.{checked.extension}"
    how = "rewritten" if checked.rewritten else "copied" if copy else "linked"
    if not dry_run:
        place_file(images / file, None if how == "linked" else checked.content, source)
    return ImportedImage(
        **{**vars(task), "file": file},
        source_bytes=status.st_size,
        source_mtime_ns=status.st_mtime_ns,
        width=checked.width,
        height=checked.height,
        sha256=hashlib.sha256(content).hexdigest(),
        likeness=checked.likeness - (1 << 64 if checked.likeness >> 63 else 0),
        how=how,
    )


def place_file(place: Path, content: bytes | None, source: Path) -> None:
    """Write `content` under its name, or a link to `source`; whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f".{os.getpid()}{PART_SUFFIX}")  # names may be as long as the disk takes
    try:
        with becoming(place, part):
            if content is None:
                part.unlink(missing_ok=True)
                part.symlink_to(source)
            else:
                part.write_bytes(content)
    except OSError as error:
        if content is None and error.errno in (errno.EPERM, errno.ENOTSUP):
            raise NoLinks(f"{place}: this disk takes no links", "Copy the images instead: add --copy.") from error
        error.filename = error.filename or str(place)
        raise
