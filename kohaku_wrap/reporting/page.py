"""The page: facts and charts put into one HTML file that needs nothing else and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import re
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import kohaku_wrap
from kohaku_wrap.errors import KwrapError, command_line, reason_of
from kohaku_wrap.files import write_text
from kohaku_wrap.formats.machine_paths import clean_value
from kohaku_wrap.merging.inspecting import inspect_file, short_metadata
from kohaku_wrap.reporting.charts import Mark, colour_of, draw_chart
from kohaku_wrap.reporting.curves import AXES, TITLES, Piece
from kohaku_wrap.reporting.facts import RunFacts, describe_machine, list_versions, next_command, read_facts
from kohaku_wrap.reporting.pictures import refer
from kohaku_wrap.reporting.story import show_time
from kohaku_wrap.reporting.way import follow_file
from kohaku_wrap.training.comparing.other_lock import compare_options
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.verification import judge_verification
from kohaku_wrap.training.supervising.status import read_status
from kohaku_wrap.wording import format_duration

HERE = Path(__file__).parent
PAGE_FILE = "report.html"
"""Of a run, in its folder."""

SCHEMA_VERSION = 1
STEERING = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
"""Unicode's kinds of characters that steer a line or its direction, or are none."""

RELOAD_SECONDS = 20

OWN_NAME = re.compile(rf"\b{re.escape(platform.node())}\b" if len(platform.node()) > 1 else r"(?!)")
"""The machine's name on a network, as a word; a letter alone is none."""


def make_visible(value: Any) -> Any:
    """A value for the page: characters that would steer its text are written as escapes, None as nothing."""
    if value is None:
        return ""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    if value.isascii() and value.isprintable():
        return value
    return "".join(
        repr(sign)[1:-1] if unicodedata.category(sign) in STEERING and sign != "\n" else sign for sign in value
    )


def make_public(value: Any) -> Any:
    """A value for the page without the machine's paths and name, and visible as `make_visible` has it."""
    if isinstance(value, Markup):
        return value
    value = clean_value(value)
    return make_visible(OWN_NAME.sub("…", value) if isinstance(value, str) else value)


def embed_json(document: Any, *, is_public: bool = False) -> Markup:
    """A document as JSON that cannot end the element it stands in; `is_public`: without paths of the machine."""
    try:
        text = json.dumps(document, separators=(",", ":"), default=str, allow_nan=False)
    except ValueError:
        # What JSON has no word for; json itself reads the words that it wrote.
        loose = json.loads(json.dumps(document, default=str), parse_constant=str)
        text = json.dumps(loose, separators=(",", ":"), allow_nan=False)
    if is_public:
        text = OWN_NAME.sub("…", json.dumps(clean_value(json.loads(text)), separators=(",", ":")))
    return Markup(text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}))


def hash_source(text: str) -> str:
    """The source as a content policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def make_policy(style: str, script: str) -> str:
    """Nothing but this style, this script, and pictures in the page or beside it."""
    return (
        f"default-src 'none'; style-src {hash_source(style)}; script-src {hash_source(script)}; "
        "img-src 'self' file: data:; base-uri 'none'; form-action 'none'"
    )


def render(
    template: str,
    title: str,
    document: Mapping[str, Any],
    reload_seconds: int = 0,
    *,
    is_public: bool = False,
    **values: Any,
) -> str:
    """One page of this folder's template, with its JSON inside; `is_public`: without paths of the machine."""
    document = {"schema_version": SCHEMA_VERSION, "runs": [], **document}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        finalize=make_public if is_public else make_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"show_time": show_time, "format_duration": format_duration, "command_line": command_line}
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    text = environment.get_template(template).render(
        title=title,
        policy=make_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        embedded=embed_json(document, is_public=is_public),
        reload_seconds=reload_seconds,
        is_public=is_public,
        made="" if is_public else show_time(time.time()),
        version=kohaku_wrap.__version__,
        **values,
    )
    return text.encode("utf-8", "backslashreplace").decode()


def compose_page(runs: Sequence[Run], folder: Path | None, *, is_live: bool = False) -> str:
    """The page of these runs, to lie in `folder`.

    None for one to publish: alone, without the machine's paths, and the same for the same records. Raises what reading
    them raises.
    """
    several = len(runs) > 1
    facts = [read_facts(run, place, several, folder) for place, run in enumerate(runs)]
    differing = list_differing(runs)
    document = {
        "kwrap_version": kohaku_wrap.__version__,
        "made_unix_seconds": None if folder is None else time.time(),
        "runs": [each.document(is_public=folder is None) for each in facts],
        "options_that_differ": [{"option": key, "values": values} for key, values in differing],
    }
    is_running = any(each.status.condition in ("running", "new") for each in facts)
    return render(
        "page.html",
        " | ".join(each.run.name for each in facts),
        document,
        RELOAD_SECONDS if is_live and is_running else 0,
        is_public=folder is None,
        runs=facts,
        axes=AXES,
        charts=list(draw_all(facts)),
        differing=differing,
        machine=describe_machine,
        versions=list_versions,
        next_command=next_command,
        draw_bars=draw_bars,
    )


def draw_bars(counts: Mapping[str, int] | Sequence[tuple[str, int]]) -> list[tuple[str, int, float]]:
    """Name, number and the width of a bar in percent of the largest."""
    pairs = list(counts.items() if isinstance(counts, Mapping) else counts)
    largest = max((number for _, number in pairs), default=1) or 1
    return [(name, number, 100 * number / largest) for name, number in pairs]


def list_differing(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Every option that is not the same in all runs, with its value in each; None where it is not set."""
    values: dict[str, list[Any]] = {}
    for place, other in enumerate(runs[1:], 1):
        for key, first, here in compare_options(runs[0].lock.tables, other.lock.tables):
            values.setdefault(key, [first] * len(runs))[place] = here
    return sorted(values.items())


def draw_all(facts: Sequence[RunFacts]) -> Any:
    """Each chart with its title, legend and one drawing an axis; all runs laid over each other."""
    for name, (title, note) in TITLES.items():
        pieces = [piece for each in facts for piece in each.curves.get(name, ())]
        if not pieces:
            continue
        marks = [mark for each in facts for mark in each.marks]
        yield {
            "name": name,
            "title": title,
            "note": note,
            "legend": list_legend(pieces, len(facts)),
            "has_left": any(not piece.kept for piece in pieces),
            "drawings": {axis: draw_one(name, title, axis, pieces, marks, len(facts)) for axis in AXES},
        }


def draw_one(name: str, title: str, axis: str, pieces: Sequence[Piece], marks: Sequence[Mark], runs: int) -> Markup:
    """One chart over one axis."""
    lowest, highest = min(min(each.low) for each in pieces), max(max(each.high) for each in pieces)
    told = f"{title} over {AXES[axis]}: from {lowest:.4g} to {highest:.4g}"
    return draw_chart(pieces, marks, axis, make_visible(told), runs, from_zero=name not in ("loss", "held_out"))


def list_legend(pieces: Sequence[Piece], runs: int) -> list[tuple[int, str]]:
    """Colour and words of what the chart shows: runs, columns or attempts."""
    several = len({piece.label for piece in pieces}) > 1
    entries: Mapping[str, int] = {
        piece.label if runs > 1 or several else f"attempt {piece.attempt}": colour_of(piece, pieces, runs)
        for piece in pieces
    }
    return [(colour, label) for label, colour in entries.items()]


def write_index(runs: Sequence[Run], path: Path) -> list[str]:
    """Write one page over all these runs; what is wrong with those that cannot be read."""
    folder = path.absolute().parent
    rows, unreadable = [], []
    for run in runs:
        try:
            status = read_status(run)
            verdict = judge_verification(run, list_attempts(run))
            rows.append((run, status, verdict, refer(run.folder / PAGE_FILE, folder)))
        except (KwrapError, OSError) as error:
            unreadable.append(f"{run.name}: {error.message if isinstance(error, KwrapError) else reason_of(error)}")
    index = [
        {"name": run.name, "condition": status.condition, "optimizer_step": status.optimizer_step,
         "standing": verdict.standing} for run, status, verdict, _ in rows
    ]  # fmt: skip
    write_text(path, render("index.html", f"{len(rows)} runs", {"index": index}, rows=rows, unreadable=unreadable))
    return unreadable


def write_file_page(file: Path, path: Path) -> None:
    """Write the page of a checkpoint or network: its recipe, parents and lineage; the header alone is read."""
    report = inspect_file(file, hashed=False)
    steps = list(follow_file(report))
    document = {"file": file.name, "way": [asdict(each) for each in steps]}
    metadata = sorted(short_metadata(report.header.metadata).items())
    write_text(path, render("file.html", file.name, document, report=report, steps=steps, metadata=metadata))


def write_page(runs: Sequence[Run], path: Path, *, is_live: bool = False) -> None:
    """Write the page of these runs, whole or not at all."""
    write_text(path, compose_page(runs, path.absolute().parent, is_live=is_live))
