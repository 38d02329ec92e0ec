"""`kwrap evaluate exposure`: how often each tag was trained."""

from __future__ import annotations

from pathlib import Path

import click

from kohaku_wrap.cli.exposure_shown import describe_exposure, find_exposure, list_counts, list_facts
from kohaku_wrap.cli.options import site_option, threads_option
from kohaku_wrap.cli.output import print_answer, verb
from kohaku_wrap.errors import command_line
from kohaku_wrap.wording import show_path

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
    payload = {**describe_exposure(found), "rows": rows}
    print_answer(payload, f"Exposure of run {found.run.name}", table, "" if tags else again)
