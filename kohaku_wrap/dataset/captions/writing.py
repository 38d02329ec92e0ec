"""From a selection and the database to caption files: read, make and write in pieces, and say what changed."""

from __future__ import annotations

import contextlib
import filecmp
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kohaku_wrap.dataset.captions import formats as formats_of
from kohaku_wrap.dataset.captions.columns import ColumnsWriter, EarlierCaptions
from kohaku_wrap.dataset.captions.making import POST_COUNTS, CaptionCounts, make_captions
from kohaku_wrap.dataset.captions.on_disk import CaptionImages, find_images
from kohaku_wrap.dataset.captions.plan import FATES, CaptionPlan, plan_captions
from kohaku_wrap.dataset.captions.quality import NEVER, find_cutoffs
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.selection_file import SelectedPosts, read_selected_posts
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import Progress, blamed_on
from kohaku_wrap.metadata.database import Database
from kohaku_wrap.metadata.filters import RATINGS
from kohaku_wrap.metadata.posts import database_digest
from kohaku_wrap.metadata.relations import RowsOutOfOrder, TagChunk, map_tag_chunks
from kohaku_wrap.metadata.tags import read_tags

FORMATS = ("txt", "cache", "jsonl")
NEED_IMAGES = ("txt", "cache")


class NoImages(KwrapError):
    """A format lists images, and there are none."""


@dataclass(frozen=True)
class Changes:
    """What writing one format did, counted in captions."""

    written: int = 0
    """New or different."""

    unchanged: int = 0
    """There already, word for word."""

    removed: int = 0
    """There before, and no longer selected."""


@dataclass(frozen=True)
class CaptionReport:
    """What `kwrap caption` made."""

    style: str
    """kohaku or hakubooru."""

    dataset: str
    """Whose caption rules."""

    posts: int
    """Captions made: one a selected post."""

    images: int
    """Of these, posts whose verified image is on disk."""

    vanished: int
    """Images that extract wrote and that are no longer there."""

    formats: Mapping[str, Changes]
    """By format, `arrow` included."""

    digest: str
    """Of the rows of captions.arrow; empty without images."""

    tags: Mapping[str, int]
    """Tags of the posts by what became of them."""

    duplicates: int
    """Tags that a post had twice."""

    lacking: Mapping[str, int]
    """Posts without tags, date, rating, favourites, quality or year word."""

    cutoffs: Mapping[str, Mapping[str, int | None]]
    """By rating and percentile the `fav_count` to exceed; None where no post has the rating."""

    sorted_rows: bool
    """True when the relation's rows had to be sorted first."""

    notes: tuple[str, ...] = field(default_factory=tuple)
    """What is worth knowing."""

    @property
    def changes(self) -> Changes:
        """Of the .txt files where they were asked for, else of captions.arrow, else of captions.jsonl."""
        for name in ("txt", "arrow", "jsonl"):
            if name in self.formats:
                return self.formats[name]
        return Changes()


@dataclass(frozen=True)
class Piece:
    """The captions of a stretch of posts in every form that is written."""

    posts: int
    counts: CaptionCounts
    images: slice
    captions: pa.Array
    lines: pa.Buffer | None
    entries: pa.Buffer | None
    texts: tuple[int, int]


@dataclass(frozen=True)
class Work:
    """All that making and writing captions needs, read once."""

    database: Database
    plan: CaptionPlan
    posts: SelectedPosts
    cutoffs: npt.NDArray[np.int64]
    images: CaptionImages | None
    folder: Path
    formats: tuple[str, ...]

    def make_piece(self, chunk: TagChunk) -> Piece:
        """Make the captions of a chunk, write their .txt files, and put the other forms into buffers."""
        captions, counts = make_captions(self.plan, chunk, self.posts, self.cutoffs)
        here = self.images.slice_of(chunk.first, chunk.stop) if self.images else slice(0, 0)
        own = captions
        lines = entries = None
        texts = (0, 0)
        escaped = formats_of.escape_json(captions) if {"jsonl", "cache"} & set(self.formats) else captions
        prefix = formats_of.path_prefix(self.folder)
        if "jsonl" in self.formats:
            lines = self._lines(chunk, here, escaped, prefix)
        if self.images:
            rows = pa.array(self.images.places[here] - chunk.first)
            own = captions.take(rows)
            files = self.images.files.slice(here.start, here.stop - here.start)
            if "cache" in self.formats:
                sizes = self.images.widths[here], self.images.heights[here]
                entries = formats_of.cache_entries(prefix, files, escaped.take(rows), *sizes)
            if "txt" in self.formats:
                texts = formats_of.write_text_files(self.folder, files, own, self.images.has_text[here])
        return Piece(chunk.stop - chunk.first, counts, here, own, lines, entries, texts)

    def _lines(self, chunk: TagChunk, here: slice, escaped: pa.Array, prefix: str) -> pa.Buffer:
        """Every post's line: with its image's own name and size, or with the name that it would have."""
        ids = self.posts.ids[chunk.first : chunk.stop]
        files = formats_of.shard_paths(ids, self.posts.extensions.slice(chunk.first, len(ids)))
        widths, heights = np.zeros(len(ids), dtype=np.int32), np.zeros(len(ids), dtype=np.int32)
        if self.images:
            rows = self.images.places[here] - chunk.first
            widths[rows], heights[rows] = self.images.widths[here], self.images.heights[here]
            source = np.arange(len(ids))
            source[rows] = len(ids) + np.arange(len(rows))
            own = self.images.files.slice(here.start, here.stop - here.start)
            files = pa.concat_arrays([files, own]).take(pa.array(source))
        return formats_of.json_lines(prefix, files, escaped, widths, heights)


def write_captions(
    database: Database,
    selection: Path,
    folder: Path,
    recipe: CaptionRecipe,
    formats: Sequence[str],
    dataset: str = "",
    threads: int = 1,
    on_progress: Progress | None = None,
) -> CaptionReport:
    """Write the captions of a selection into the image folder in `formats`, and captions.arrow with them.

    Files that are right already are left alone; the others appear whole or not at all. Text files are finished one
    by one, so an interrupted call can simply be repeated. Raises NoImages when only formats that list images are
    asked for and there are none.
    """
    posts = read_selected_posts(selection, "dateutil" if recipe.style == "hakubooru" else "iso")
    images = find_images(folder, posts.ids)
    notes = []
    if not images:
        without = "nothing was extracted into" if images is None else "none of the selected images is in"
        if not set(formats) - set(NEED_IMAGES):
            raise NoImages(
                f"{folder}: {without} this folder, and {' and '.join(formats)} list images on disk",
                f"Run `kwrap extract {selection} --tars TARS --out {folder}` first, or ask for --format jsonl.",
            )
        notes.append(f"{without} {folder}: only captions.jsonl was written; run `kwrap extract`, then this again")
        formats = [name for name in formats if name not in NEED_IMAGES]
        images = None
    if posts.about.get("db_digest") not in (None, database_digest(database)):
        notes.append("the database is not the one that the selection was made from")
    tags = read_tags(database)
    plan = plan_captions(recipe, tags)
    notes += [f"the recipe names {name!r}, which fits no tag of the database" for name in plan.unused]
    cutoffs = find_cutoffs(plan.recipe.quality, database, posts)
    work = Work(database, plan, posts, cutoffs, images, folder, tuple(formats))
    folder.mkdir(parents=True, exist_ok=True)

    def read_and_write(spill_folder: Path | None) -> tuple[CaptionCounts, dict[str, Changes], str]:
        pieces = map_tag_chunks(database, tags, posts.ids, work.make_piece, threads, spill_folder)
        return write_pieces(work, pieces, dataset, on_progress)

    try:
        counts, changes, digest = read_and_write(None)
        sorted_rows = False
    except RowsOutOfOrder:
        counts, changes, digest = read_and_write(folder)
        sorted_rows = True
    return CaptionReport(
        style=recipe.style,
        dataset=dataset,
        posts=counts.posts,
        images=len(images) if images else 0,
        vanished=images.vanished if images else 0,
        formats=changes,
        digest=digest,
        tags=dict(zip(FATES, counts.tags.tolist(), strict=True)),
        duplicates=counts.duplicates,
        lacking=dict(zip(POST_COUNTS, counts.lacking.tolist(), strict=True)),
        cutoffs=describe_cutoffs(plan, cutoffs),
        sorted_rows=sorted_rows,
        notes=(*notes, *find_stale_files(folder, formats)),
    )


def write_pieces(
    work: Work, pieces: Iterator[Piece], dataset: str, on_progress: Progress | None
) -> tuple[CaptionCounts, dict[str, Changes], str]:
    """Write all pieces in order; the counts, what changed in each format, and the digest."""
    counts = CaptionCounts()
    images = work.images
    changes: dict[str, Changes] = {}
    same = texts_written = texts_kept = 0
    digest = ""
    earlier = EarlierCaptions(work.folder / formats_of.ARROW_FILE)
    with contextlib.ExitStack() as stack:

        def replace(name: str, file: str, entries: int) -> IO[bytes]:
            def note(is_new: bool) -> None:
                changes[name] = Changes(written=entries) if is_new else Changes(unchanged=entries)

            return stack.enter_context(replace_if_changed(work.folder / file, note))

        lines = replace("jsonl", formats_of.LINES_FILE, len(work.posts)) if "jsonl" in work.formats else None
        cache = replace("cache", formats_of.CACHE_FILE, len(images or ())) if "cache" in work.formats else None
        columns = None
        if images:
            about = {"count": len(images), "dataset": dataset, "style": work.plan.recipe.style}
            stream = replace("arrow", formats_of.ARROW_FILE, len(images))
            columns = stack.enter_context(ColumnsWriter(stream, about))
        first_entry = True
        for piece in pieces:
            counts.add(piece.counts)
            if lines and piece.lines is not None:
                lines.write(piece.lines)
            if cache and piece.entries is not None and piece.entries.size:
                skip = len(formats_of.ENTRY_SEPARATOR) if first_entry else 0
                cache.write(b"{\n" if first_entry else b"")
                cache.write(memoryview(piece.entries)[skip:])
                first_entry = False
            if columns and images:
                here = piece.images
                files = images.files.slice(here.start, here.stop - here.start)
                columns.write(images.ids[here], files, images.widths[here], images.heights[here], piece.captions)
                same += earlier.count_same(images.ids[here], piece.captions)
            texts_written += piece.texts[0]
            texts_kept += piece.texts[1]
            if on_progress:
                on_progress(counts.posts, len(work.posts))
        if cache:
            cache.write(b"{}\n" if first_entry else b"\n}\n")
        digest = columns.digest if columns else ""
    if images:
        gone = earlier.files_gone(images.ids)
        if columns:
            changes["arrow"] = Changes(len(images) - same, same, len(gone))
        if "txt" in work.formats:
            changes["txt"] = Changes(texts_written, texts_kept, remove_text_files(work.folder, gone))
    return counts, changes, digest


@contextlib.contextmanager
def replace_if_changed(path: Path, note: Callable[[bool], None]) -> Iterator[IO[bytes]]:
    """Write a file whole or not at all, and leave the one that is there alone where it has the same bytes.

    `note` is told whether the file is a new one.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with blamed_on(path, part), part.open("w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if path.is_file() and filecmp.cmp(part, path, shallow=False):
            part.unlink()
            note(False)
        else:
            part.replace(path)
            note(True)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def remove_text_files(folder: Path, files: Sequence[str]) -> int:
    """Remove the .txt of images that are no longer captioned; how many there were."""
    removed = 0
    for name in files:
        path = (folder / name).with_suffix(".txt")
        if path.is_file():
            path.unlink()
            removed += 1
    return removed


def find_stale_files(folder: Path, formats: Sequence[str]) -> Iterator[str]:
    """Files of other formats that lie there from an earlier call and were not written now."""
    for name, file in (("cache", formats_of.CACHE_FILE), ("jsonl", formats_of.LINES_FILE)):
        if name not in formats and (folder / file).exists():
            yield f"{folder / file} is from an earlier call; add {name} to --format to bring it up to date"


def describe_cutoffs(plan: CaptionPlan, cutoffs: npt.NDArray[np.int64]) -> dict[str, dict[str, int | None]]:
    """The cut-offs by the names of ratings and percentiles."""
    return {
        rating: {
            str(percentile): None if cutoffs[row, column] == NEVER else int(cutoffs[row, column])
            for column, percentile in enumerate(plan.recipe.quality.percentiles)
        }
        for row, rating in enumerate(RATINGS)
    }
