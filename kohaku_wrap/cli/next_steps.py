"""The next command to try in the making of a dataset, with the paths of the site file that lies near."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from kohaku_wrap.config.site import SitePaths, load_site
from kohaku_wrap.errors import KwrapError, command_line
from kohaku_wrap.wording import show_path

FILES_LOOKED_AT = 10_000
"""Of a folder of metadata, in which images may lie: millions would take minutes."""


def find_site(near: Path) -> Path | None:
    """The `site.toml` of this folder, else of the current one; None where neither has one."""
    return next((file for file in (near / "site.toml", Path("site.toml")) if file.is_file()), None)


def read_site_paths(near: Path) -> SitePaths | None:
    """The paths of the site file near this folder; None where there is none, or one with faults."""
    file = find_site(near)
    try:
        return load_site(file).paths if file else None
    except KwrapError:
        return None


def extract_command(selection: Path, images: Path | None = None, db: Path | None = None) -> str:
    """`kwrap extract`; words in capitals stand for what no site file tells. `db`: posts' images may lie beside it."""
    from kohaku_wrap.dataset.images.extracted import IMPORTED_FILE
    from kohaku_wrap.dataset.images.tar_layouts import is_image_of_post

    paths = read_site_paths(selection.parent)
    tars = show_path(paths.tars) if paths and paths.tars.is_dir() else "TARS"
    if db and db.is_dir() and any(is_image_of_post(path.name) for path in islice(db.rglob("*"), FILES_LOOKED_AT)):
        tars = str(db)
    is_own = paths and (paths.images / IMPORTED_FILE).exists()
    folder = images or (show_path(paths.images) if paths and not is_own else "IMAGES")
    return command_line("extract", selection, "--tars", tars, "--out", folder)


def caption_command(selection: Path, images: Path) -> str:
    """`kwrap caption`; `DB` stands for a database that no site file tells."""
    paths = read_site_paths(selection.parent)
    database = show_path(paths.db) if paths and paths.db.is_file() else "DB"
    return command_line("caption", selection, "--db", database, "--out", images)


def plan_command(template: str, near: Path) -> str:
    """`kwrap plan` with the site file near this folder."""
    return command_line("plan", template, "--site", find_site(near) or "site.toml")
