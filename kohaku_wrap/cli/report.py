"""`kwrap report`: one page that shows runs, and where they came from."""

from __future__ import annotations

from pathlib import Path

import click

from kohaku_wrap.cli.options import runs_folders, site_option
from kohaku_wrap.cli.output import beyond_output, json_option, print_json, print_table, show_path


@click.command(
    epilog="""\b
Examples:
  kwrap report epsilon
  kwrap report epsilon epsilon-low-rate -o both.html"""
)
@click.argument("names", metavar="RUN...", nargs=-1, required=True)
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="The page; else report.html in the first run's folder.")  # fmt: skip
@site_option
@json_option
@beyond_output()
def command(names: tuple[str, ...], out: Path | None, site_file: Path | None, as_json: bool) -> None:
    """Show runs on one page, and where they came from.

    One HTML file that works offline, by mail and from a USB stick: where the run stands, whether `kwrap verify` proved
    it, curves of loss, rates and speed over all attempts, and every option with the layer that set it. Several runs
    are laid over each other. Nothing of the run is changed, and no model is read.
    """
    from kohaku_wrap.reporting.page import write_page
    from kohaku_wrap.training.records.folder import find_run

    folders = runs_folders(site_file)
    runs = [find_run(name, folders) for name in names]
    page = out or runs[0].folder / "report.html"
    write_page(runs, page)
    if as_json:
        print_json("report", {"page": page, "runs": [run.folder for run in runs], "size_bytes": page.stat().st_size})
        return
    print_table("Report", [("runs", ", ".join(run.name for run in runs)), ("page", page)],
                f"open {show_path(page)} in a browser")  # fmt: skip
