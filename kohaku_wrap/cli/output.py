"""How every verb prints: results on stdout, progress and errors on stderr, one JSON document on request."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kohaku_wrap.files import Progress

if TYPE_CHECKING:
    import rich.progress

SCHEMA_VERSION = 1
PLAIN_LINE_EVERY_SECONDS = 10

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
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else escape(str(value))
        table.add_row(name, shown)
    console = Console(highlight=False)
    console.print(table)
    if next_step:
        console.print(f"Next: {next_step}", soft_wrap=True, markup=False)


@contextmanager
def progress_bar(description: str, unit: str = "", quiet: bool = False) -> Iterator[Progress]:
    """Yield a callback `(done, total)` that draws a bar with rate and ETA on stderr.

    `unit` "bytes" shows sizes. Off a terminal a plain line is printed every ten seconds; with `quiet`
    (as under `--json`) nothing is.
    """
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with live_bar(size=unit == "bytes") as bar:
            task = bar.add_task(description, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield plain_lines(description, unit)


def plain_lines(description: str, unit: str) -> Progress:
    """A callback that prints a line of progress at most every ten seconds."""
    started = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_LINE_EVERY_SECONDS:
            return
        last = now
        scale, name = (1_000_000, "MB") if unit == "bytes" else (1, unit)
        rate = done / max(now - started, 1e-9)
        left_seconds = (total - done) / rate if rate else 0.0
        counts = f"{done / scale:,.0f} of {total / scale:,.0f} {name}, {rate / scale:,.0f}/s"
        print_note(f"{description}: {counts}, {left_seconds:,.0f} s left")

    return report


def live_bar(size: bool) -> rich.progress.Progress:
    """A bar that leaves nothing behind; `size` shows bytes instead of counts."""
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class RateColumn(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            return Text(f"{task.speed:,.0f}/s" if task.speed else "")

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.DownloadColumn() if size else progress.MofNCompleteColumn(),
        progress.TransferSpeedColumn() if size else RateColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
