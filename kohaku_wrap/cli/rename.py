"""`kwrap rename`: another name for a run."""

from __future__ import annotations

from pathlib import Path

import click

from kohaku_wrap.cli.options import open_run, site_option
from kohaku_wrap.cli.output import print_answer, verb
from kohaku_wrap.errors import command_line
from kohaku_wrap.wording import show_path


@verb("""
  kwrap rename epsilon epsilon-low-rate
  kwrap rename runs/epsilon epsilon-low-rate
""")
@click.argument("name", metavar="RUN")
@click.argument("new_name", metavar="NEW")
@site_option
def command(name: str, new_name: str, site_file: Path | None) -> None:
    """Give a run another name, beside where it lies.

    Its folder is renamed; its checkpoints keep the name that the run was made with. Refused while a process holds the
    run. A folder that was moved or renamed by hand is the same run, too.
    """
    from kohaku_wrap.training.records.networks import is_finished
    from kohaku_wrap.training.supervising.housekeeping import rename_run

    run = open_run(name, site_file)
    moved = rename_run(run, new_name)
    following = "verify" if is_finished(moved) else "resume"
    rows = [("run", moved.folder), ("was", run.folder), ("checkpoints", f"{moved.output_name}…, as before")]
    payload = {"run": moved.folder, "was": run.folder}
    print_answer(payload, f"Renamed to {moved.name}", rows, command_line(following, show_path(moved.folder)))
