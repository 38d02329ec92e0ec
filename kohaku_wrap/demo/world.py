"""Make the embedded world: a metadata database, image tars, a tiny SDXL and the site that names them.

The database has danbooru2023's layout v3 with all its columns.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import kohaku_wrap
from kohaku_wrap.demo.base_model import write_base_model
from kohaku_wrap.demo.pictures import encode_file, write_shards
from kohaku_wrap.demo.posts import DemoPost, Rolls, make_posts
from kohaku_wrap.demo.tokenizers import write_tokenizers
from kohaku_wrap.demo.vocabulary import list_tags
from kohaku_wrap.errors import UsageError, refusing
from kohaku_wrap.files import Progress, fsync_folder, has_size, parse_json
from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.locks import take_lock
from kohaku_wrap.metadata.new_database import write_new_database

RECORD = "demo.json"
"""Says what the folder is; given its name last, so that it stands for a whole world."""

ENTRIES = ("danbooru.db", "tars", "base", "site.toml", RECORD)
"""What is made at the top of the folder, in the order in which it gets its name."""

SITE: dict[str, dict[str, Any]] = {
    "paths": {
        "db": "danbooru.db",
        "tars": "tars",
        "images": "images",
        "base_model": "base/model.safetensors",
        "tokenizers": "base/tokenizers",
        "runs": "runs",
    },
    "machine": {"engine": "builtin", "gpus": 0, "batch_per_gpu": 4, "workers": 2},
}
SITE_COMMENT = "# What is true of this machine. The paths are relative to this file; gpus = 0 trains on the CPU.\n"


@dataclass(frozen=True)
class World:
    """What an embedded world holds."""

    folder: Path
    """Where it lies."""

    posts: int
    """Rows of its post table."""

    seed: int
    """All of it is a function of the posts and this."""

    images: int
    """Files in its tars."""

    tars: int
    """Tars that hold them."""

    size_bytes: int
    """Of all its files."""

    kept: bool
    """True when it was there already and nothing was written."""


class WorldInTheWay(UsageError):
    """The folder holds something else that a new world would overwrite."""


def make_world(folder: Path, posts: int = 240, seed: int = 0, on_progress: Progress | None = None) -> World:
    """Make the world in `folder`, or find it there whole; the same bytes for the same posts and seed.

    Raises WorldInTheWay when the folder holds another world or files of the same names.
    """
    if folder.exists() and not folder.is_dir():
        raise WorldInTheWay(f"{folder} is a file", "Name a folder: kwrap demo DIR")
    folder_was_there = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not take_lock(descriptor, folder):
            raise WorldInTheWay(
                f"{folder}: another `kwrap demo` makes a world there now", "Wait for it, or choose another folder."
            )
        return make_world_alone(folder, folder_was_there, posts, seed, on_progress)
    finally:
        os.close(descriptor)


def make_world_alone(
    folder: Path, folder_was_there: bool, posts: int, seed: int, on_progress: Progress | None
) -> World:
    """`make_world` in a folder that is there and that no other process makes a world in."""
    if (found := find_world(folder, posts, seed)) is not None:
        return found
    if present := [name for name in ENTRIES if (folder / name).exists()]:
        raise WorldInTheWay(
            f"{folder} holds {', '.join(present)} already, and not as a whole embedded world",
            "Choose another folder, or remove them first.",
        )
    part = folder / ".demo.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        world = write_world(part, folder, posts, seed, on_progress)
        for name in ENTRIES:
            (part / name).rename(folder / name)
        part.rmdir()
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = error.filename or str(folder)
        for path in (part, *(folder / name for name in ENTRIES)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if not folder_was_there:
            folder.rmdir()
        raise
    fsync_folder(folder)
    return world


def find_world(folder: Path, posts: int, seed: int) -> World | None:
    """The whole world of these posts and this seed in `folder`, or None where there is none.

    Raises WorldInTheWay for another world, and for one whose files are gone or changed in size.
    """
    record = folder / RECORD
    if not record.is_file():
        return None
    remove = "Choose another folder, or remove this one first."
    with refusing(WorldInTheWay, f"{record} is not the record of an embedded world", remove):
        found = parse_json(record.read_text(encoding="utf-8"))
        world, sizes = World(**{**found["world"], "folder": folder, "kept": True}), dict(found["size_bytes"])
    if (world.posts, world.seed) != (posts, seed):
        raise WorldInTheWay(f"{folder} is a world of {world.posts} posts and seed {world.seed}", remove)
    for name, size_bytes in sizes.items():
        if not has_size(folder / name, size_bytes):
            raise WorldInTheWay(f"{folder / name} is gone or was changed since the world was made", remove)
    return world


def write_world(part: Path, folder: Path, posts: int, seed: int, on_progress: Progress | None) -> World:
    """Write all entries into the empty folder `part`; the record names them as they will lie in `folder`."""
    made = list(make_posts(posts, seed))
    files: dict[str, bytes] = {}
    sizes: dict[int, int] = {}
    for index, post in enumerate(made):
        if post.in_tars:
            content = encode_file(post, seed)
            files[f"{post.id}.{post.file_ext}"] = content
            sizes[post.id] = len(content)
        if on_progress:
            on_progress(index + 1, posts)
    tars = write_shards(part / "tars", files)
    write_database(part / "danbooru.db", made, sizes, seed)
    write_base_model(part / "base", seed)
    write_tokenizers(part / "base" / "tokenizers", list_texts(made))
    (part / "site.toml").write_text(SITE_COMMENT + toml_text(SITE), encoding="utf-8")
    # The site is for people to change; all else stays as it was made.
    in_record = {
        str(path.relative_to(part).as_posix()): path.stat().st_size
        for path in sorted(part.rglob("*"))
        if path.is_file() and path.name != "site.toml"
    }
    world = World(folder, posts, seed, len(files), len(tars), sum(in_record.values()), kept=False)
    kept = {name: value for name, value in asdict(world).items() if name not in ("folder", "kept")}
    record = {"kwrap_version": kohaku_wrap.__version__, "world": kept, "size_bytes": in_record}
    (part / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return world


POPULARITY_A_POST = 35
"""The world is a thousandth of the site; popularities stay large enough to spread over 100 and 1000."""


def write_database(path: Path, posts: Sequence[DemoPost], file_sizes: Mapping[int, int], seed: int) -> None:
    """Write the posts, tags and relations to `path`; `file_sizes` in bytes of the posts that are in the tars."""
    tags = list_tags()
    id_of_tag = {tag.name: tag.id for tag in tags}
    uses = Counter(name for post in posts for name in set(post.tags))
    parents = {post.parent_id for post in posts if post.parent_id is not None}
    write_new_database(
        path,
        (make_row(post, post.id in parents, file_sizes.get(post.id, 250_000), seed) for post in posts),
        ((tag.id, tag.name, tag.type, uses[tag.name] * POPULARITY_A_POST) for tag in tags),
        ((post.id, id_of_tag[name]) for post in posts for name in post.tags),
    )


def make_row(post: DemoPost, has_children: bool, file_size: int, seed: int) -> dict[str, Any]:
    """One row of the post table."""
    rolls = Rolls(seed, "row", post.id)
    url = f"https://cdn.example.net/{{}}/{post.md5[:2]}/{post.md5[2:4]}/{{}}{post.md5}.{{}}"
    large = max(post.original_size) > 300
    down_score = rolls.below(4)
    up_score = post.fav_count * rolls.between(60, 110) // 100 + rolls.below(3)
    ext = post.file_ext
    return {
        "id": post.id,
        "created_at": post.created_at,
        "uploader_id": rolls.between(1, 400),
        "source": f"https://art.example.net/works/{post.id}" if rolls.chance(80) else "",
        "md5": post.md5 if post.has_url else None,
        "parent_id": post.parent_id,
        "has_children": int(has_children),
        "is_deleted": int(post.kind == "deleted"),
        "is_banned": int(post.kind == "banned"),
        "pixiv_id": rolls.between(1, 120_000_000) if rolls.chance(50) else None,
        "has_active_children": int(has_children),
        "bit_flags": 0,
        "has_large": int(large),
        "has_visible_children": int(has_children),
        "image_width": post.original_size[0],
        "image_height": post.original_size[1],
        "file_size": file_size,
        "file_ext": ext,
        "rating": post.rating,
        "score": up_score - down_score,
        "up_score": up_score,
        "down_score": -down_score,
        "fav_count": post.fav_count,
        "file_url": url.format("original", "", ext) if post.has_url else None,
        "large_file_url": url.format("sample", "sample-" if large else "", ext) if post.has_url else None,
        "preview_file_url": url.format("180x180", "", "jpg") if post.has_url else None,
        "updated_at": post.created_at or None,
    }


def list_texts(posts: list[DemoPost]) -> Iterator[str]:
    """What the tokenizers learn their words from: tags as captions write them, and the recipe's own words."""
    yield "masterpiece best great good normal low worst quality"
    yield "old early mid recent newest safe sensitive nsfw explicit"
    for post in posts:
        yield " ".join(post.tags).replace("_", " ")
