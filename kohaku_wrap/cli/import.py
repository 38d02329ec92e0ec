# ruff: noqa: N999 (a verb is called like its module)
"""`kwrap import`: images and captions that one has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.next_steps import plan_command
from kohaku_wrap.cli.options import PATH, leave_pandas_out, max_missing_option, retype
from kohaku_wrap.cli.output import print_answer, print_next, print_notes, progress_bar, verb
from kohaku_wrap.errors import command_line
from kohaku_wrap.wording import count_of

if TYPE_CHECKING:
    from kohaku_wrap.dataset.own.report import ImportReport

ONLY_IF_ANY = {
    "copied": "copied",
    "rewritten": "turned upright, laid on white or scaled to 8 bits",
    "removed": "no longer in the folders",
    "others": "of other folders, kept",
    "missing": "named, and not there",
    "corrupt": "no whole still image",
    "not_utf8": "left out: caption not UTF-8",
    "without_caption": "without a caption",
    "empty_caption": "with an empty first line",
    "several_lines": "captions of several lines: the first is trained",
    "shared_text": "share a caption file",
    "doubles": "groups of the same file",
    "similar": "groups that look the same",
    "too_small": "smaller than their bucket",
    "beyond_sd_scripts": "which plain sd-scripts would not train",
}
"""Counts that are shown where there are any."""


@verb(
    """
  kwrap import ~/pictures/mine --out images
  kwrap import ~/train/img --out images --captions .txt
  kwrap import first second --label a --label b --out images --copy
  kwrap import dataset.toml --out images --dry-run
""",
    unless=("dry_run",),
)
@click.argument("folders", metavar="FOLDER…", nargs=-1, required=True, type=PATH)
@click.option("--out", "images", metavar="IMAGES", required=True, type=PATH, help="Folder of the images.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="NAME",
    help="Name of a folder, which ids are made from; once a folder, in their order. Default: the folder's own.",
)
@click.option(
    "--captions",
    default="",
    metavar="WHICH",
    help="Where captions come from: .txt, .caption, or a .jsonl, .json, .csv or .parquet file. Default: what is there.",
)
@click.option("--text-column", default="", metavar="NAME", help="The column of captions in such a file.")
@click.option("--plain", is_flag=True, help="Take folders named N_name as folders like any other: no repeats.")
@click.option("--copy", is_flag=True, help="Copy images into IMAGES; default: link to where they lie.")
@click.option("--dataset", default="", metavar="NAME", help="Name of the set, for cards. Default: the labels.")
@click.option(
    "--resolution",
    type=click.IntRange(min=64),
    default=1024,
    show_default=True,
    metavar="PIXELS",
    help="Of the training, to list images that are too small.",
)
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Processes that check; default: one a core.")
@max_missing_option
@click.option("--dry-run", is_flag=True, help="Check and report, write nothing.")
def command(folders: tuple[Path, ...], images: Path, max_missing: int, dry_run: bool, **asked: Any) -> None:
    """Make a dataset of images and captions that you have.

    FOLDER is a folder with images, sub-folders included, or sd-scripts' dataset file (.toml). Captions are files
    beside the images or one table; N_name folders repeat their images N times an epoch. Every image is decoded to its
    last pixel and linked into IMAGES; one that is turned, transparent or has 16 bits is written anew there. Run it
    again to go on or to add images: what is there is kept, with its ids. IMAGES/import-report.json lists what to look
    at.
    """
    from kohaku_wrap.dataset.own.importing import ImportOptions, import_folders
    from kohaku_wrap.dataset.own.report import REPORT_FILE, as_document

    leave_pandas_out()
    typed = retype("images", "max_missing", "jobs", absolute=True)
    places = (*(path.absolute() for path in folders), "--out", images.absolute())
    options = ImportOptions(dry_run=dry_run, made_by=command_line("import", *places, *typed), **asked)
    with progress_bar("check", "images") as progress:
        report = import_folders(folders, images, options, progress)
    where = {} if dry_run else {"report": str(images / REPORT_FILE)}
    print_notes(report.notes)
    payload = {"out": str(images), "dry_run": dry_run, **as_document(report), **where}
    print_answer(payload, "Images of your own", rows_of_report(report, where))
    report.check(max_missing, dry_run)
    print_next("run it again without --dry-run" if dry_run else next_command(images))


def next_command(images: Path) -> str:
    """A template of one's own to copy, or its plan where a file of that name is there, as of a second import."""
    template = "mine.toml"
    if Path(template).exists():
        return plan_command(template, images.parent)
    return command_line("template", "cp", "own-images", template)


def rows_of_report(report: ImportReport, where: dict[str, str]) -> list[tuple[str, Any]]:
    """The report as lines of a table."""
    counts = {name: getattr(report, name, None) for name in ONLY_IF_ANY}
    counts = {name: report.count(name) if count is None else count for name, count in counts.items()}
    rows: list[tuple[str, Any]] = [(name, getattr(report, name)) for name in ("dataset", "found", "written", "kept")]
    for subset in report.subsets:
        if not subset["images"] and subset["holds_others"]:
            continue
        once = "" if subset["repeats"] == 1 else f" × {subset['repeats']}"
        rows.append(
            (subset["name"], f"{count_of(subset['images'], 'image')}{once}, captions from {subset['captions']}")
        )
    rows += [(ONLY_IF_ANY[name], count) for name, count in counts.items() if count]
    rows += [(f"other files: {ending}", count) for ending, count in sorted(report.other_files.items())]
    return [*rows, *where.items()]
