"""What became of imported images and captions: counts, lists of what to look at, import-report.json."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.dataset.own.folders import N_NAME, Found, make_id
from kohaku_wrap.dataset.own.images import ImportedImage
from kohaku_wrap.dataset.own.notes import is_beyond_sd_scripts, note_beyond, note_sources
from kohaku_wrap.dataset.own.texts import Texts
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import write_text

REPORT_FILE = "import-report.json"
LISTS = (
    "missing", "corrupt", "not_utf8", "without_caption", "empty_caption", "several_lines", "shared_text", "doubles",
    "similar", "too_small", "beyond_sd_scripts",
)  # fmt: skip
"""What the report lists, the gravest first."""


class ImportLacking(KwrapError):
    """More images are missing or refused than was allowed."""


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

    def check(self, max_missing: int, dry_run: bool) -> None:
        """Raise ImportLacking when more than `max_missing` images are missing or were refused, or all of them."""
        kinds = {"missing": "named, but not there", "corrupt": "no whole still image", "not_utf8": "caption not UTF-8"}
        lacking, wanted = sum(map(self.count, kinds)), self.found + self.count("missing")
        if lacking <= max_missing and self.total:
            return
        first = next(entry for name in kinds for entry in self.lists[name])
        counts = ", ".join(f"{self.count(name):,} {words}" for name, words in kinds.items() if self.count(name))
        when = "Without --dry-run " if dry_run else ""
        allow = f", or add --max-missing {lacking} to go on without them" if self.total else ""
        raise ImportLacking(
            f"{lacking:,} of {wanted:,} images cannot be used ({counts}); the first is "
            f"{first['image']}: {first['reason']}",
            f"{when}{self.images / REPORT_FILE} lists them all. Fix them and run the same command again{allow}.",
        )


def describe_images(report: ImportReport, now: Mapping[int, ImportedImage], resolution: int) -> None:
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
        side = resolution
        bucket_options = BucketOptions((side, side), True, max(64, min(256, side // 2)), side * 2)
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
    now: Mapping[int, ImportedImage],
    captions: Mapping[int, str],
) -> None:
    """What each folder's captions are like, and what a template should know of them."""
    owns: list[list[str]] = []
    trained: list[Texts] = []
    beyond: dict[str, str] = {}
    for found, text in zip(founds, texts, strict=True):
        source = found.source
        ids = [make_id(source.label, found.path_below_root(image)) for image in found.images]
        own = [captions[id] for id in ids if id in now]
        used = {image for image, id in zip(found.images, ids, strict=True) if id in now}  # Refused images are not.
        text = replace(
            text,
            without_caption=[image for image in text.without_caption if image in used],
            empty_caption=[image for image in text.empty_caption if image in used],
            several_lines=[image for image in text.several_lines if image in used],
        )
        trained.append(text)
        for name in ("without_caption", "empty_caption", "several_lines", "shared_text"):
            report.lists[name] += [str((source.folder / image).absolute()) for image in getattr(text, name)]
        report.subsets.append(
            {
                "name": source.subset.name,
                "folder": str(source.folder),
                "images": len(own),
                "repeats": source.subset.repeats,
                "options": dict(source.subset.options),
                "captions": text.origin,
                "class_text": source.class_text,
                "holds_others": bool(source.left_out),
            }
        )
        owns.append(own)
        beyond |= {
            str(source.folder / image): source.in_sd_scripts or N_NAME
            for image, id in zip(found.images, ids, strict=True)
            if id in now and is_beyond_sd_scripts(source, image)
        }
    report.lists["beyond_sd_scripts"] = sorted(str(Path(image).absolute()) for image in beyond)
    report.notes += [*note_sources(founds, trained, owns), *note_beyond(beyond)]
    report.other_files = dict(sum((found.others for found in founds), Counter()))


def as_document(report: ImportReport) -> dict[str, Any]:
    """The report's counts."""
    counts = {name: value for name, value in vars(report).items() if isinstance(value, int | str)}
    counts |= {name: report.count(name) for name in LISTS}
    return counts | {"other_files": report.other_files, "subsets": report.subsets, "notes": report.notes}


def write_report(report: ImportReport) -> None:
    """Write the counts and all lists as import-report.json."""
    document = as_document(report) | {"lists": {name: report.lists[name] for name in LISTS}}
    write_text(report.images / REPORT_FILE, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
