"""How every verb prints: results on stdout, progress and errors on stderr, one JSON document on request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from kohaku_wrap.files import Progress

SCHEMA_VERSION = 1

Function = TypeVar("Function", bound=Callable[..., Any])


def json_option(function: Function) -> Function:
    """Add `--json` (parameter `as_json`)."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")(function)


def print_json(command: str, payload: dict[str, Any]) -> None:
    """Print the one document of `--json`."""
    document = {"schema_version": SCHEMA_VERSION, "command": command, **payload}
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, default=str))


def print_error(message: str, next_step: str = "") -> None:
    """Print a failure on stderr: what was wrong, then what to do next."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
    if next_step:
        click.echo(next_step, err=True)


def print_note(text: str) -> None:
    """Print something worth knowing on stderr."""
    click.echo(text, err=True)


def print_table(title: str, rows: list[tuple[str, Any]], next_step: str = "") -> None:
    """Print a title, aligned name and value pairs, and the next command to try, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    console = Console(highlight=False)
    console.print(table)
    if next_step:
        console.print(f"Next: {next_step}", soft_wrap=True, markup=False)


@contextmanager
def progress_bar(description: str, unit: str = "", quiet: bool = False) -> Iterator[Progress]:
    """Yield a callback `(done, total)` that draws a bar with rate and ETA on stderr.

    `unit` "bytes" shows sizes. Off a terminal, or with `quiet` (as under `--json`), a plain line
    is printed at most every ten seconds, or nothing.
    """
    import sys
    import time

    if quiet or not sys.stderr.isatty():
        started = last = time.monotonic()

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if quiet or now - last < 10:
                return
            last = now
            rate = done / max(now - started, 1e-9)
            eta_seconds = (total - done) / rate if rate else 0
            print_note(f"{description}: {done:,} of {total:,} {unit}, {rate:,.0f}/s, {eta_seconds:,.0f} s left")

        yield report
        return

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress as Bar, TextColumn, TimeRemainingColumn
    from rich.progress import ProgressColumn, Task, TransferSpeedColumn

    class Rate(ProgressColumn):
        def render(self, task: Task) -> str:  # type: ignore[override]
            return f"{task.speed:,.0f}/s" if task.speed else ""

    size = unit == "bytes"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn() if size else MofNCompleteColumn(),
        TransferSpeedColumn() if size else Rate(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
