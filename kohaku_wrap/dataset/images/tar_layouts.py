"""Which tars below a folder can hold which posts, by the names that the published sets give them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kohaku_wrap.arrays import Int64Array
from kohaku_wrap.errors import UsageError
from kohaku_wrap.files import list_below
from kohaku_wrap.metadata.filters import STILL_EXTENSIONS

FOLDERS = 1000
"""Posts are sorted by their id modulo this, or by ranges of so many ids."""

NAME = re.compile(r"(?:.*/)?0*(?P<id>\d{1,18})\.(?P<ext>[A-Za-z0-9]{1,5})", re.DOTALL)
"""A member of the published tars: `<id>.<ext>`, perhaps under a folder."""

SITE_NAME = re.compile(
    r"(?:.*/)?(?P<site>[a-z0-9]+)_0*(?P<id>\d{1,18})_[^/]*[0-9a-f]{32}[^/]*\.(?P<ext>[A-Za-z0-9]{1,5})", re.DOTALL
)
"""A post's image by the defaults of gallery-dl, `{category}_{id}_{filename}`, whose file name holds the md5."""

LAYOUT_FOLDERS = ("original", "recent", "images")
"""Tried in this order where several hold the same posts."""

TABLE_ENDINGS = (".parquet", ".duckdb", ".csv", ".json", ".jsonl")
"""A folder that has one of these beside its images is a metadata set."""

ADVICE = "Give the folder that holds original/ or images/, or one of images named ID.ext or SITE_ID_MD5.ext."


class NoTars(UsageError):
    """The folder holds no tar that could hold images of posts."""


class SeveralSites(UsageError):
    """One id would mean posts of several sites."""


@dataclass(frozen=True)
class Layout:
    """One way to name tars."""

    name: str
    """As the sets publish it."""

    pattern: re.Pattern[str]
    """Of the path below the folder, with `/`; its last group is the number."""

    says: str
    """Which ids a tar holds, for people."""


DATA = Layout("data-0NNN.tar", re.compile(r"(?:.*/)?data-\d(\d{3})\.tar"), "id % 1000")
UPDATES = Layout("updates/*-D.tar", re.compile(r"(?:.*/)?[^/]*-(\d)\.tar"), "id % 10")
THOUSANDS = Layout("images/D/0NNN.tar", re.compile(r"(?:.*/)?\d/0(\d{3})\.tar"), "id % 10,000")
NUMBERED = Layout("images/0NNN.tar", re.compile(r"(?:.*/)?0(\d{3})\.tar"), "id % 1000")
RANGES = Layout("{start_id}.tar", re.compile(r"(?:.*/)?((?:[1-9]\d*)?000|0)\.tar"), "1,000 ids from its name on")
PLAIN = Layout("ID.ext", NAME, "one post, without a tar")
BY_SITE = Layout("SITE_ID_MD5.ext", SITE_NAME, "one post, as gallery-dl names it")
LAYOUTS = (DATA, UPDATES, THOUSANDS, NUMBERED, RANGES)
"""The first that fits counts. Source: danbooru2023, danbooru2024 and gelbooru sets; cheesechaser's data pools."""

WITHOUT_TARS = (PLAIN, BY_SITE)
"""Looked for where no tar is."""

BY_SHARD = (DATA, THOUSANDS, NUMBERED)


@dataclass(frozen=True)
class TarFolder:
    """The tars below a folder, by the ids that they can hold."""

    of_shard: Mapping[int, tuple[Path, ...]]
    """By id modulo 1000."""

    of_range: Mapping[int, tuple[Path, ...]]
    """By id divided by 1000."""

    updates: Mapping[int, tuple[Path, ...]]
    """By id modulo 10, the newest names first."""

    files: Mapping[int, tuple[Path, ...]]
    """Images outside of tars, by id modulo 1000."""

    counts: Mapping[str, int]
    """Tars or files of each layout that is there, by its name."""

    def groups_of(self, ids: Int64Array) -> Int64Array:
        """(posts,) a number each: posts with the same one lie in the same tars; that of a range is negative."""
        starts = ids // FOLDERS
        return np.where(np.isin(starts, list(self.of_range)), -1 - starts, ids % FOLDERS)

    def tars_of(self, group: int, shards: set[int]) -> tuple[Path, ...]:
        """The tars of a group, in the order in which they are tried; `shards`: its ids modulo 1000."""
        own = self.of_range.get(-1 - group, ()) if group < 0 else ()
        own += tuple(path for shard in sorted(shards) for path in self.of_shard.get(shard, ()))
        digits = sorted({shard % 10 for shard in shards})
        return own + tuple(path for digit in digits for path in self.updates.get(digit, ()))

    def files_of(self, shards: set[int]) -> tuple[Path, ...]:
        """Images outside of tars that a group may want."""
        return tuple(path for shard in sorted(shards) for path in self.files.get(shard, ()))

    def expect(self, group: int) -> str:
        """What the tar of a group would be called, for the reason of what is missing."""
        if group < 0:
            return f"{(-1 - group) * FOLDERS}.tar"
        name = next((each.name for each in BY_SHARD if each.name in self.counts), "")
        if not name:
            kind = "tar" if not self.files else "file"
            return f"{kind} for ids ending in {group:03}"
        return f"{name.replace('NNN', f'{group:03}')} for ids ending in {group:03}"


def read_id(name: str) -> tuple[int, str] | None:
    """Post id and extension of a member's name, or None for a member that is no picture of a post."""
    match = NAME.fullmatch(name) or SITE_NAME.fullmatch(name)
    return (int(match["id"]), match["ext"].lower()) if match else None


def find_tars(folder: Path) -> TarFolder:
    """Sort all tars below `folder` by their names; where there are none, images named by their ids.

    Raises NoTars, SeveralSites.

    What is no regular file stays among them, so that whoever reads it says so.
    """
    if not folder.is_dir():
        raise NoTars(f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder of tars'}", ADVICE)
    found: dict[str, dict[int, list[Path]]] = {layout.name: {} for layout in LAYOUTS}
    for path in sorted(path for path in list_below(folder) if path.suffix == ".tar"):
        below = path.relative_to(folder.parent).as_posix()
        for layout in LAYOUTS:
            if match := layout.pattern.fullmatch(below):
                found[layout.name].setdefault(int(match[1]), []).append(path)
                break
    if not any(found.values()):
        found |= find_plain(folder)
    if not any(found.values()):
        raise NoTars(f"{folder}: no tar in it is named as any published set names them", ADVICE)
    shards: dict[int, list[Path]] = {}
    for layout in BY_SHARD:
        for number, paths in found[layout.name].items():
            shards.setdefault(number, []).extend(paths)
    return TarFolder(
        of_shard={shard: tuple(sorted(paths, key=rank)) for shard, paths in shards.items()},
        of_range={start // FOLDERS: tuple(paths) for start, paths in found[RANGES.name].items()},
        updates={digit: tuple(reversed(paths)) for digit, paths in found[UPDATES.name].items()},
        files=join_numbers(found.get(layout.name, {}) for layout in WITHOUT_TARS),
        counts={name: sum(map(len, numbers.values())) for name, numbers in found.items() if numbers},
    )


def find_plain(folder: Path) -> dict[str, dict[int, list[Path]]]:
    """Images below a folder that are named by their post's id: by layout, then by id modulo 1000.

    Raises SeveralSites.
    """
    found: dict[str, dict[int, list[Path]]] = {layout.name: {} for layout in WITHOUT_TARS}
    sites: dict[str, Path] = {}
    for path in sorted(list_below(folder)):
        for layout in WITHOUT_TARS:
            match = layout.pattern.fullmatch(path.name)
            if match and match["ext"].lower() in STILL_EXTENSIONS:
                found[layout.name].setdefault(int(match["id"]) % FOLDERS, []).append(path)
                if layout is BY_SITE:
                    sites.setdefault(match["site"], path)
                break
    if len(sites) > 1:
        raise SeveralSites(
            f"{folder}: posts of {' and of '.join(sites)} lie in it, and one id is another post on each",
            f"Give the folder of one site's files, such as {next(iter(sites.values())).parent}.",
        )
    return found


def join_numbers(parts: Iterable[Mapping[int, Sequence[Path]]]) -> dict[int, tuple[Path, ...]]:
    """The paths of all parts by number, in order."""
    joined: dict[int, list[Path]] = {}
    for part in parts:
        for number, paths in part.items():
            joined.setdefault(number, []).extend(paths)
    return {number: tuple(sorted(paths)) for number, paths in joined.items()}


def count_plain(folder: Path) -> dict[str, str]:
    """What `kwrap inspect` says of images beside a metadata set, by their layout; raises SeveralSites."""
    found = find_plain(folder)
    return describe_counts({name: sum(map(len, numbers.values())) for name, numbers in found.items() if numbers})


def describe_counts(counts: Mapping[str, int]) -> dict[str, str]:
    """How many there are of each layout, and what one holds."""
    says = {layout.name: layout.says for layout in (*LAYOUTS, *WITHOUT_TARS)}
    return {name: f"{count:,}, each with {says[name]}" for name, count in counts.items()}


def holds_images(folder: Path) -> bool:
    """Whether a folder is one of tars, or of images named by their ids with no table or JSON among them."""
    paths = list(list_below(folder))
    if any(path.suffix == ".tar" for path in paths):
        return True
    names = [path.name.lower() for path in paths]
    return any(map(is_image_of_post, names)) and not any(name.endswith(TABLE_ENDINGS) for name in names)


def is_image_of_post(name: str) -> bool:
    """Whether a file's name is that of a post's still image."""
    named = read_id(name)
    return named is not None and named[1] in STILL_EXTENSIONS


def rank(path: Path) -> int:
    """The place of a tar's folder among those that are tried first."""
    return LAYOUT_FOLDERS.index(path.parent.name) if path.parent.name in LAYOUT_FOLDERS else len(LAYOUT_FOLDERS)


def describe_tars(folder: Path, count_members: Callable[[Path], int]) -> dict[str, Any]:
    """What `kwrap inspect` says of a folder of tars; raises NoTars, SeveralSites."""
    tars = find_tars(folder)
    paths = [path for group in (tars.of_shard, tars.of_range, tars.updates) for each in group.values() for path in each]
    files = [path for each in tars.files.values() for path in each]
    odd = sorted(path.name for path in (*paths, *files) if not path.is_file())
    paths = [path for path in paths if path.is_file()]
    indexes = sum(path.with_suffix(".json").is_file() for path in paths)
    sizes = Counter(path.stat().st_size for path in paths)
    return {
        "layouts": describe_counts(tars.counts),
        "tars": len(paths),
        "with_index": indexes,
        "size_bytes": sum(size * count for size, count in sizes.items()),
        "images_in_first_tar": count_members(min(paths)) if paths else None,
        "files_without_tar": len(files),
        "not_regular_files": odd,
    }
