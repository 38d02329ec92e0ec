"""`kwrap remove`: a run's folder taken away, its networks kept."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kohaku_wrap.cli.options import open_run, site_option
from kohaku_wrap.cli.output import (
    print_answer,
    print_note,
    verb,
    wants_json,
)
from kohaku_wrap.errors import KwrapError, UsageError, command_line
from kohaku_wrap.wording import count_of, show_bytes, show_path


@verb("""
  kwrap remove smoke-test
  kwrap remove runs/smoke-test --yes --checkpoints
""")
@click.argument("name", metavar="RUN")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--checkpoints", "with_checkpoints", is_flag=True, help="Remove its networks, too.")
@site_option
def command(name: str, yes: bool, with_checkpoints: bool, site_file: Path | None) -> None:
    """Remove a run: states, ledger, logs and what was abandoned.

    Asks first. Its networks stay in RUN/checkpoints/ with the run's lock beside them, unless --checkpoints is given.
    A run that others came from is not removed, nor one that a process holds.
    """
    from kohaku_wrap.training.supervising.housekeeping import plan_removal, remove_run

    removal = plan_removal(open_run(name, site_file), with_checkpoints)
    run = removal.run
    kept = (
        f"{count_of(len(run.network_files), 'network')} in {show_path(run.checkpoints)}" if removal.kept else "nothing"
    )
    if not yes:
        if wants_json() or not sys.stdin.isatty():
            again = command_line("remove", show_path(run.folder), "--yes", *["--checkpoints"] * with_checkpoints)
            raise UsageError(f"{show_path(run.folder)}: not removed, as nobody can be asked", f"Type: {again}")
        print_note(f"{show_path(run.folder)}: {show_bytes(removal.size_bytes)} will be removed; kept: {kept}")
        if not click.confirm(f"Remove run {run.name}?", err=True):
            raise KwrapError(f"{show_path(run.folder)}: not removed", "Nothing was changed.")
    remove_run(removal)
    payload = {"run": run.folder, "removed_bytes": removal.size_bytes, "kept": list(removal.kept)}
    rows = [("room made", show_bytes(removal.size_bytes)), ("kept", kept)]
    print_answer(payload, f"Removed {run.name}", rows, "kwrap status")
