"""Options that several verbs share, and what they mean."""

from __future__ import annotations

from pathlib import Path

import click

from kohaku_wrap.cli.output import print_note

DEFAULT_SITE = Path("site.toml")

site_option = click.option(
    "--site", "site_file", type=click.Path(path_type=Path), default=None, help="Whose runs folder to look in."
)

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A value above all layers; repeatable."
)

threads_option = click.option(
    "--threads", type=click.IntRange(min=0), default=0, metavar="N", help="Worker threads; 0 for one each processor."
)


def runs_folders(site_file: Path | None) -> tuple[Path, ...]:
    """Where runs are looked for: the site's folder, and `runs` here."""
    from kohaku_wrap.config.site import load_site

    folders = [Path("runs")]
    if site_file is not None or DEFAULT_SITE.is_file():
        folders.insert(0, load_site(site_file or DEFAULT_SITE).paths.runs)
    return tuple(dict.fromkeys(folder.absolute() for folder in folders))


def note_compiling() -> None:
    """Say that a merge will take longer where its loops are not compiled yet."""
    from kohaku_wrap.merging.kernels import loops_are_compiled

    if not loops_are_compiled():
        print_note("note: the first merge of an installation compiles its loops first, for some ten seconds")
