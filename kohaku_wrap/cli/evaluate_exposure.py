"""`kwrap evaluate exposure`: how often each tag was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.cli.options import open_run, site_option, threads_option
from kohaku_wrap.cli.output import print_answer, print_note, progress_bar, verb
from kohaku_wrap.errors import command_line
from kohaku_wrap.wording import show_path

if TYPE_CHECKING:
    from kohaku_wrap.evaluation.exposure import Exposure

LEAST = 20


@verb(
    """
  kwrap evaluate exposure epsilon
  kwrap evaluate exposure epsilon --tag "hatsune miku" --tag "ask (askzy)"
  kwrap evaluate exposure runs/epsilon --step 4000 --all --json
""",
    writes=False,
)
@click.argument("name", metavar="RUN")
@click.option("--step", type=click.IntRange(min=1), metavar="N", help="Up to this optimizer step (default: the last).")
@click.option("--tag", "tags", multiple=True, metavar="NAME", help="Only this tag, artist or character; repeatable.")
@click.option(
    "--least",
    type=click.IntRange(min=1),
    default=LEAST,
    show_default=True,
    metavar="K",
    help="Show the K least trained.",
)
@click.option("--all", "everything", is_flag=True, help="Show every tag.")
@site_option
@threads_option
def exposure(
    name: str,
    step: int | None,
    tags: tuple[str, ...],
    least: int,
    everything: bool,
    site_file: Path | None,
    threads: int,
) -> None:
    """Count how often each tag was trained.

    Exactly, after shuffle and dropout, from the run's seed, captions and ledger: in how many trained captions each tag,
    artist or character stood up to step N, how many the next epoch would add, and how many more with one repeat more.
    What is counted is kept in RUN/exposure/, so that the next question is answered at once.
    """
    found = find_exposure(name, step, site_file, threads)
    wanted = found.tags.num_rows if everything else least
    rows = [found.find(tag) for tag in tags] if tags else found.least(wanted)
    title = "tags" if tags or everything else f"the {len(rows)} least trained"
    table = [*list_facts(found), *list_counts(title, rows)]
    again = command_line("status", show_path(found.run.folder), "--tag", rows[0]["tag"]) if rows else ""
    payload = {**describe(found), "rows": rows}
    print_answer(payload, f"Exposure of run {found.run.name}", table, "" if tags else again)


def find_exposure(name: str, step: int | None, site_file: Path | None, threads: int) -> Exposure:
    """The counts of a run, made now or before."""
    from kohaku_wrap.evaluation.exposure import measure_exposure
    from kohaku_wrap.metadata.parallel import usable_threads

    run = open_run(name, site_file)
    with progress_bar("captions", "captions") as report:
        found = measure_exposure(run, step, threads or usable_threads(), report)
    if found.not_kept:
        print_note(f"note: not kept for the next time ({found.not_kept})")
    return found


def describe(found: Exposure) -> dict[str, Any]:
    """What is true of all tags."""
    file = None if found.not_kept else found.file
    return {"run": found.run.folder, "optimizer_step": found.optimizer_step, **found.facts, "file": file}


def list_facts(found: Exposure) -> list[tuple[str, Any]]:
    """The same as rows; what is not known is among them."""
    facts, unknown = found.facts, found.facts["unknown"]
    rows: list[tuple[str, Any]] = [
        ("up to step", found.optimizer_step),
        ("captions trained", facts["images_trained"]),
        ("without tags", facts["captions_without_tags"]),
        ("different tags", facts["different_tags"]),
    ]
    if facts["captions_with_text"]:
        rows.append(("with a text", facts["captions_with_text"]))
    for before in facts["before"]:
        what = f"run {before['run']} up to step {before['optimizer_step']:,}"
        rows.append(("before it", f"{what}, {'counted' if before['counted'] else 'NOT counted: it is not at hand'}"))
    for name, count in unknown.items():
        if count:
            rows.append(("NOT counted", f"{count:,} {name.replace('_', ' ')}"))
    if not found.not_kept:
        rows.append(("kept in", found.file))
    return rows


def list_counts(title: str, rows: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Each tag's numbers in columns: how often it was trained, in how many images, and what would come to that."""
    lines = [(title, ("times", "images", "next epoch", "one repeat more"))]
    for row in rows:
        more = f"{row['next_epoch']:+,}", f"{row['one_more_repeat']:+,}"
        lines.append((row["tag"], (f"{row['trained']:,}", f"{row['images']:,}", *more)))
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in lines), strict=True)]
    return [
        (name, "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
        for name, cells in lines
    ]
