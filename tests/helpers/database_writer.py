"""Small metadata databases in every published layout, with every kind of post and tag that readers must treat."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kohaku_wrap.metadata.new_database import INDEXES, POST_COLUMNS, SCHEMA
from kohaku_wrap.streams import draws, stream_key

LAYOUTS = ("v0-decimal", "v0-base36", "v1", "v2", "v3")

GENERAL = (
    *("1girl", "2girls", "multiple_girls", "1boy", "6+boys", "multiple_others", "male_focus", "solo", "long_hair"),
    *("blue_eyes", ">_<", "^_^", "o_o", "<|>_<|>", "<o>_<o>", "(o)_(o)", "||_||", "|_|", ":|", ";|", "m_k", "n_u"),
    *("\\||/", "looking_at_viewer", 'holding_"sign"', "a_b", "x", "hair_between_eyes", "+_-", "cat_(animal)"),
    *("bad_anatomy", "request_note", "_leading", "commentary_shirt"),
)
ARTISTS = ("ask_(askzy)", "torino_aqua", "banned_artist", "k_k", "who_(banned)", "wlop")
CHARACTERS = ("hatsune_miku", "kousaka_kirino", "yui", "c.c.", "female_doctor_(arknights)")
SERIES = ("vocaloid", "original", "arknights", "k-on!", "1girl_no_series")
META = (
    *("highres", "absurdres", "commentary", "commentary_request", "translated", "bad_id", "traditional_media"),
    *("watercolor_(medium)", "md5_mismatch", "audio", "has_audio", "video", "revision", "scan", "2k"),
)


@dataclass
class World:
    """Rows of the three tables."""

    posts: list[dict[str, Any]] = field(default_factory=list)
    tags: list[tuple[int, str, int, int]] = field(default_factory=list)
    relations: list[tuple[int, int]] = field(default_factory=list)


class Rolls:
    """Numbers that are the same on every machine."""

    def __init__(self, *key: str | int) -> None:
        self._numbers = draws(stream_key(*key), np.arange(512)).tolist()
        self._next = 0

    def below(self, limit: int) -> int:
        self._next += 1
        return int(self._numbers[(self._next - 1) % 512]) % limit

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[self.below(len(choices))]


def make_tags() -> list[tuple[int, str, int, int]]:
    """Tags of all types with ids that have one to four digits in either base."""
    tags = []
    next_id = 1
    for number, names in enumerate((GENERAL, ARTISTS, CHARACTERS, SERIES, META)):
        for name in names:
            tags.append((next_id, name, number, next_id * 37 % 2500))
            next_id += 1 + next_id // 3 if next_id < 3000 else 7
    return tags


def make_post(post_id: int, **values: Any) -> dict[str, Any]:
    """An ordinary post, but for what is given."""
    md5 = f"{post_id * 7919:032x}"
    url = f"https://cdn.example.net/{md5}.jpg"
    post: dict[str, Any] = dict.fromkeys(POST_COLUMNS, 0)
    post |= {
        "id": post_id,
        "created_at": "2016-05-24T19:16:10.000-04:00",
        "source": "",
        "md5": md5,
        "parent_id": None,
        "pixiv_id": None,
        "image_width": 1000,
        "image_height": 1400,
        "file_ext": "jpg",
        "file_url": url,
        "large_file_url": url,
        "preview_file_url": url,
        "updated_at": "2024-05-19T01:30:25.096-04:00",
    }
    return post | values


def make_world(posts: int, seed: int = 0, id_step: int = 3) -> World:
    """A world of `posts` posts with ids id_step, 2 × id_step, …"""
    tags = make_tags()
    world = World(tags=tags)
    for number in range(1, posts + 1):
        post_id = number * id_step
        rolls = Rolls("writer", seed, post_id)
        kind = rolls.below(20)
        values: dict[str, Any] = {
            "created_at": f"{2003 + rolls.below(23)}-{1 + rolls.below(12):02}-{1 + rolls.below(28):02}T19:16:10-04:00",
            "rating": rolls.below(4),
            "fav_count": rolls.below(300) if rolls.below(3) else rolls.below(8),
            "score": rolls.below(200) - 20,
            "image_width": 100 + rolls.below(2000),
            "image_height": 100 + rolls.below(2000),
            "file_ext": rolls.pick(("jpg", "jpg", "png", "webp", "gif", "mp4", "zip", "swf", "jpeg")),
            "is_deleted": int(kind == 0),
            "is_banned": int(kind == 1),
        }
        if kind in (1, 2):
            values |= {"md5": None if rolls.below(2) else "", "file_url": None, "large_file_url": None}
        if kind == 3:
            values["created_at"] = rolls.pick(("", "soon", "2016", "2016-02-30T00:00:00.000-04:00", "24 May 2019"))
        world.posts.append(make_post(post_id, **values))
        chosen = [rolls.pick(tags)[0] for _ in range(rolls.below(30))]
        world.relations += [(post_id, tag) for tag in chosen]
    return world


def shuffled(relations: Sequence[tuple[int, int]], seed: int = 0) -> list[tuple[int, int]]:
    """The same rows in an order of no post."""
    order = np.argsort(draws(stream_key("shuffle", seed), np.arange(len(relations))), kind="stable")
    return [relations[int(place)] for place in order]


def in_base(number: int, base: int) -> str:
    """A tag id as layout v0 writes it."""
    return np.base_repr(number, base)


def write_layout(path: Path, world: World, layout: str = "v3", indexed: bool = True) -> Path:
    """Write the world in a layout; v0 and v1 have the typed tag lists and counts too."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(SCHEMA)
        names = ", ".join(POST_COLUMNS)
        connection.executemany(
            f"INSERT INTO post ({names}) VALUES ({', '.join(f':{name}' for name in POST_COLUMNS)})", world.posts
        )
        connection.executemany("INSERT INTO tag VALUES (?, ?, ?, ?)", world.tags)
        if layout in ("v0-decimal", "v0-base36", "v1"):
            add_tag_lists(connection, world, 36 if layout == "v0-base36" else 10)
        if layout.startswith("v0"):
            connection.execute("DROP TABLE posttagrelation")
            connection.execute("CREATE VIRTUAL TABLE postfts USING fts5(tag_list)")
        else:
            connection.executemany("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)", world.relations)
        if layout != "v3":
            connection.execute("ALTER TABLE post DROP COLUMN updated_at")
        if layout in ("v0-decimal", "v0-base36", "v1"):
            connection.execute("DROP TABLE localpost")
        if indexed and not layout.startswith("v0"):
            connection.executescript(INDEXES)
    return path


def add_tag_lists(connection: sqlite3.Connection, world: World, base: int) -> None:
    """Layout v0's `tag_list*` and `tag_count*` columns."""
    type_of = {tag: kind for tag, _, kind, _ in world.tags}
    kinds = ("general", "artist", "character", "copyright", "meta")
    connection.execute("ALTER TABLE post ADD COLUMN tag_list VARCHAR(255)")
    connection.execute("ALTER TABLE post ADD COLUMN tag_count INTEGER")
    for kind in kinds:
        connection.execute(f"ALTER TABLE post ADD COLUMN tag_list_{kind} VARCHAR(255)")
        connection.execute(f"ALTER TABLE post ADD COLUMN tag_count_{kind} INTEGER")
    by_post: dict[int, list[int]] = {}
    for post_id, tag in world.relations:
        by_post.setdefault(post_id, []).append(tag)
    for post_id in [post["id"] for post in world.posts]:
        tags = by_post.get(post_id, [])
        lists = [tags, *([tag for tag in tags if type_of.get(tag) == number] for number in range(5))]
        columns = ["tag_list", *(f"tag_list_{kind}" for kind in kinds)]
        counts = ["tag_count", *(f"tag_count_{kind}" for kind in kinds)]
        values = ["".join(f"${in_base(tag, base)}#" for tag in some) for some in lists]
        assignments = ", ".join(f"{column} = ?" for column in (*columns, *counts))
        connection.execute(
            f"UPDATE post SET {assignments} WHERE id = ?", (*values, *(len(some) for some in lists), post_id)
        )


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file of a folder with its size and time."""
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}
