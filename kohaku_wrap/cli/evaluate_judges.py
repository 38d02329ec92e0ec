"""`kwrap evaluate judges`: which kinds of judges there are, and small ones for a first try."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kohaku_wrap.cli.output import json_option, print_answer, wants_json
from kohaku_wrap.errors import command_line
from kohaku_wrap.outlets import go_on_without_reader

SMALL_TAGS = ("1girl", "1boy", "solo", "smile", "long_hair", "scenery", "no_humans", "sky")


@click.command(
    epilog="""
\b
Examples:
  kwrap evaluate judges
  kwrap evaluate judges --small judges
"""
)
@click.option(
    "--small", "folder", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Build a small judge of each kind there, for tests.",
)  # fmt: skip
@json_option
def judges(folder: Path | None) -> None:
    """List the kinds of judges, their files, and where to get them.

    A judge is a folder of ONNX files, in the layout in which they are published. kwrap fetches nothing: download the
    folder and name it with --judge. A judge of your own is a folder with a judge.toml: kind, and what differs of size,
    resize, interpolation, layout, channels, scale, mean, deviation, output, labels, threshold, model, title.
    """
    from kohaku_wrap.evaluation.judges import KINDS

    made: list[Path] = []
    if folder is not None:
        go_on_without_reader(is_document=wants_json())
        from kohaku_wrap.evaluation.small_judges import build_small_judges

        made = build_small_judges(folder, SMALL_TAGS)
    kinds = [
        {"kind": kind.name, "measures": kind.measures, "files": kind.files, "published": kind.published}
        for kind in KINDS.values()
    ]
    rows: list[tuple[str, Any]] = [("small judge, for tests", path) for path in made]
    for kind in KINDS.values() if not made else ():
        rows += [
            (kind.name, kind.measures),
            ("  files", ", ".join(kind.files)),
            ("  published", kind.published),
        ]
    following = ("evaluate", "judge", "SHEET_DIR", "--judge", made[0] if made else "FOLDER")
    print_answer("evaluate judges", {"kinds": kinds, "made": made}, "Judges", rows, command_line(*following))
