"""`kwrap demo`: the embedded world."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from kohaku_wrap.cli.options import PATH
from kohaku_wrap.cli.output import print_answer, progress_bar, verb
from kohaku_wrap.errors import command_line
from kohaku_wrap.wording import show_bytes


@verb("""
  kwrap demo world
  kwrap demo world --posts 1000 --seed 7
""")
@click.argument("folder", metavar="DIR", type=PATH)
@click.option(
    "--posts", type=click.IntRange(min=1), default=240, show_default=True, metavar="N", help="Posts in the database."
)
@click.option("--seed", type=int, metavar="S", default=0, show_default=True, help="Another seed makes another world.")
def command(folder: Path, posts: int, seed: int) -> None:
    """Make an embedded world: database, tars and a tiny SDXL.

    DIR then holds danbooru.db, tars/, base/ and site.toml: all that the other commands need to
    run the whole recipe in minutes, without a GPU or a download. The same posts and seed make the
    same bytes; a world that is there already is kept.
    """
    from kohaku_wrap.demo.world import make_world

    with progress_bar("pictures", "posts") as report:
        world = make_world(folder, posts, seed, on_progress=report)
    payload = {**asdict(world), "site": world.folder / "site.toml"}
    rows = [
        ("folder", world.folder),
        ("posts", world.posts),
        ("files in tars", f"{world.images:,} in {world.tars:,} tars"),
        ("base model", world.folder / "base" / "model.safetensors"),
        ("size", show_bytes(world.size_bytes)),
    ]
    database, selection = world.folder / "danbooru.db", world.folder / "demo.parquet"
    title = "Embedded world, there already" if world.kept else "Embedded world"
    print_answer(payload, title, rows, command_line("select", "demo", "--db", database, "--out", selection))
