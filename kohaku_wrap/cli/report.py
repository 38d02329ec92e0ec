"""`kwrap report`: one page that shows runs, and where they came from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kohaku_wrap.cli.options import PATH, runs_folders, site_option
from kohaku_wrap.cli.output import print_answer, print_note, verb
from kohaku_wrap.errors import UsageError
from kohaku_wrap.wording import show_path

if TYPE_CHECKING:
    from kohaku_wrap.training.records.folder import Run


@verb("""
  kwrap report epsilon
  kwrap report epsilon epsilon-low-rate -o both.html
  kwrap report epsilon --watch
  kwrap report --index runs
  kwrap report baked.safetensors
""")
@click.argument("names", metavar="[RUN]...", nargs=-1)
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="The page; else report.html in the first run's folder.")  # fmt: skip
@click.option("--watch", is_flag=True, help="Write it anew as the run goes, until it has ended or Ctrl-C.")
@click.option("--live", is_flag=True, hidden=True, help="Once, as a page that reloads itself while the run goes.")
@click.option("--index", "index", type=PATH, metavar="RUNS",
              help="One page over all runs of this folder, in place of RUN.")  # fmt: skip
@site_option
def command(
    names: tuple[str, ...],
    out: Path | None,
    watch: bool,
    live: bool,
    index: Path | None,
    site_file: Path | None,
) -> None:
    """Show runs on one page, and where they came from.

    One HTML file that works offline, by mail and from a USB stick: where the run stands, whether `kwrap verify` proved
    it, curves of loss, rates and speed over all attempts, and every option with the layer that set it. Several runs
    are laid over each other; a .safetensors file shows its recipe and parents. Nothing else of
    the run is changed, and no model is read.
    """
    from kohaku_wrap.reporting.page import PAGE_FILE, RELOAD_SECONDS, write_file_page, write_index, write_page
    from kohaku_wrap.training.records.folder import find_run, list_runs
    from kohaku_wrap.training.supervising.status import read_status

    runs: list[Run] = []
    if len(names) == 1 and names[0].endswith(".safetensors") and index is None:
        if watch:
            raise UsageError("--watch: a file does not change", "Leave --watch out.")
        page = out or Path(names[0]).with_suffix(".html")
        write_file_page(Path(names[0]), page)
    elif index is not None:
        if names or watch:
            raise UsageError("--index is a page over all runs of a folder", "Leave RUN and --watch out.")
        runs = list(list_runs(index))
        if not runs:
            raise UsageError(f"{index}: no run in it", "Give the folder that the runs lie in, such as runs.")
        page = out or index / "index.html"
        for unreadable in write_index(runs, page):
            print_note(f"note: left out: {unreadable}")
    elif not names:
        raise UsageError(
            "no RUN given", "For example: `kwrap report epsilon`. Or give --index RUNS for a page over all."
        )
    else:
        folders = runs_folders(site_file)
        runs = [find_run(name, folders) for name in names]
        page = out or runs[0].folder / PAGE_FILE
        write_page(runs, page, is_live=watch or live)
        while watch and any(read_status(run).condition in ("new", "running") for run in runs):
            time.sleep(RELOAD_SECONDS / 2)
            for run in runs:
                run.forget_lock()
            write_page(runs, page, is_live=True)
    payload = {"page": page, "runs": [run.folder for run in runs], "size_bytes": page.stat().st_size}
    rows = [("of", ", ".join(run.name for run in runs) or names[0]), ("page", page)]
    print_answer(payload, "Report", rows, f"open {show_path(page)} in a browser")
