"""`kwrap import`: folders that one has become an image folder with captions that both engines train from."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.dataset.captions.folder import lock_captions
from kohaku_wrap.dataset.captions.summary import summarise_captions
from kohaku_wrap.dataset.images.extract_shard import PART_SUFFIX
from kohaku_wrap.dataset.images.extracted import EXTRACTED_FILE, refuse_other_kind
from kohaku_wrap.dataset.images.tars import Refusal
from kohaku_wrap.dataset.own.folders import Found, NamesCollide, NothingToImport, find_sources, make_id, normalise, scan
from kohaku_wrap.dataset.own.images import (
    JOURNAL_FILE,
    ImageTask,
    ImportedImage,
    check_images,
    is_kept,
    read_imported,
    write_imported,
)
from kohaku_wrap.dataset.own.report import ImportReport, describe_images, describe_sources, write_report
from kohaku_wrap.dataset.own.texts import Texts, read_texts
from kohaku_wrap.dataset.own.writing import read_earlier, write_columns
from kohaku_wrap.errors import UsageError
from kohaku_wrap.files import Progress, unheard
from kohaku_wrap.formats.caption_rows import NoImages
from kohaku_wrap.formats.data_summary import write_summary
from kohaku_wrap.wording import count_of


class OtherFolder(NamesCollide):
    """A label of the image folder is that of another folder."""


@dataclass(frozen=True)
class ImportOptions:
    """How folders are imported."""

    labels: Sequence[str] = ()
    """One a folder, in their order; none for their names."""

    captions: str = ""
    """Where captions come from: an ending or a file; empty to take what is there."""

    text_column: str = ""
    """Of tables of captions."""

    plain: bool = False
    """Take N_name folders as folders like any other."""

    copy: bool = False
    """Copy images instead of linking them."""

    dry_run: bool = False
    """Check and report, write nothing."""

    dataset: str = ""
    """The set's own name."""

    resolution: int = 1024
    """Of the training, to tell which images are too small."""

    jobs: int | None = None
    """Processes that check images."""

    made_by: str = ""
    """The command, as the page of a run shows it."""


def import_folders(
    arguments: Sequence[Path], images: Path, options: ImportOptions, on_progress: Progress = unheard
) -> ImportReport:
    """Import folders into an image folder; what an earlier call of the same folders placed is kept.

    Writes captions.arrow, metadata_cache.json and import-report.json there. Can be stopped at any moment and called
    again. The caller decides with ImportReport.check what is too little.
    Raises what `find_sources` and `read_texts` refuse, OtherKind, OtherFolder, CaptionsBusy, WorkerDied.
    """
    refuse_other_kind(images, EXTRACTED_FILE)
    sources = find_sources(arguments, options.labels, options.plain, images)
    founds = [scan(source) for source in sources]
    # One of several too: it may be a disk that is not mounted, whose images would count as removed.
    full = {found.source.root for found in founds if found.images}
    empty = [str(root) for root in dict.fromkeys(found.source.root for found in founds) if root not in full]
    if empty or not founds:
        raise NothingToImport(
            f"{', '.join(empty or map(str, arguments))}: no image in there or below",
            "Images end in .png, .jpg, .jpeg, .webp, .bmp, .avif or .jxl.",
        )
    texts = [read_texts(found, options.captions, options.text_column) for found in founds]
    if options.text_column and all(text.are_files for text in texts):
        folder, origin = sources[0].folder, texts[0].origin
        why = f"the captions of {folder} are {origin}" if texts[0].of_image else f"{folder} has no table of captions"
        raise UsageError(
            f"--text-column does nothing here: {why}", "Leave it out, or name the table with --captions FILE."
        )
    if options.dry_run:
        return run_import(founds, texts, images, options, on_progress)
    with lock_captions(images):
        was_killed = (images / JOURNAL_FILE).is_file()
        report = run_import(founds, texts, images, options, on_progress)
        if was_killed:  # At the end, when the processes of that import are gone, too; those of this one have ended.
            clear_parts(images)
        with suppress(OSError, NoImages):  # what is only shown fails no import
            made_by = {"import": options.made_by}
            write_summary(images, report.digest, {**summarise_captions(images, {}), "made_by": made_by})
    return report


def clear_parts(images: Path) -> None:
    """Remove the half-written files that processes of a killed import left; the folder is ours alone."""
    for part in images.rglob(f".*{PART_SUFFIX}"):
        if part.name.split(".")[-2].isdecimal():
            part.unlink(missing_ok=True)


def run_import(
    founds: Sequence[Found], texts: Sequence[Texts], images: Path, options: ImportOptions, on_progress: Progress
) -> ImportReport:
    """Check, place and write; the folder is ours alone."""
    known = read_imported(images) if images.is_dir() else {}
    about, earlier = read_earlier(images)
    labels = {normalise(found.source.label): found.source.root.resolve() for found in founds}
    refuse_other_folders(known.values(), labels, images)
    report = ImportReport(images, options.dataset or str(about.get("dataset", "")) or "+".join(labels))
    tasks, captions = list_tasks(founds, texts, report)
    kept = {task.id for task in tasks if task.id in known and is_kept(known[task.id], task, images, options.copy)}
    now = {id: known[id] for id in kept}
    todo = [task for task in tasks if task.id not in kept]
    for result in check_images(todo, images, options.copy, options.dry_run, options.jobs, on_progress):
        if isinstance(result, Refusal):
            report.lists["corrupt"].append({"image": result.name, "reason": result.reason})
        else:
            now[result.id] = result
            report.written += 1
    refuse_same_files(now.values())
    others = {id: image for id, image in known.items() if image.label not in labels and id in earlier}
    report.kept, report.others, report.total = len(kept), len(others), len(now) + len(others)
    report.removed = sum(image.label in labels and id not in now for id, image in known.items())
    here = {image.source for image in now.values()}
    lost = Counter(image.label for image in others.values() if not (images / image.file).exists())
    report.notes += [
        f"{images}: the files of {count_of(number, 'image')} of the label {label!r} are no longer there. "
        "Put them back before you train; or, where the folder has another name now, import it into a new folder with "
        f"{shlex.join(('--label', label))}, which keeps the ids"
        for label, number in sorted(lost.items())
    ]
    report.notes += [
        f"{images}: these files lie there under the label {label!r} too, and are trained twice; import them into a new "
        "folder to have them once"
        for label in sorted({image.label for image in others.values() if image.source in here})
    ]
    describe_images(report, now, options.resolution)
    describe_sources(report, founds, texts, now, captions)
    if options.dry_run:
        return report
    everything = dict(sorted({**others, **now}.items()))
    if everything:
        subsets = [found.source.subset for found in founds]
        report.digest = write_columns(images, everything, {**earlier, **captions}, subsets, report.dataset)
    write_imported(images, everything.values())
    used = {image.file for image in everything.values()}
    for image in known.values():
        if image.file not in used:
            (images / image.file).unlink(missing_ok=True)
    write_report(report)
    return report


def refuse_other_folders(known: Iterable[ImportedImage], labels: dict[str, Path], images: Path) -> None:
    """Raise OtherFolder where a label was another folder's, which is still there; a moved one keeps its ids."""
    seen: set[Path] = set()
    for image in known:
        if image.label not in labels:
            continue
        root = Path(image.source).parents[image.path.count("/")]  # The disk may spell the path otherwise: NFD.
        if root in seen:
            continue
        seen.add(root)
        if root.resolve() != labels[image.label] and root.is_dir():
            raise OtherFolder(
                f"{images}: the label {image.label!r} is that of {root}, not of {labels[image.label]}",
                "Give this folder another label: --label NAME.",
            )


def list_tasks(
    founds: Sequence[Found], texts: Sequence[Texts], report: ImportReport
) -> tuple[list[ImageTask], dict[int, str]]:
    """The images to check and their captions by id. Raises NamesCollide for equal ids."""
    tasks: dict[int, ImageTask] = {}
    captions: dict[int, str] = {}
    for found, text in zip(founds, texts, strict=True):
        source = found.source
        report.found += len(found.images)
        report.lists["corrupt"] += [
            {"image": name, "reason": "its name is no UTF-8 text: rename it"} for name in found.unnamed
        ]
        refused = set(text.not_utf8)
        report.lists["not_utf8"] += [
            {"image": str((source.folder / image).absolute()), "reason": "its caption is not UTF-8: save it as UTF-8"}
            for image in text.not_utf8
        ]
        report.lists["missing"] += [{"image": name, "reason": f"named in {text.origin}"} for name in text.missing]
        for image in found.images:
            if image in refused:
                continue
            path = found.path_below_root(image)
            id = make_id(source.label, path)
            place = str((source.folder / image).absolute())
            if id in tasks:
                raise NamesCollide(f"{tasks[id].source} and {place} have the same name", "Rename one of them.")
            name = normalise(f"{source.subset.name}/{image}")
            tasks[id] = ImageTask(id, normalise(source.label), path, normalise(source.subset.name), place, name)
            captions[id] = text.of_image.get(image) or (source.class_text or "")
    return list(tasks.values()), captions


def refuse_same_files(now: Iterable[ImportedImage]) -> None:
    """Raise NamesCollide where two images would be one file of the image folder."""
    of_file: dict[str, ImportedImage] = {}
    for image in now:
        other = of_file.setdefault(image.file, image)
        if other.id != image.id:
            raise NamesCollide(f"{other.source} and {image.source} would both be {image.file}", "Rename one of them.")
