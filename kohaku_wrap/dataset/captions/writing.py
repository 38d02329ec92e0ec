"""From a selection and the database to caption files: read, make and write in pieces, and say what changed."""

from __future__ import annotations

import contextlib
import filecmp
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import pyarrow as pa

from kohaku_wrap.dataset.captions import formats as formats_of
from kohaku_wrap.dataset.captions.earlier import EarlierCaptions
from kohaku_wrap.dataset.captions.folder import lock_captions
from kohaku_wrap.dataset.captions.hakubooru import hakubooru_recipe
from kohaku_wrap.dataset.captions.making import POST_COUNTS, CaptionCounts
from kohaku_wrap.dataset.captions.on_disk import CaptionImages, find_images
from kohaku_wrap.dataset.captions.pieces import Piece, Work, mix_once
from kohaku_wrap.dataset.captions.plan import FATES, plan_captions
from kohaku_wrap.dataset.captions.post_relations import gather_relations, read_parents
from kohaku_wrap.dataset.captions.posts_summary import summarise_posts
from kohaku_wrap.dataset.captions.quality import find_cutoffs
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.captions.report import (
    CaptionReport,
    Changes,
    describe_cutoffs,
    describe_texts,
    find_stale_files,
)
from kohaku_wrap.dataset.captions.summary import CaptionSummary, Seen
from kohaku_wrap.dataset.captions.text_table import NoTexts, TextCounts, TextTable
from kohaku_wrap.dataset.captions.tokens import CountTokens, estimate_tokens
from kohaku_wrap.dataset.images.extracted import EXTRACTED_FILE, IMPORTED_FILE, refuse_other_kind
from kohaku_wrap.dataset.selection_file import read_selected_posts
from kohaku_wrap.errors import DAMAGE, KwrapError, command_line
from kohaku_wrap.file_hashes import sha256_of_file
from kohaku_wrap.files import Progress, blamed_on, unheard
from kohaku_wrap.formats.caption_rows import CAPTIONS_FILE, NoImages, read_batches
from kohaku_wrap.formats.caption_writer import ColumnsWriter
from kohaku_wrap.formats.data_summary import write_summary
from kohaku_wrap.formats.relations import write_relations
from kohaku_wrap.metadata.chunks import RowsOutOfOrder
from kohaku_wrap.metadata.parallel import map_in_order
from kohaku_wrap.metadata.relations import map_tag_chunks
from kohaku_wrap.metadata.source import Source
from kohaku_wrap.metadata.tags import read_tags

FORMATS = ("txt", "cache", "jsonl")
NEED_IMAGES = ("txt", "cache")
WITHOUT = ("none of the selected images is in", "nothing was extracted into")


def write_captions(
    database: Source,
    selection: Path,
    folder: Path,
    recipe: CaptionRecipe,
    formats: Sequence[str],
    dataset: str = "",
    threads: int = 1,
    on_progress: Progress = unheard,
    texts: TextTable | None = None,
    count_tokens: CountTokens = estimate_tokens,
    made_by: str = "",
) -> CaptionReport:
    """Write the captions of a selection into the image folder in `formats`, and captions.arrow with them.

    Files that are right already are left alone; the others appear whole or not at all. Text files are finished one
    by one, so an interrupted call can simply be repeated. Raises NoImages when only formats that list images are
    asked for and there are none, OtherKind for a folder of own images, CaptionsBusy while another call writes in it.
    `texts`: natural-language captions as one more group, whose tokens are counted by `count_tokens`; raises NoTexts
    where the style has no place. `made_by`: the command, as the page of a run shows it.
    """
    refuse_other_kind(folder, IMPORTED_FILE)
    recipe = recipe.with_text(texts is not None)
    if texts and recipe.style == "hakubooru":
        raise NoTexts("the style hakubooru has no place for texts", "Leave --text out, or use --style kohaku.")
    recipe = hakubooru_recipe() if recipe.style == "hakubooru" else recipe
    posts = read_selected_posts(selection, "dateutil" if recipe.style == "hakubooru" else "iso")
    notes = []
    with ThreadPoolExecutor(2) as pool:
        finding = pool.submit(find_images, folder, posts.ids)
        if set(formats) <= set(NEED_IMAGES) and not finding.result():
            extract = command_line("extract", selection, "--tars", "TARS", "--out", folder)
            raise NoImages(
                f"{folder}: {WITHOUT[finding.result() is None]} this folder, and {' and '.join(formats)} list images "
                "on disk",
                f"Run `{extract}` first, or ask for --format jsonl.",
            )
        cutting = pool.submit(find_cutoffs, recipe.quality, database, posts)
        has_images = (folder / EXTRACTED_FILE).is_file()
        relating = pool.submit(read_parents, database, posts.ids) if has_images else None
        tags = read_tags(database, posts.ids, folder)
        plan = plan_captions(recipe, tags)
        cutoffs, images = cutting.result(), finding.result()
    if not images:
        without = f"{WITHOUT[images is None]} {folder}"
        notes.append(f"{without}: only captions.jsonl was written; run `kwrap extract`, then this again")
        formats = [name for name in formats if name not in NEED_IMAGES]
        images = None
    if posts.about.get("db_digest") not in (None, database.digest()):
        notes.append("the database is not the one that the selection was made from")
    notes += [f"the recipe names {name!r}, which fits no tag of the database" for name in plan.unused]
    seen_of = CaptionSummary(len(images)) if images else None
    work = Work(database, plan, posts, cutoffs, images, folder, tuple(formats), texts, count_tokens, seen_of)
    about = {
        "dataset": dataset,
        "style": plan.recipe.style,
        "prompt_format": plan.recipe.prompt_format,
        "selection_sha256": sha256_of_file(selection),
    }

    def read_and_write(spill_folder: Path | None) -> Written:
        pieces = map_tag_chunks(database, tags, posts.ids, work.make_piece, threads, spill_folder)
        return write_pieces(work, pieces, about, on_progress)

    with lock_captions(folder):
        try:
            written = read_and_write(None)
            sorted_rows = False
        except RowsOutOfOrder:
            written = read_and_write(folder)
            sorted_rows = True
    if images and written.digest:
        with contextlib.suppress(KwrapError, *DAMAGE):  # what is only shown fails no captions
            if seen_of:
                seen = seen_of, written.seen
                summary = summarise_posts(database, plan, posts, images, seen, selection, folder, made_by)
                write_summary(folder, written.digest, summary)
        parents = relating.result()[images.places] if relating else read_parents(database, images.ids)
        write_relations(folder, gather_relations(selection, images.ids, parents))
    counts = written.counts
    if texts:
        notes += describe_texts(texts, written.text_counts, posts=counts.posts)
    return CaptionReport(
        style=recipe.style,
        dataset=dataset,
        posts=counts.posts,
        images=len(images) if images else 0,
        vanished=images.vanished if images else 0,
        formats=written.changes,
        digest=written.digest,
        texts=written.text_counts.as_document(texts is not None),
        tags=dict(zip(FATES, counts.tags.tolist(), strict=True)),
        duplicates=counts.duplicates,
        lacking=dict(zip(POST_COUNTS, counts.lacking.tolist(), strict=True)),
        cutoffs=describe_cutoffs(plan, cutoffs),
        sorted_rows=sorted_rows,
        notes=(*notes, *find_stale_files(folder, formats, images)),
    )


@dataclass
class Written:
    """What was counted while all pieces were written, what changed in each format, and the digest of captions.arrow."""

    counts: CaptionCounts
    text_counts: TextCounts
    changes: dict[str, Changes]
    digest: str = ""
    seen: list[Seen] = field(default_factory=list)


def write_pieces(work: Work, pieces: Iterator[Piece], about: Mapping[str, str], on_progress: Progress) -> Written:
    """Write all pieces in order."""
    counts, text_counts = CaptionCounts(), TextCounts()
    images = work.images
    changes: dict[str, Changes] = {}
    seen: list[Seen] = []
    same = 0
    digest = ""
    earlier = EarlierCaptions(work.folder / CAPTIONS_FILE)
    with contextlib.ExitStack() as stack:

        def replace(name: str, file: str, entries: int) -> IO[bytes]:
            return stack.enter_context(replace_if_changed(work.folder / file, changes, name, entries))

        lines = replace("jsonl", formats_of.LINES_FILE, len(work.posts)) if "jsonl" in work.formats else None
        cache = replace("cache", formats_of.CACHE_FILE, len(images or ())) if "cache" in work.formats else None
        columns = None
        if images:
            stream = replace("arrow", CAPTIONS_FILE, len(images))
            shares = asdict(work.plan.recipe.text) if work.texts else None
            columns = stack.enter_context(ColumnsWriter(stream, {"count": len(images), **about}, text_shares=shares))
        first_entry = True
        for piece in pieces:
            counts.add(piece.counts)
            text_counts.add(piece.text_counts)
            seen += [piece.seen] if piece.seen else []
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
                sizes = images.widths[here], images.heights[here]
                columns.write(images.ids[here], files, *sizes, piece.captions, *(piece.texts or ()))
                same += earlier.count_same(images.ids[here], piece.captions, piece.texts and piece.texts[0])
            on_progress(counts.posts, len(work.posts))
        if cache:
            cache.write(b"{}\n" if first_entry else b"\n}\n")
        if columns and images:
            columns.finish()
            digest = columns.digest
            gone = earlier.files_gone(images.ids)
            if "txt" in work.formats:
                # Before captions.arrow is replaced, which knows the texts that an earlier call wrote.
                written, kept = write_texts(work, images, Path(stream.name), on_progress)
                changes["txt"] = Changes(written, kept, remove_text_files(work.folder, gone))
    if images:
        changes["arrow"] = Changes(len(images) - same, same, len(gone))
    return Written(counts, text_counts, changes, digest, seen)


def write_texts(work: Work, images: CaptionImages, columns: Path, on_progress: Progress) -> tuple[int, int]:
    """Write the .txt files of the captions in a finished `captions.arrow`; how many were written and how many kept.

    One thread does it after all captions are made: beside other threads it would wait for the interpreter's lock
    after each of its many short system calls. The file is read in pieces and not mapped, so memory stays small.
    """
    starts = [0]
    names = ("file", "caption", *(("id", "text", "text_at") if work.texts else ()))

    def write_batch(batch: pa.RecordBatch) -> tuple[int, int]:
        start = starts[-1]
        starts.append(start + batch.num_rows)
        has_text = images.has_text[start : starts[-1]]
        captions = batch["caption"]
        if work.texts:
            ids, places = batch["id"].to_numpy(), batch["text_at"].to_numpy()
            own = captions.cast(pa.string()), batch["text"].cast(pa.string())
            captions = mix_once(work.plan.recipe.text, ids, *own, places)
        return formats_of.write_text_files(work.folder, batch["file"], captions, has_text)

    written = kept = 0
    for wrote, left in map_in_order(write_batch, read_batches(columns, *names), 1):
        written, kept = written + wrote, kept + left
        on_progress(written + kept, len(images))
    return written, kept


@contextlib.contextmanager
def replace_if_changed(path: Path, changes: dict[str, Changes], name: str, entries: int) -> Iterator[IO[bytes]]:
    """Write a file whole or not at all, and leave the one that is there alone where it has the same bytes.

    Its number of `entries` is noted in `changes` under the name of its format.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with blamed_on(path, part), part.open("w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if path.is_file() and filecmp.cmp(part, path, shallow=False):
            part.unlink()
            changes[name] = Changes(unchanged=entries)
        else:
            part.replace(path)
            changes[name] = Changes(written=entries)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def remove_text_files(folder: Path, files: Sequence[str]) -> int:
    """Remove the .txt of images that are no longer captioned; how many there were."""
    there = [path for name in files if (path := (folder / name).with_suffix(".txt")).is_file()]
    for path in there:
        path.unlink()
    return len(there)
