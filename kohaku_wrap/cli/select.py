"""`kwrap select`: the seeded sample of posts and its filters."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.next_steps import extract_command
from kohaku_wrap.cli.options import PATH, leave_pandas_out, open_source, tags_option
from kohaku_wrap.cli.output import print_answer, print_notes, progress_bar, verb

if TYPE_CHECKING:
    from kohaku_wrap.dataset.selection import SelectionReport


@verb("""
  kwrap select epsilon --db danbooru2023.db --out epsilon.parquet
  kwrap select my-dataset.toml --db posts-snapshot.parquet --out mine.parquet --json
""")
@click.argument("dataset", metavar="DATASET")
@click.option(
    "--db",
    required=True,
    type=PATH,
    help="The metadata: a file or a folder of any edition.",
)
@click.option("--out", "out", required=True, type=PATH, metavar="SEL.parquet",
              help="The selection to write.")  # fmt: skip
@tags_option
def command(dataset: str, db: Path, out: Path, tag_table: Path | None) -> None:
    """Select posts: a seeded sample, then the recipe's filters.

    DATASET is a shipped name (epsilon, delta, demo; gelbooru and e621 are examples) or the path of a dataset file. The
    same seed and database give the same posts on every machine; every drop is counted by its reason.
    """
    from kohaku_wrap.dataset.recipe import load_dataset
    from kohaku_wrap.dataset.selection import GENERATOR, select_posts

    leave_pandas_out()
    recipe = load_dataset(dataset)
    database = open_source(db, recipe.metadata, tag_table)
    with progress_bar("select", "posts") as progress:
        report = select_posts(database, recipe, out, on_progress=progress)
    payload = {**asdict(report), "generator": GENERATOR, "db": str(db), "out": str(out)}
    print_notes(report.warnings)
    title = f"Selection {recipe.name}, seed {report.seed}"
    print_answer(payload, title, rows_of_report(report, out), extract_command(out, db=db))


def rows_of_report(report: SelectionReport, out: Path) -> list[tuple[str, Any]]:
    """The report as lines of a table."""
    from kohaku_wrap.dataset.recipe import Stratum
    from kohaku_wrap.metadata.filters import FLAGS

    rows: list[tuple[str, Any]] = [("metadata", report.edition)]
    rows += [(f"lacks: {what}", sentence) for what, sentence in report.lacks.items()]
    rows.append(("posts in the database", report.posts))
    if report.duplicate_ids:
        rows.append(("more rows of the same ids", report.duplicate_ids))
    if report.outside_strata:
        rows.append(("outside the strata", report.outside_strata))
    rows += [(f"dropped before the sample: {reason}", count) for reason, count in report.dropped_before_sample.items()]
    for stratum in report.strata:
        title = Stratum(stratum.first_id, stratum.last_id, stratum.asked).title
        asked = "all" if stratum.asked is None else f"{stratum.asked:,}"
        rows.append((title, f"{stratum.sampled:,} sampled of {stratum.available:,} (asked: {asked})"))
    rows.append(("sampled", report.sampled))
    rows += [(f"dropped: {reason}", count) for reason, count in report.dropped.items()]
    for name, count in report.unknown.items():
        rows.append((f"{name} unknown, {'kept' if name in FLAGS and name != 'no_still_image' else 'dropped'}", count))
    return [*rows, ("selected", report.selected), ("written to", out)]
