"""Extract the wanted images of a few tars: the work of one process, light because it needs no Arrow."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event as EventType
from pathlib import Path
from typing import TextIO

from kohaku_wrap.arrays import Int32Array, Int64Array
from kohaku_wrap.dataset.counts import Counts
from kohaku_wrap.dataset.images.checking import (
    LARGEST_FILE_BYTES,
    CheckedImage,
    ImageRefused,
    check_image,
)
from kohaku_wrap.dataset.images.pool import tie_to_parent
from kohaku_wrap.dataset.images.tar_layouts import FOLDERS, read_id
from kohaku_wrap.dataset.images.tars import Member, TarReader, TarUnreadable
from kohaku_wrap.files import becoming, has_size, open_regular
from kohaku_wrap.metadata.filters import STILL_EXTENSIONS
from kohaku_wrap.wording import name_first

PART_SUFFIX = ".part"


class Stopped(Exception):
    """The person interrupted the extraction."""


@dataclass(frozen=True)
class ShardTask:
    """Posts whose images lie in the same tars."""

    tars: tuple[Path, ...]
    """In the order in which they are tried."""

    ids: Int64Array
    """(posts,) ascending."""

    sizes: Int32Array
    """(posts, 2): width and height of the originals after the database, 0 where it does not say them."""

    known: dict[int, tuple[str, int]]
    """File and bytes of each post whose image an earlier run verified."""

    pattern: str
    """What tars of these posts are called, for the reason of what is missing."""

    files: tuple[Path, ...] = ()
    """Images outside of tars, tried after them."""


@dataclass
class ShardResult(Counts):
    """What became of a task's posts."""

    written: int = 0
    """Images written now."""

    reduced: int = 0
    """Of these, smaller copies."""

    rewritten: int = 0
    """Of the written, pictures turned upright, laid on white or scaled to 8 bits."""

    other_size: int = 0
    """Of these, images whose size is not the database's: reduced copies, and replaced pictures."""

    kept: int = 0
    """Images that were there already."""

    missing: list[tuple[int, str]] = field(default_factory=list)
    """Ids that no tar holds, with the reason."""

    corrupt: list[tuple[int, str]] = field(default_factory=list)
    """Ids whose members were refused, with the reason."""

    refused: list[tuple[str, str, str]] = field(default_factory=list)
    """Members refused for what they are: tar, name, reason."""

    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Tars that are damaged or cannot be read: tar, reason."""


@dataclass(frozen=True)
class ShardWriter:
    """Where one process puts images and says so."""

    out: Path
    """The image folder."""

    journal: TextIO
    """Gets one line for each image under its final name, with the columns of extracted.parquet."""

    max_pixels: int
    """Larger images are reduced; 0 for no limit."""

    should_stop: Callable[[], bool]
    """Asked before each image."""

    count_done: Callable[[int], None]
    """Told how many posts are settled."""

    def write_image(self, post_id: int, image: CheckedImage) -> None:
        """Give the image its name, then say so in the journal: a line stands for a whole file."""
        name = f"{post_id % FOLDERS:04}/{post_id}.{image.extension}"
        path = self.out / name
        part = path.with_name(f".{path.name}{PART_SUFFIX}")
        with becoming(path, part):
            try:
                part.write_bytes(image.content)
            except FileNotFoundError:
                part.parent.mkdir(exist_ok=True)
                part.write_bytes(image.content)
        size_bytes = len(image.content)
        limit = self.max_pixels if image.reduced else 0
        self.journal.write(f"{post_id},{name},{image.width},{image.height},{size_bytes},{limit},{image.rewritten:d}\n")
        self.journal.flush()


def open_journal(stem: Path) -> TextIO:
    """This process's own journal of a run."""
    return stem.with_name(f"{stem.name}-{os.getpid()}.csv").open("a", encoding="utf-8")


def extract_shard(task: ShardTask, writer: ShardWriter) -> ShardResult:
    """Extract what is not there yet; every post of the task ends in exactly one of the four results.

    Raises Stopped when the writer says so; what is written stays.
    """
    result = ShardResult()
    wanted = find_wanted(task, writer.out)
    result.kept = len(task.ids) - len(wanted)
    writer.count_done(result.kept)
    failures: dict[int, list[str]] = {}
    for tar in task.tars:
        if not wanted:
            break
        try:
            reader = TarReader(tar, lambda name: (found := read_id(name)) is not None and found[0] in wanted)
        except TarUnreadable as error:
            result.damaged.append((str(tar), error.message))
            continue
        with reader:
            note_refusals(reader, wanted, result, failures)
            extract_members(reader, task, wanted, writer, result, failures)
    if wanted and task.files:
        extract_members(PlainFiles(task.files, wanted), task, wanted, writer, result, failures)
    for post_id in sorted(wanted):
        if post_id in failures:
            result.corrupt.append((post_id, "; ".join(failures[post_id])))
        else:
            result.missing.append((post_id, explain_missing(task, result)))
    writer.count_done(len(wanted))
    return result


def find_wanted(task: ShardTask, out: Path) -> set[int]:
    """The posts whose verified file is not there in its known size."""
    wanted = set(task.ids.tolist())
    return wanted.difference(post_id for post_id, (file, size) in task.known.items() if has_size(out / file, size))


def note_refusals(reader: TarReader, wanted: set[int], result: ShardResult, failures: dict[int, list[str]]) -> None:
    """List the tar's damage and refused members; a wanted post among these counts as corrupt if no other has it."""
    tar = str(reader.path)
    if reader.listing.damage:
        result.damaged.append((tar, reader.listing.damage))
    for refusal in reader.listing.refused:
        result.refused.append((tar, refusal.name, refusal.reason))
        found = read_id(refusal.name.replace("\\", "/"))
        if found is not None and found[0] in wanted:
            failures.setdefault(found[0], []).append(f"{reader.path.name}: {refusal.name} {refusal.reason}")


def order_members(reader: TarReader | PlainFiles, failures: dict[int, list[str]]) -> Iterator[tuple[int, str, Member]]:
    """Id, extension and member of every wanted still image by offset; of members of one id, the last first."""
    of_post: dict[int, list[tuple[str, Member]]] = {}
    for member in reader.members:
        post_id, extension = read_id(member.name) or (0, "")
        if extension in STILL_EXTENSIONS:
            of_post.setdefault(post_id, []).append((extension, member))
        else:
            failures.setdefault(post_id, []).append(f"{reader.path.name}: {member.name} is no still image")
    for post_id in sorted(of_post, key=lambda post_id: of_post[post_id][-1][1].offset):
        for extension, member in reversed(of_post[post_id]):
            yield post_id, extension, member


def extract_members(
    reader: TarReader | PlainFiles,
    task: ShardTask,
    wanted: set[int],
    writer: ShardWriter,
    result: ShardResult,
    failures: dict[int, list[str]],
) -> None:
    """Write every wanted image of one tar that passes its check, and take its post out of `wanted`."""
    index_of = {post_id: index for index, post_id in enumerate(task.ids.tolist())}
    for post_id, extension, member in order_members(reader, failures):
        if post_id not in wanted:
            continue
        if writer.should_stop():
            raise Stopped
        width, height = task.sizes[index_of[post_id]].tolist()
        known_size = (width, height) if width and height else None
        try:
            image = read_image(reader, member, extension, writer.max_pixels, known_size)
        except ImageRefused as refusal:
            failures.setdefault(post_id, []).append(f"{reader.path.name}: {member.name} {refusal.message}")
            continue
        writer.write_image(post_id, image)
        wanted.discard(post_id)
        result.written += 1
        result.reduced += image.reduced
        result.rewritten += image.rewritten
        result.other_size += known_size is not None and (image.width, image.height) != known_size
        writer.count_done(1)


def read_image(
    reader: TarReader | PlainFiles, member: Member, extension: str, max_pixels: int, known_size: tuple[int, int] | None
) -> CheckedImage:
    """Read and check one member. Raises ImageRefused."""
    if member.size_bytes > LARGEST_FILE_BYTES:
        raise ImageRefused(f"says {member.size_bytes:,} bytes, more than any image here")
    try:
        content = reader.read(member)
    except OSError as error:
        raise ImageRefused(f"cannot be read: {error.strerror}") from error
    if member.sha256 and hashlib.sha256(content).hexdigest() != member.sha256:
        raise ImageRefused("is not what the index beside the tar says: another sha256")
    return check_image(content, extension, max_pixels, known_size)


def explain_missing(task: ShardTask, result: ShardResult) -> str:
    """Why nothing was found for a post of the task."""
    if not task.tars:
        return "no file is named by this id" if task.files else f"there is no {task.pattern}"
    names = name_first([tar.name for tar in task.tars])
    if not result.damaged:
        return f"not in {names}"
    tar, reason = result.damaged[0]
    more = f", and {len(result.damaged) - 1} more are damaged" if len(result.damaged) > 1 else ""
    return f"not in {names}; {Path(tar).name} {reason.removeprefix(f'{tar}: ')}{more}"


def start_process(out: Path, journal_stem: Path, max_pixels: int, stop: EventType, done: Synchronized[int]) -> None:
    """Ready a process of the pool, with a journal of its own."""
    global _writer
    tie_to_parent()

    def count_done(posts: int) -> None:
        with done.get_lock():
            done.value += posts

    _writer = ShardWriter(out, open_journal(journal_stem), max_pixels, stop.is_set, count_done)


def extract_in_process(task: ShardTask) -> ShardResult:
    """Extract a task in a process that start_process has readied."""
    return extract_shard(task, _writer)


_writer: ShardWriter


class PlainFiles:
    """Files of some posts, in the place of an open tar."""

    def __init__(self, files: tuple[Path, ...], wanted: Collection[int]) -> None:
        self.path = files[0].parent
        self.members = [
            Member(str(path), 0, path.stat().st_size if path.exists() else 0)
            for path in files
            if (named := read_id(path.name)) is not None and named[0] in wanted
        ]

    def read(self, member: Member) -> bytes:
        """The file's bytes. Raises OSError."""
        with open_regular(Path(member.name)) as stream:
            return bytes(stream.read())
