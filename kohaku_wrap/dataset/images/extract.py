"""Images out of tars into numbered folders: found by id, decoded, verified, and never lost count of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import pyarrow as pa

from kohaku_wrap.arrays import Int32Array, Int64Array
from kohaku_wrap.dataset.images.extract_report import ExtractReport, write_report
from kohaku_wrap.dataset.images.extract_shard import (
    PART_SUFFIX,
    ShardResult,
    ShardTask,
    ShardWriter,
    extract_in_process,
    extract_shard,
    open_journal,
    start_process,
)
from kohaku_wrap.dataset.images.extracted import (
    IMPORTED_FILE,
    JournalFolder,
    drop_absent_files,
    merge_rows,
    read_extracted,
    refuse_other_kind,
    take_ids,
    write_extracted,
)
from kohaku_wrap.dataset.images.pool import count_processes, run_in_pool
from kohaku_wrap.dataset.images.tar_layouts import FOLDERS, TarFolder, find_tars
from kohaku_wrap.dataset.selection_file import AGAIN, BadSelection, open_selection, take_numbers
from kohaku_wrap.errors import refusing
from kohaku_wrap.files import Progress, unheard
from kohaku_wrap.metadata.places import NOWHERE, find_places
from kohaku_wrap.processes import safe_children


@dataclass(frozen=True)
class SelectedImages:
    """What the extraction needs of a selection."""

    ids: Int64Array
    """(posts,) ascending."""

    sizes: Int32Array
    """(posts, 2): width and height after the database, 0 where unknown."""


def read_selected_images(path: Path) -> SelectedImages:
    """Ids and original sizes of the selection at `path`. Raises BadSelection."""
    damaged = refusing(BadSelection, f"{path}: not a selection:", AGAIN, pa.ArrowException)
    with damaged, open_selection(path, ("id",)) as file:
        names = set(file.schema_arrow.names)
        columns = [name for name in ("id", "image_width", "image_height") if name in names]
        table = file.read(columns=columns)
    if not table.num_rows:
        raise BadSelection(f"{path}: no posts in it", AGAIN)
    ids = take_numbers(path, "id", table["id"], least=0)
    order = np.argsort(ids, kind="stable")
    sizes = np.zeros((len(ids), 2), dtype=np.int32)
    for column, name in enumerate(("image_width", "image_height")):
        if name in names:
            sizes[:, column] = take_numbers(path, name, table[name], least=0)
    if len(np.unique(ids)) != len(ids):
        raise BadSelection(f"{path}: an id twice", AGAIN)
    return SelectedImages(ids[order], sizes[order])


def extract_images(
    selection: Path,
    tars: Path,
    images: Path,
    jobs: int | None = None,
    max_pixels: int = 0,
    on_progress: Progress = unheard,
) -> ExtractReport:
    """Extract every image of the selection that is not there yet, verify it, and record what is verified.

    `jobs`: processes, by default one a core. `max_pixels`: reduce larger images; 0 keeps all as they are.
    Writes images/NNNN/ID.ext, images/extracted.parquet and images/extract-report.json. Can be stopped at any
    moment: what was written is found again. The caller decides with ExtractReport.check what is too little.
    Raises BadSelection, NoTars, SeveralSites, FolderBusy, ExtractedUnreadable, OtherKind, WorkerDied.
    """
    refuse_other_kind(images, IMPORTED_FILE)
    selected = read_selected_images(selection)
    folder = find_tars(tars)
    journals = JournalFolder.open(images)
    finished = False
    try:
        known = merge_rows(read_extracted(images), journals.read())
        if any(journals.path.glob("*.csv")):
            remove_parts(images)
        tasks = make_tasks(selected, folder, known, max_pixels)
        processes = count_processes(jobs, len(selected.ids))
        work = Extraction(images, journals.next_stem(), max_pixels, len(selected.ids), on_progress)
        report = ExtractReport(images=images, selected=len(selected.ids))
        for result in work.run_here(tasks) if processes == 1 else work.run_in_pool(tasks, processes):
            report.add(result)
        report.sort()
        lacking = np.array([post_id for post_id, _ in (*report.missing, *report.corrupt)], dtype=np.int64)
        others = drop_absent_files(take_ids(known, selected.ids, invert=True), images)
        verified = merge_rows(take_ids(known, selected.ids), journals.read())
        verified = take_ids(verified, lacking, invert=True)
        report.not_looked_at = verified["rewritten"].null_count
        verified = merge_rows(verified, others)
        write_extracted(images, verified, {"images": verified.num_rows, "max_pixels": max_pixels})
        write_report(report, selection, tars, max_pixels)
        finished = True
    finally:
        journals.close(finished)
    return report


def make_tasks(selected: SelectedImages, folder: TarFolder, known: pa.Table, max_pixels: int) -> Iterator[ShardTask]:
    """One task for all posts of the same tars: of one id modulo 1000, or of one range; made as they are asked for."""
    pixels = known["width"].to_numpy().astype(np.int64) * known["height"].to_numpy()
    limits = known["max_pixels"].to_numpy()
    as_they_came = (limits == 0) & ((max_pixels == 0) | (pixels <= max_pixels))
    usable = known.filter(pa.array(as_they_came | (limits == max_pixels)))
    usable_ids = usable["id"].to_numpy()
    files, bytes_of = usable["file"], usable["size_bytes"]
    groups = folder.groups_of(selected.ids)
    order = np.argsort(groups, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        ids = selected.ids[rows]
        group, shards = int(groups[rows[0]]), set((ids % FOLDERS).tolist())
        at = find_places(usable_ids, ids)
        at = at[at != NOWHERE]
        found = zip(usable_ids[at].tolist(), files.take(at).to_pylist(), bytes_of.take(at).to_pylist(), strict=True)
        yield ShardTask(
            tars=folder.tars_of(group, shards),
            ids=ids,
            sizes=selected.sizes[rows],
            known={post_id: (file, size_bytes) for post_id, file, size_bytes in found},
            pattern=folder.expect(group),
            files=folder.files_of(shards),
        )


@dataclass
class Extraction:
    """How the tasks of one extraction are run."""

    images: Path
    """The image folder."""

    journal_stem: Path
    """How this run's journals begin."""

    max_pixels: int
    """Larger images are reduced; 0 for no limit."""

    total: int
    """Posts in all."""

    on_progress: Progress
    """Told the posts that are settled."""

    done: int = 0
    """Posts that are settled."""

    def run_here(self, tasks: Iterable[ShardTask]) -> Iterator[ShardResult]:
        """Run the tasks in this process, one after another."""
        with open_journal(self.journal_stem) as journal:
            writer = ShardWriter(self.images, journal, self.max_pixels, lambda: False, self.count_done)
            for task in tasks:
                yield extract_shard(task, writer)

    def count_done(self, posts: int) -> None:
        """Add settled posts and tell so."""
        self.done += posts
        self.on_progress(self.done, self.total)

    def run_in_pool(self, tasks: Iterable[ShardTask], processes: int) -> Iterator[ShardResult]:
        """Run the tasks in `processes` processes; an interrupt or a failure ends them after the image at hand.

        Raises WorkerDied when one of them is killed.
        """
        context = get_context("spawn")
        with safe_children():
            stop, done = context.Event(), context.Value("q", 0)
        settings = (self.images, self.journal_stem, self.max_pixels, stop, done)
        count = partial(self._count_up_to, done)
        return run_in_pool(extract_in_process, tasks, processes, start_process, settings, count, stop.set)

    def _count_up_to(self, done: Synchronized[int]) -> None:
        """Add what all processes have settled since the last look."""
        self.count_done(done.value - self.done)


def remove_parts(images: Path) -> None:
    """Remove what a killed run left half-written under temporary names."""
    for folder in images.glob("[0-9][0-9][0-9][0-9]"):
        with os.scandir(folder) as entries:
            parts = [entry.path for entry in entries if entry.name.startswith(".") and entry.name.endswith(PART_SUFFIX)]
        for part in parts:
            Path(part).unlink(missing_ok=True)
