"""`kwrap import`: folders that one has become an image folder with captions that both engines train from."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.dataset.captions import formats
from kohaku_wrap.dataset.captions.folder import lock_captions
from kohaku_wrap.dataset.images.extracted import EXTRACTED_FILE
from kohaku_wrap.dataset.own.folders import (
    Found,
    NamesCollide,
    NothingToImport,
    Source,
    find_sources,
    make_id,
    normalise,
    scan,
)
from kohaku_wrap.dataset.own.images import (
    ImageTask,
    ImportedImage,
    Refusal,
    check_images,
    is_kept,
    read_imported,
    write_imported,
)
from kohaku_wrap.dataset.own.texts import Texts, read_texts
from kohaku_wrap.errors import KwrapError, UsageError
from kohaku_wrap.files import Progress, atomic_write, write_text
from kohaku_wrap.formats.caption_rows import (
    CAPTIONS_FILE,
    DIGITS_OF_KEPT,
    ColumnsWriter,
    Int32Array,
    NoImages,
    Subset,
    open_captions,
    read_about,
    read_subsets,
)

SEPARATOR = "|||"
TRIGGER_SHARE = 0.9
"""Of a subset's captions that begin with one tag, from which on it counts as a trigger word."""


class NotAnImport(UsageError):
    """The image folder holds posts of a selection."""


class OtherFolder(NamesCollide):
    """A label of the image folder is that of another folder."""


@dataclass
class ImportReport:
    """What became of the images and captions of the folders."""

    images: Path
    """The image folder."""

    dataset: str
    """The imported set's name."""

    found: int = 0
    """Images in the folders."""

    written: int = 0
    """Checked and placed now."""

    kept: int = 0
    """There already from an earlier call."""

    linked: int = 0
    """Of all, links to the file that one has."""

    copied: int = 0
    """Of all, copies as they came."""

    rewritten: int = 0
    """Of all, pictures made anew for training: turned upright, laid on white or scaled to 8 bits."""

    removed: int = 0
    """Images of earlier calls that are no longer in these folders."""

    others: int = 0
    """Images of other folders, from earlier calls."""

    total: int = 0
    """Rows of captions.arrow."""

    digest: str = ""
    """Of these rows."""

    subsets: list[dict[str, Any]] = field(default_factory=list)
    """Name, images, repeats, options and where captions come from, of each subset of these folders."""

    lists: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    """By name, what a person should look at."""

    other_files: dict[str, int] = field(default_factory=dict)
    """Files that are neither images nor captions, by ending."""

    notes: list[str] = field(default_factory=list)
    """What is worth knowing."""

    def count(self, name: str) -> int:
        """The length of a list."""
        return len(self.lists[name])

    def check(self, max_missing: int) -> None:
        """Raise ImportLacking when more than `max_missing` images are missing or were refused, or all of them."""
        faults = {name: self.count(name) for name in ("missing", "corrupt", "not_utf8")}
        lacking = sum(faults.values())
        if lacking <= max_missing and self.total:
            return
        first = next(entry for name in faults for entry in self.lists[name])
        allow = f", or allow them with --max-missing {lacking}" if self.total else ""
        raise ImportLacking(
            f"of {self.found:,} images {faults['corrupt']:,} are no whole still image, {faults['not_utf8']:,} have a "
            f"caption that is not UTF-8, and {faults['missing']:,} more are named and not there; the first is "
            f"{first['image']}: {first['reason']}",
            f"{self.images / REPORT_FILE} lists them all. Fix them and run the same command again{allow}.",
        )


REPORT_FILE = "import-report.json"
LISTS = (
    "missing", "corrupt", "not_utf8", "without_caption", "empty_caption", "several_lines", "shared_text", "doubles",
    "similar", "too_small",
)  # fmt: skip
"""What the report lists, the gravest first."""


class ImportLacking(KwrapError):
    """More images are missing or refused than was allowed."""


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


def import_folders(
    arguments: Sequence[Path], images: Path, options: ImportOptions, on_progress: Progress | None = None
) -> ImportReport:
    """Import folders into an image folder; what an earlier call of the same folders placed is kept.

    Writes captions.arrow, metadata_cache.json and import-report.json there. Can be stopped at any moment and called
    again. The caller decides with ImportReport.check what is too little.
    Raises what `find_sources` and `read_texts` refuse, NotAnImport, OtherFolder, CaptionsBusy, WorkerDied.
    """
    if (images / EXTRACTED_FILE).exists():
        raise NotAnImport(f"{images}: holds posts of a selection", "Give --out a folder of its own.")
    sources = find_sources(arguments, options.labels, options.plain, images)
    founds = [scan(source) for source in sources]
    if not any(found.images for found in founds):
        raise NothingToImport(
            f"{', '.join(str(path) for path in arguments)}: no image in there or below",
            "Images end in .png, .jpg, .jpeg, .webp, .bmp, .avif or .jxl.",
        )
    texts = [read_texts(found, options.captions, options.text_column) for found in founds]
    if options.dry_run:
        return run_import(founds, texts, images, options, on_progress)
    with lock_captions(images):
        return run_import(founds, texts, images, options, on_progress)


def run_import(
    founds: Sequence[Found], texts: Sequence[Texts], images: Path, options: ImportOptions, on_progress: Progress | None
) -> ImportReport:
    """Check, place and write; the folder is ours alone."""
    known = read_imported(images) if images.is_dir() else {}
    labels = {normalise(found.source.label): found.source.root.resolve() for found in founds}
    refuse_other_folders(known.values(), labels, images)
    report = ImportReport(images, options.dataset or earlier_name(images) or "+".join(labels))
    tasks, captions = list_tasks(founds, texts, report)
    kept = {task.id: known[task.id] for task in tasks if task.id in known}
    kept = {
        task.id: kept[task.id]
        for task in tasks
        if task.id in kept and is_kept(kept[task.id], task, images, options.copy)
    }
    now = dict(kept)
    todo = [task for task in tasks if task.id not in kept]
    for result in check_images(todo, images, options.copy, options.dry_run, options.jobs, on_progress):
        if isinstance(result, Refusal):
            report.lists["corrupt"].append({"image": result.source, "reason": result.reason})
        else:
            now[result.id] = result
            report.written += 1
    refuse_same_files(now.values())
    others = {id: image for id, image in known.items() if image.label not in labels}
    report.kept, report.others, report.total = len(kept), len(others), len(now) + len(others)
    report.removed = sum(image.label in labels and id not in now for id, image in known.items())
    describe_images(report, now, captions, options)
    describe_sources(report, founds, texts, now, captions)
    if options.dry_run:
        return report
    earlier = read_earlier(images)
    captions |= {id: earlier[id] for id in others if id in earlier}
    everything = {id: image for id, image in sorted({**now, **others}.items()) if id in captions}
    if everything:
        report.digest = write_columns(images, everything, captions, [found.source.subset for found in founds], report)
    write_imported(images, everything.values())
    used = {image.file for image in everything.values()}
    for image in known.values():
        if image.file not in used:
            (images / image.file).unlink(missing_ok=True)
    return report


def earlier_name(images: Path) -> str:
    """The name that an earlier import gave the set."""
    try:
        return str(read_about(open_captions(images).schema).get("dataset", ""))
    except NoImages:
        return ""


def refuse_other_folders(known: Iterable[ImportedImage], labels: dict[str, Path], images: Path) -> None:
    """Raise OtherFolder where a label was another folder's, which is still there; a moved one keeps its ids."""
    seen: set[Path] = set()
    for image in known:
        if image.label not in labels:
            continue
        source = Path(image.source)
        root = Path(image.source.removesuffix(image.path)) if image.source.endswith(image.path) else source.parent
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
            {"image": str(source.folder / image), "reason": "its caption is not UTF-8: save it as UTF-8"}
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


def describe_images(
    report: ImportReport, now: dict[int, ImportedImage], captions: dict[int, str], options: ImportOptions
) -> None:
    """Count how images were placed; list doubles, and those too small for their bucket."""
    rows = list(now.values())
    ways = Counter(row.how for row in rows)
    report.linked, report.copied, report.rewritten = (ways[how] for how in ("linked", "copied", "rewritten"))
    report.lists["doubles"] = list_groups(rows, lambda row: row.sha256)
    doubled = {name for group in report.lists["doubles"] for name in group[1:]}
    alike = [row for row in rows if row.source not in doubled and row.likeness]
    report.lists["similar"] = list_groups(alike, lambda row: row.likeness)
    if rows:
        sizes = np.array([(row.width, row.height) for row in rows])
        side = options.resolution
        bucket_options = BucketOptions((side, side), True, min(256, side // 2), side * 2)
        resized = assign_buckets(sizes[:, 0], sizes[:, 1], bucket_options).resized_sizes
        for row, wanted in zip(rows, resized.tolist(), strict=True):
            if wanted[0] > row.width or wanted[1] > row.height:
                report.lists["too_small"].append(
                    {"image": row.source, "size": [row.width, row.height], "resized_to": wanted}
                )
    for name in ("corrupt", "missing", "too_small"):
        report.lists[name].sort(key=lambda entry: str(entry["image"]))


def list_groups(rows: Iterable[ImportedImage], key: Callable[[ImportedImage], Any]) -> list[list[str]]:
    """The files of images that share a key, where several do."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row.source)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def describe_sources(
    report: ImportReport,
    founds: Sequence[Found],
    texts: Sequence[Texts],
    now: dict[int, ImportedImage],
    captions: dict[int, str],
) -> None:
    """What each folder's captions are like, and what a template should know of them."""
    names = {"without": "without_caption", "empty": "empty_caption", "shared": "shared_text"}
    for found, text in zip(founds, texts, strict=True):
        source = found.source
        ids = [make_id(source.label, found.path_below_root(image)) for image in found.images]
        own = [captions[id] for id in ids if id in now]
        for name in ("without", "empty", "several_lines", "shared"):
            report.lists[names.get(name, name)] += [str(source.folder / image) for image in getattr(text, name)]
        report.subsets.append(
            {
                "name": source.subset.name,
                "folder": str(source.folder),
                "images": len(own),
                "repeats": source.subset.repeats,
                "options": dict(source.subset.options),
                "captions": text.origin,
                "class_text": source.class_text,
                "whole_captions": sum(SEPARATOR not in caption for caption in own),
                "trigger": find_trigger(own),
            }
        )
        replaced = len(text.without) + len(text.empty)
        if source.class_text and replaced:
            report.notes.append(
                f"{source.folder}: {replaced:,} images without a caption are trained with "
                f"{source.class_text!r}, the folder's name, as sd-scripts does it"
            )
        report.notes += [
            f"{source.folder / name}: sd-scripts leaves out a folder with {read}_ in front, and so does this"
            for name, read in skipped_children(source)
        ]
    report.other_files = dict(sum((found.others for found in founds), Counter()))


def skipped_children(source: Source) -> list[tuple[str, str]]:
    """Folders named 0_name or below, which are not trained."""
    names = ((name, name.partition("_")[0]) for name in sorted(source.left_out))
    return [(name, number) for name, number in names if int(number) < 1]


def find_trigger(captions: Sequence[str]) -> str:
    """The first tag that nearly all captions begin with; empty where there is none."""
    first = Counter(caption.partition(",")[0].strip() for caption in captions if caption)
    if len(captions) < 2 or not first:
        return ""
    tag, uses = first.most_common(1)[0]
    return tag if uses >= TRIGGER_SHARE * len(captions) else ""


def read_earlier(images: Path) -> dict[int, str]:
    """The captions of an earlier call by id."""
    try:
        table = open_captions(images).read_all()
    except NoImages:
        return {}
    return dict(zip(table["id"].to_pylist(), table["caption"].to_pylist(), strict=True))


def write_columns(
    images: Path, rows: dict[int, ImportedImage], captions: dict[int, str], new: Sequence[Subset], report: ImportReport
) -> str:
    """Write captions.arrow and the caches; the rows that it replaces stay for runs that began with them."""
    known = {subset.name: subset for subset in read_subsets(images)} | {subset.name: subset for subset in new}
    used = {row.subset for row in rows.values()}
    subsets = [subset for name, subset in known.items() if name in used]
    place = {subset.name: number for number, subset in enumerate(subsets)}
    ids = np.array(list(rows), dtype=np.int64)
    widths, heights = (
        np.array([getattr(row, name) for row in rows.values()], dtype=np.int32) for name in ("width", "height")
    )
    groups = np.array([place[row.subset] for row in rows.values()], dtype=np.int32)
    repeats = np.array([each.repeats for each in subsets], dtype=np.int32)[groups]
    files = pa.array([row.file for row in rows.values()], pa.string())
    texts = pa.array([captions[id] for id in rows], pa.string())
    described = [each for each in report.subsets if each["whole_captions"]]
    about = {
        "count": len(ids),
        "dataset": report.dataset,
        "style": "own",
        "whole_captions": sum(each["whole_captions"] for each in described),
        "trigger": next((each["trigger"] for each in described if each["trigger"]), ""),
    }
    before = earlier_digest(images)
    path = images / CAPTIONS_FILE
    with atomic_write(path, "w+b") as stream:
        with ColumnsWriter(stream, about, subsets) as columns:
            columns.write(ids, files, widths, heights, texts, repeats, groups)
        if before and before != columns.digest:
            kept = images / f"captions-{before[:DIGITS_OF_KEPT]}.arrow"
            kept.unlink(missing_ok=True)
            os.link(path, kept)
    write_caches(images, subsets, files, texts, widths, heights, groups)
    return columns.digest


def earlier_digest(images: Path) -> str:
    """The digest of the rows that are there."""
    try:
        return str(read_about(open_captions(images).schema).get("digest", ""))
    except NoImages:
        return ""


def write_caches(
    images: Path,
    subsets: Sequence[Subset],
    files: pa.Array,
    texts: pa.Array,
    widths: Int32Array,
    heights: Int32Array,
    groups: Int32Array,
) -> None:
    """metadata_cache.json of all images, and where there are several subsets one in the folder of each."""
    names, escaped = formats.escape_json(files), formats.escape_json(texts)
    places = [(images, np.arange(len(groups)))]
    if len(subsets) > 1:
        places += [(images / each.name, np.flatnonzero(groups == place)) for place, each in enumerate(subsets)]
    for folder, rows in places:
        taken = names.take(pa.array(rows)), escaped.take(pa.array(rows))
        entries = formats.cache_entries(formats.path_prefix(images), *taken, widths[rows], heights[rows])
        with atomic_write(folder / formats.CACHE_FILE, "wb") as stream:
            stream.write(b"{\n" + bytes(entries)[len(formats.ENTRY_SEPARATOR) :] + b"\n}\n")


def as_document(report: ImportReport) -> dict[str, Any]:
    """The report's counts."""
    counts = {name: getattr(report, name) for name in (
        "dataset", "found", "written", "kept", "linked", "copied", "rewritten", "removed", "others", "total", "digest",
    )}  # fmt: skip
    counts |= {name: report.count(name) for name in LISTS}
    return counts | {"other_files": report.other_files, "subsets": report.subsets, "notes": report.notes}


def write_report(report: ImportReport) -> None:
    """Write the counts and all lists as import-report.json."""
    document = as_document(report) | {"lists": {name: report.lists[name] for name in LISTS}}
    write_text(report.images / REPORT_FILE, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
