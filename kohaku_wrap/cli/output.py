"""How every verb prints: results on stdout, progress and errors on stderr, one JSON document on request."""

from __future__ import annotations

import codecs
import json
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kohaku_wrap.files import Progress
from kohaku_wrap.outlets import go_on_without_reader
from kohaku_wrap.wording import show_bytes, show_path

if TYPE_CHECKING:
    import rich.progress

SCHEMA_VERSION = 1
WANTS_JSON = "as_json"
PLAIN_LINE_EVERY_SECONDS = 10
SHARE_BEFORE_RATE = 0.005
NAME_SHARE = 0.4
"""Of a terminal's width, for the names of a table whose values must be broken."""

STEERING = (*range(32), *range(127, 160), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
"""Characters that steer a terminal, end a line or turn the direction of what follows."""

ESCAPES = {code: repr(chr(code))[1:-1] for code in STEERING}
"""How Python writes them: what stands in a file shall not steer a terminal."""

ESCAPES_IN_LINES = {code: text for code, text in ESCAPES.items() if chr(code) not in "\n\t"}
ESCAPES_IN_JSON = {code: f"\\u{code:04x}" for code in STEERING if code >= 32}
"""JSON itself escapes those below 32 in strings; outside of strings it has none of the others."""

KEPT_TOGETHER = re.compile(
    r"`[^`]*`|(?<!error: )(?<=: )kwrap (?:(?!\. ).)*|\S: \d[\d,.]*|\d (?:%|(?:[kMGT]?B|s|min|h|d)\b)|[<>] \d"
)


def wants_json() -> bool:
    """Whether the command that runs was given `--json`."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(WANTS_JSON))


class Verb(click.Command):
    """A command that shows examples and has `--json`.

    Where its purpose is more than what it prints, files or a verdict in its exit code, it goes on when nobody reads it
    any more.
    """

    def __init__(
        self, name: str | None, examples: str, writes: bool = True, unless: Sequence[str] = (), **settings: Any
    ) -> None:
        """`writes`: whether its purpose is more; not with the parameters of `unless`, such as `dry_run`."""
        several = len(re.findall(r"^  \S", examples, re.MULTILINE)) > 1
        heading = "Examples" if several else "Example"
        super().__init__(name, epilog="\b\n{}:\n{}".format(heading, examples.strip("\n")), **settings)
        self.writes, self.unless = writes, unless
        self.first_example = re.sub(r"\s*\\\n\s*", " ", examples).strip().partition("\n")[0]
        self.params.append(click.Option(
            ["--json", WANTS_JSON], is_flag=True, expose_value=False, help="Print one JSON document and nothing else.",
            callback=lambda context, _option, value: context.meta.update({WANTS_JSON: value}),
        ))  # fmt: skip

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        if self.writes and not any(ctx.params.get(name) for name in self.unless):
            go_on_without_reader(is_document=wants_json())
        return super().invoke(ctx)


def verb(examples: str, writes: bool = True, unless: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Verb]:
    """Make a function the command that it is called like, as Verb says."""
    return click.command(cls=Verb, examples=examples, writes=writes, unless=unless)


def print_json(payload: dict[str, Any]) -> None:
    """Print the one document of `--json`, with the words of the command that runs."""
    command = click.get_current_context().command_path.partition(" ")[2]
    document = {"schema_version": SCHEMA_VERSION, "command": command, **payload}
    # JSON is UTF-8; a terminal of another encoding gets it in ASCII, which is both.
    is_other = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
    click.echo(json.dumps(document, indent=2, ensure_ascii=is_other, default=str).translate(ESCAPES_IN_JSON))


def paint(text: str, **style: Any) -> str:
    """The text in colour, unless NO_COLOR is set; click takes it off again where the output is no terminal."""
    return text if os.environ.get("NO_COLOR") else click.style(text, **style)


def print_error(message: str, next_step: str = "") -> None:
    """Print a failure on stderr: what was wrong, then what to do next."""
    print_lines(f"error: {message}", err=True, fg="red", bold=True)
    if next_step:
        print_lines(next_step, err=True)


def print_note(text: str) -> None:
    """Print something worth knowing on stderr."""
    print_lines(text, err=True)


def print_aside(text: str) -> None:
    """Print on stderr what only a person wants beside the answer; nothing with `--json`."""
    if not wants_json():
        print_note(text)


def print_notes(notes: Iterable[str], kind: str = "note") -> None:
    """Print each of these on stderr as of this kind, such as `warning`; nothing with `--json`."""
    for note in notes:
        print_aside(f"{kind}: {note}")


def print_lines(text: str, err: bool = False, **style: Any) -> None:
    """Print lines, broken between words on a terminal; `style` is that of the first word."""
    text = text.translate(ESCAPES_IN_LINES)
    if (sys.stderr if err else sys.stdout).isatty():
        width = shutil.get_terminal_size().columns
        text = "\n".join(wrap_line(line, width) for line in text.split("\n"))
    first, space, rest = text.partition(" ")
    click.echo(f"{paint(first, **style)}{space}{rest}" if style else text, err=err)


def wrap_line(line: str, width: int) -> str:
    """One line, broken between words, with later lines under its text or its second column.

    What stands in backticks, a command behind a colon, a count and its name, and a number and its unit are kept
    together, and no word is broken, so that commands and paths can be copied.
    """
    if len(line) <= width:
        return line
    column = re.match(r" *(?:\S+(?: [kMGT]?B)? {2,})?", line)
    hang = min(column.end() if column else 0, width // 2)
    # NUL stands for a space that must not be broken at.
    kept = KEPT_TOGETHER.sub(lambda part: part[0].replace(" ", "\0"), line[hang:])
    pieces = textwrap.wrap(kept, width - hang, break_long_words=False, break_on_hyphens=False)
    return (line[:hang] + f"\n{' ' * hang}".join(pieces)).replace("\0", " ")


def print_answer(payload: dict[str, Any], title: str, rows: Iterable[tuple[str, Any]], next_step: str = "") -> None:
    """Print what a verb found or did: the one document of `--json`, or a table."""
    if wants_json():
        print_json(payload)
    else:
        print_table(title, list(rows), next_step)


def list_first(name: str, values: Sequence[str], most: int = 5) -> list[tuple[str, Any]]:
    """Rows of a table for the first of these, and how many more there are."""
    rows: list[tuple[str, Any]] = [(name, value) for value in values[:most]]
    return rows + [(name, f"{len(values) - most:,} more")] * (len(values) > most)


def print_table(title: str, rows: list[tuple[str, Any]], next_step: str = "") -> None:
    """Print a title, aligned name and value pairs, and the next command to try, on stdout.

    On a terminal long values are broken within their column, paths never, and a name that would leave no room for them
    stands on a line of its own; elsewhere each row is one line.
    """
    shown = [(name.translate(ESCAPES), show_value(value).translate(ESCAPES)) for name, value in rows]
    breakable = {place for place, (_, value) in enumerate(rows) if not isinstance(value, Path)}
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    longest = max((len(name) for name, _ in shown), default=0)
    if any(longest + 2 + len(shown[place][1]) > columns for place in breakable):
        longest = max((len(name) for name, _ in shown if len(name) <= columns * NAME_SHARE), default=0)
    indent = " " * (longest + 2)
    if title:
        click.echo(paint(title.translate(ESCAPES), bold=True))
    for place, (name, text) in enumerate(shown):
        if len(name) > longest:
            click.echo(paint(name, fg="cyan"))
            name = ""
        if place in breakable:
            text = wrap_line(text, max(columns - len(indent), 20)).replace("\n", f"\n{indent}")
        click.echo(f"{paint(name.ljust(len(indent)), fg='cyan')}{text}".rstrip())
    if next_step:
        print_next(next_step)


def print_next(command: str) -> None:
    """Print the next command to try on stdout, unbroken, so that it can be copied; nothing with `--json`."""
    if not wants_json():
        click.echo(f"Next: {command.translate(ESCAPES)}")


def show_value(value: Any) -> str:
    """A value of a table: numbers with their thousands, paths as one would type them."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return show_path(value) if isinstance(value, Path) else str(value)


@contextmanager
def progress_bar(description: str, unit: str = "") -> Iterator[Progress]:
    """Yield a callback `(done, total)` that draws a bar with rate and ETA on stderr.

    `unit` "bytes" shows sizes. Off a terminal a plain line is printed every ten seconds; with `--json` nothing is.
    """
    if wants_json():
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with live_bar(size=unit == "bytes") as bar:
            task = bar.add_task(description, total=None, visible=False)
            yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
    else:
        yield plain_lines(description, unit)


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """Show on a terminal that work goes on which cannot be counted, and for how long."""
    if wants_json() or not sys.stderr.isatty():
        yield
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task(description, total=None)
        yield


class ByteCount:
    """Adds up bytes that are told one piece after another."""

    def __init__(self, report: Progress, total: int) -> None:
        self.report = report
        self.total = total
        self.done = 0

    def __call__(self, size_bytes: int) -> None:
        self.done += size_bytes
        self.report(self.done, max(self.total, self.done))


@contextmanager
def counting_bytes(description: str, total: int) -> Iterator[ByteCount]:
    """Yield what is called with the size of each piece that was read, and draws a bar."""
    with progress_bar(description, "bytes") as report:
        yield ByteCount(report, total)


def show_rate(rate: float, is_size: bool = False) -> str:
    """A number a second, whole or with two digits; of things that take long, as pictures do, the seconds of each."""
    if 0 < rate < 0.5 and not is_size:
        return f"{1 / rate:,.0f} s each"
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"


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
        shown = show_rate(rate / scale, is_size=unit == "bytes")
        left_seconds = (total - done) / rate if rate else 0.0
        counts = f"{description}: {done / scale:,.0f} of {total / scale:,.0f} {name}"
        too_early = done < total * SHARE_BEFORE_RATE
        print_note(counts if too_early else f"{counts}, {shown}, {left_seconds:,.0f} s left")

    return report


def live_bar(size: bool) -> rich.progress.Progress:
    """A bar that leaves nothing behind; `size` shows bytes instead of counts."""
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class RateColumn(progress.ProgressColumn):
        def render(self, task: progress.Task) -> Text:
            speed = task.speed or 0.0
            return Text("" if not speed else f"{show_bytes(int(speed))}/s" if size else show_rate(speed))

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.DownloadColumn() if size else progress.MofNCompleteColumn(),
        RateColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
