"""What became of imported images and captions: counts, lists of what to look at, import-report.json."""

from __future__ import annotations

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.dataset.captions.words import SEPARATOR
from kohaku_wrap.dataset.own.folders import Found, Source, make_id
from kohaku_wrap.dataset.own.images import ImportedImage
from kohaku_wrap.dataset.own.texts import Texts
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import write_text
from kohaku_wrap.wording import count_of

REPORT_FILE = "import-report.json"
LISTS = (
    "missing", "corrupt", "not_utf8", "without_caption", "empty_caption", "several_lines", "shared_text", "doubles",
    "similar", "too_small",
)  # fmt: skip
"""What the report lists, the gravest first."""


TRIGGER_SHARE = 0.9
"""Of a subset's captions that begin with one tag, from which on it counts as a trigger word."""


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

    def check(self, max_missing: int) -> None:
        """Raise ImportLacking when more than `max_missing` images are missing or were refused, or all of them."""
        kinds = {"missing": "named, but not there", "corrupt": "no whole still image", "not_utf8": "caption not UTF-8"}
        lacking, wanted = sum(map(self.count, kinds)), self.found + self.count("missing")
        if lacking <= max_missing and self.total:
            return
        first = next(entry for name in kinds for entry in self.lists[name])
        counts = ", ".join(f"{self.count(name):,} {words}" for name, words in kinds.items() if self.count(name))
        allow = f", or add --max-missing {lacking} to go on without them" if self.total else ""
        raise ImportLacking(
            f"{lacking:,} of {wanted:,} images cannot be used ({counts}); the first is "
            f"{first['image']}: {first['reason']}",
            f"{self.images / REPORT_FILE} lists them all. Fix them and run the same command again{allow}.",
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
    for found, text in zip(founds, texts, strict=True):
        source = found.source
        ids = [make_id(source.label, found.path_below_root(image)) for image in found.images]
        own = [captions[id] for id in ids if id in now]
        for name in ("without_caption", "empty_caption", "several_lines", "shared_text"):
            report.lists[name] += [str(source.folder / image) for image in getattr(text, name)]
        report.subsets.append(
            {
                "name": source.subset.name,
                "folder": str(source.folder),
                "images": len(own),
                "repeats": source.subset.repeats,
                "options": dict(source.subset.options),
                "captions": text.origin,
                "class_text": source.class_text,
            }
        )
        if not source.subset.options.get("keep_tokens"):
            separator = str(source.subset.options.get("keep_tokens_separator") or SEPARATOR)
            report.notes += note_whole(f"{source.folder}:", [each for each in own if each and separator not in each])
        if own and not any(own) and len(found.unread) == 1:
            report.notes.append(
                f"{source.folder}: no image has a caption. If they are in {found.unread[0].name}, run this again with "
                f"{shlex.join(('--captions', str(found.unread[0])))}"
            )
        report.notes += note_lacking(source, text)
        report.notes += [
            f"{link}: a link to a folder, which is not followed; import it by a path of its own" for link in found.links
        ]
        if text.repeated:
            report.notes.append(
                f"{text.origin}: {count_of(text.repeated, 'row')} of images that have a later row; the last one counts"
            )
        report.notes += [
            f"{source.folder / name}: sd-scripts leaves out a folder with {read}_ in front, and so does this"
            for name, read in skipped_children(source)
        ]
    report.other_files = dict(sum((found.others for found in founds), Counter()))


def note_lacking(source: Source, texts: Texts) -> list[str]:
    """What images without a caption, or with an empty one, are trained with."""
    origin = "its class_tokens" if source.folder == source.root else "the folder's name"
    trained = f"trained with {source.class_text!r}, {origin}" if source.class_text else "trained with an empty one"
    notes = []
    if lacking := len(texts.without_caption):
        plain = ", as sd-scripts does it" if source.class_text and texts.are_files else ""
        notes.append(f"{source.folder}: {count_of(lacking, 'image')} without a caption: {trained}{plain}")
    if empty := sum(not texts.of_image[image] for image in texts.empty_caption):
        plain = "; sd-scripts' own dataset ends at an empty file, and trains a blank first line as an empty caption"
        notes.append(
            f"{source.folder}: {count_of(empty, 'image')} with an empty caption: {trained}"
            f"{plain if texts.are_files else ''}"
        )
    return notes


def note_whole(subject: str, captions: Sequence[str]) -> list[str]:
    """What happens to captions without a separator where a template shuffles or drops tags; nothing for none."""
    if not captions:
        return []
    trigger = find_trigger(captions)
    with_it = f", and {trigger!r}, with which they begin, moves and drops out with them" if trigger else ""
    return [
        f"{subject} {count_of(len(captions), 'caption')} without {SEPARATOR}: a template that shuffles or drops tags "
        f"does so with all of theirs{with_it}. dataset_options.keep_tokens = 1 keeps the first tag in its place"
    ]


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


def as_document(report: ImportReport) -> dict[str, Any]:
    """The report's counts."""
    counts = {name: value for name, value in vars(report).items() if isinstance(value, int | str)}
    counts |= {name: report.count(name) for name in LISTS}
    return counts | {"other_files": report.other_files, "subsets": report.subsets, "notes": report.notes}


def write_report(report: ImportReport) -> None:
    """Write the counts and all lists as import-report.json."""
    document = as_document(report) | {"lists": {name: report.lists[name] for name in LISTS}}
    write_text(report.images / REPORT_FILE, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
