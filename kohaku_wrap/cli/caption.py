"""`kwrap caption`: captions of a selection, of one post, their statistics, and moved folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.caption_shown import print_explanation, print_folder, print_image, print_statistics
from kohaku_wrap.cli.next_steps import extract_command, plan_command
from kohaku_wrap.cli.options import PATH, leave_pandas_out, open_source, refuse_idle, retype, tags_option
from kohaku_wrap.cli.output import (
    print_answer,
    print_notes,
    progress_bar,
    verb,
)
from kohaku_wrap.errors import UsageError, command_line

if TYPE_CHECKING:
    from kohaku_wrap.dataset.captions.report import CaptionReport
    from kohaku_wrap.dataset.recipe import DatasetRecipe

STYLES = ("kohaku", "hakubooru")
"""As in the recipe of captions, which no command loads before it runs."""


@verb(
    """
  kwrap caption epsilon.parquet --db danbooru2023.db --out images
  kwrap caption epsilon.parquet --db danbooru2023.db --out images --format txt
  kwrap caption epsilon.parquet --db danbooru2023.db --text captions.parquet --out images
  kwrap caption --post 5982731 --db danbooru2023.db
  kwrap caption epsilon.parquet --db danbooru2023.db --stats
  kwrap caption --image images/mine/a.png
  kwrap caption --stats --out images
  kwrap caption --relocate --out /new/place/images
""",
    unless=("post_id", "image", "stats"),
)
@click.argument("selection", metavar="[SEL.parquet]", required=False, type=PATH)
@click.option("--db", "db", type=PATH, help="The metadata: a file or a folder of any edition.")
@tags_option
@click.option("--out", "out", type=PATH, metavar="IMAGES", help="The folder of the images.")
@click.option(
    "--dataset",
    metavar="DATASET",
    help="Whose caption rules; default: those of the selection's own dataset.",
)
@click.option(
    "--format",
    "formats",
    default="cache,jsonl",
    show_default=True,
    metavar="txt,cache,jsonl",
    help="What to write, beside captions.arrow.",
)
@click.option(
    "--text",
    type=PATH,
    metavar="FILE.parquet",
    help="Natural-language captions by id, one more group; placed and mixed by the dataset's [caption].",
)
@click.option("--text-column", default="", metavar="NAME", help="The column of captions in that file.")
@click.option("--style", type=click.Choice(STYLES), help="Overrides the dataset's.")
@click.option(
    "--post",
    "post_id",
    type=int,
    metavar="ID",
    help="Explain the caption of one post; with SEL.parquet, as it is written there.",
)
@click.option(
    "--image",
    type=PATH,
    metavar="FILE",
    help="Explain the caption of an image: one in IMAGES, or one that was imported.",
)
@click.option(
    "--stats", is_flag=True, help="Count tags and tokens, write nothing; without SEL.parquet, of what lies in IMAGES."
)
@click.option(
    "--rare",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    metavar="N",
    help="With --stats: list words in fewer captions.",
)
@click.option("--tokenizer", type=PATH, metavar="DIR", help="A CLIP tokenizer for --stats and --text.")
@click.option("--relocate", is_flag=True, help="Write the new place of a moved IMAGES into its caption files.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Threads; default: one a core, at most four.")
def command(
    selection: Path | None,
    db: Path | None,
    tag_table: Path | None,
    out: Path | None,
    dataset: str | None,
    formats: str,
    text: Path | None,
    text_column: str,
    style: str | None,
    post_id: int | None,
    image: Path | None,
    stats: bool,
    rare: int,
    tokenizer: Path | None,
    relocate: bool,
    jobs: int | None,
) -> None:
    """Write the captions of a selection.

    PREFIX ||| GENERAL TAGS ||| SUFFIX, as the dataset's [caption] table says: the trainer shuffles and drops only what
    stands in the middle. metadata_cache.json (cache) is what sd-scripts reads with cache_info; txt writes a file
    beside each image; captions.jsonl lists every selected post. Files that are right already are left alone.
    """
    leave_pandas_out()
    from kohaku_wrap.dataset.captions.relocation import relocate_captions
    from kohaku_wrap.dataset.captions.text_table import read_text_table
    from kohaku_wrap.dataset.captions.tokens import choose_counter, estimate_tokens
    from kohaku_wrap.dataset.captions.writing import FORMATS, write_captions
    from kohaku_wrap.metadata.parallel import usable_threads

    refuse_idle_options(selection, post_id, image, stats, relocate, text)
    if relocate:
        report = relocate_captions(require(out, "--out IMAGES", "--relocate"))
        payload = {"relocated": report.files, "missing": report.missing, "out": str(report.folder)}
        rows = [*report.files.items(), ("images that are not there", report.missing)]
        print_answer(payload, f"Caption files now point to {report.folder}", rows)
        return
    if image is not None:
        print_image(image, out)
        return
    if stats and selection is None:
        print_folder(require(out, "SEL.parquet, or --out IMAGES,", "statistics"), rare, tokenizer)
        return
    db = require(db, "--db DB", "captions")
    if post_id is None:
        selection = require(selection, "SEL.parquet", "captions (or --post ID)")
    found = choose_dataset(selection, dataset)
    recipe = replace(found.caption, style=style) if style else found.caption
    database = open_source(db, found.metadata, tag_table)
    place = out or (selection.absolute().parent if selection else Path.cwd())
    texts = read_text_table(text, text_column, place) if text else None
    if post_id is not None:
        print_explanation(database, recipe, post_id, selection, texts)
        return
    assert selection
    if stats:
        print_statistics(database, selection, recipe, rare, tokenizer, texts, jobs)
        return
    out = require(out, "--out IMAGES", "captions")
    wanted = list(dict.fromkeys(one.strip() for one in formats.split(",") if one.strip()))
    unknown = [one for one in wanted if one not in FORMATS]
    if unknown or not wanted:
        raise UsageError(f"--format: {', '.join(unknown) or 'nothing'} is not among {', '.join(FORMATS)}")
    by, count = choose_counter(tokenizer) if tokenizer else ("estimate", estimate_tokens)
    typed = retype("db", "out", "jobs", absolute=True)
    made_by = command_line("caption", selection.absolute(), "--db", database.path, "--out", out.absolute(), *typed)
    threads = jobs or usable_threads()
    with progress_bar("caption", "posts") as progress:
        written = write_captions(
            database, selection, out, recipe, wanted, found.name, threads, progress, texts, count, made_by
        )
    tokens_by = {"tokens_by": by} if texts else {}
    payload = {"out": str(out), **asdict(written.changes), **asdict(written), **tokens_by}
    print_notes(written.notes)
    next_step = next_command(written, selection, out, found.name)
    print_answer(payload, f"Captions, {written.style} style", rows_of_report(written), next_step)


READ_BY_USES: Mapping[str, tuple[str, ...]] = {
    "with --relocate": ("relocate", "out"),
    "with --image FILE": ("image", "out"),
    "with --post ID": ("post_id", "selection", "db", "tag_table", "dataset", "style", "text", "text_column", "out"),
    "with --stats without SEL.parquet": ("stats", "out", "rare", "tokenizer"),
}
"""What each use but that of a selection reads."""


def refuse_idle_options(
    selection: Path | None, post_id: int | None, image: Path | None, stats: bool, relocate: bool, text: Path | None
) -> None:
    """Raise UsageError for options that this use of the command would not read."""
    asked = (relocate, image is not None, post_id is not None, stats and selection is None)
    for use, is_asked in zip(READ_BY_USES, asked, strict=True):
        if is_asked:
            refuse_idle(use, but=READ_BY_USES[use])
            break
    if text is None:
        refuse_idle("without --text FILE", of=("text_column",) if stats else ("text_column", "tokenizer"))
    if stats and selection is not None:
        # A table of texts is sorted beside the images.
        refuse_idle("with --stats of SEL.parquet", of=("formats",) if text else ("formats", "out"))
    if not stats:
        refuse_idle("without --stats", of=("rare",))


def require(value: Path | None, what: str, purpose: str) -> Path:
    """The value of an option that this use of the command needs."""
    if value is None:
        raise UsageError(f"{what} is missing: {purpose} need it", "See `kwrap caption --help` for examples.")
    return value


def choose_dataset(selection: Path | None, dataset: str | None) -> DatasetRecipe:
    """The dataset with its caption rules: as asked for, else of the selection, else Epsilon's."""
    from kohaku_wrap.dataset.recipe import load_dataset, read_dataset
    from kohaku_wrap.dataset.selection_file import read_about

    if dataset is None and selection is not None:
        about = read_about(selection)[1]
        tables = {key: about.get(key, {}) for key in ("metadata", "caption")}
        return read_dataset(tables, str(about.get("dataset", selection)))
    return load_dataset(dataset or "epsilon")


def rows_of_report(report: CaptionReport) -> list[tuple[str, Any]]:
    """The report as lines of a table."""
    from kohaku_wrap.dataset.captions.formats import CACHE_FILE, LINES_FILE
    from kohaku_wrap.formats.caption_rows import CAPTIONS_FILE

    rows: list[tuple[str, Any]] = [("captions made", report.posts), ("images on disk", report.images)]
    if report.vanished:
        rows.append(("images gone since extract", report.vanished))
    files = {"arrow": CAPTIONS_FILE, "cache": CACHE_FILE, "jsonl": LINES_FILE, "txt": ".txt files"}
    for name, change in report.formats.items():
        done = f"{change.written:,} written, {change.unchanged:,} unchanged, {change.removed:,} removed"
        rows.append((files[name], done))
    rows += [(f"texts: {what.replace('_', ' ')}", count) for what, count in report.texts.items() if count]
    rows += [(f"tags: {fate.replace('_', ' ')}", count) for fate, count in report.tags.items() if count]
    if report.duplicates:
        rows.append(("tags: repeated", report.duplicates))
    rows += [(f"posts: {what.replace('_', ' ')}", count) for what, count in report.lacking.items() if count]
    return rows


def next_command(report: CaptionReport, selection: Path, out: Path, dataset: str) -> str:
    """What comes after the captions: the plan of the template that is called like the dataset."""
    from kohaku_wrap.config.templates import list_templates

    if not report.images:
        return extract_command(selection, out)
    template = dataset if dataset in {each.name for each in list_templates()} else "TEMPLATE"
    return plan_command(template, out.parent)
