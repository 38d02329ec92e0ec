"""The posts of the embedded world, with every kind that a selection or a caption must treat on its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

import numpy as np

from kohaku_wrap.demo.vocabulary import ARTISTS, EMOTICONS, GENERAL_TAGS, META_TAGS, PEOPLE, SERIES
from kohaku_wrap.streams import draws, permutation, stream_key

ID_SPAN = 7000
"""The highest id of the default world: the recipe's three strata, a thousandth of their size."""

SHARDS = 1000
"""A post lies in the tar of its id modulo this."""

FIRST_DAY, DAYS = datetime(2004, 11, 2), 7600
"""Uploads from 2004 to 2025."""

SHARES_PERCENT = {"deleted": 5, "gold": 4, "banned": 1, "gif": 2, "mp4": 2, "zip": 1, "swf": 1, "undated": 1}
"""Posts that the recipe drops, or that have something missing; at least one of each."""

RATINGS = (0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3, 3)
FAVOURITES_AT_PERCENT = (0, 10, 30, 45, 60, 75, 90, 100)
FAVOURITES = (
    (0, 1, 4, 7, 10, 16, 27, 240),
    (0, 2, 8, 13, 19, 30, 56, 600),
    (0, 8, 21, 33, 49, 75, 132, 900),
    (0, 9, 27, 45, 69, 106, 190, 1500),
)
"""Favourites at each percentile, by rating: HakuBooru's published cut-offs between nothing and a famous picture."""

SHAPES = ((176, 176), (176, 176), (144, 208), (144, 208), (136, 224), (208, 144), (232, 128), (112, 264), (84, 84))
"""Width and height of pictures before a few pixels more or less."""


Item = TypeVar("Item")

DRAWS_A_BLOCK = 128


class Rolls:
    """A sequence of stateless draws under one key, taken one after another."""

    def __init__(self, *parts: str | int) -> None:
        self._key = stream_key("demo", *parts)
        self._taken = 0
        self._block: list[int] = []

    def below(self, bound: int) -> int:
        """An integer in 0 … bound - 1."""
        index = self._taken % DRAWS_A_BLOCK
        if index == 0:
            counters = np.arange(self._taken, self._taken + DRAWS_A_BLOCK, dtype=np.uint64)
            self._block = draws(self._key, counters).tolist()
        self._taken += 1
        return self._block[index] % bound

    def between(self, first: int, last: int) -> int:
        """An integer in first … last."""
        return first + self.below(last - first + 1)

    def chance(self, percent: int) -> bool:
        """True in `percent` of the cases."""
        return self.below(100) < percent

    def pick(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def pick_common(self, items: Sequence[Item]) -> Item:
        """One of the items, the first ones far more often, as tags are on a real site."""
        return items[min(self.below(len(items)), self.below(len(items)), self.below(len(items)))]

    def shuffle(self, items: Sequence[Item]) -> list[Item]:
        """The items in another order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(len(left))]


@dataclass(frozen=True)
class DemoPost:
    """One post: what the database says, and what the tar holds."""

    id: int
    """Its id decides its stratum and its tar."""

    kind: str
    """A key of SHARES_PERCENT, or "" for an ordinary post."""

    created_at: str
    """As the site writes it; "" where it is not known."""

    rating: int
    """0 general, 1 sensitive, 2 questionable, 3 explicit."""

    fav_count: int
    """Spread by rating as on the real site."""

    file_ext: str
    """Of the original."""

    picture_size: tuple[int, int]
    """Width and height of the file in the tar."""

    original_size: tuple[int, int]
    """Width and height in the database; larger where the tar holds a reduced copy."""

    parent_id: int | None
    """Another post of the world, or nothing."""

    tags: tuple[str, ...]
    """In the order of the relation's rows; a few are there twice, as in the real table."""

    @property
    def has_url(self) -> bool:
        """False for gold-only and banned posts, whose md5 and urls are not public."""
        return self.kind not in ("gold", "banned")

    @property
    def in_tars(self) -> bool:
        """True where the tars hold a member for it: videos and Flash are not in them."""
        return self.has_url and self.file_ext not in ("mp4", "swf")

    @property
    def md5(self) -> str:
        """Stands for the hash of an original that never was."""
        return hashlib.md5(f"kwrap demo {self.id}".encode(), usedforsecurity=False).hexdigest()


def choose_ids(posts: int, seed: int) -> list[int]:
    """`posts` ascending ids, spread over ID_SPAN and lying in few tars."""
    thousands = max(ID_SPAN, (posts // SHARDS + 1) * SHARDS) // SHARDS
    wanted = min(SHARDS, posts // thousands + 1)
    residues = permutation(stream_key("demo", seed, "shards"), SHARDS)[:wanted]
    ids = np.sort((np.arange(thousands)[:, None] * SHARDS + residues).ravel())
    ids = ids[ids > 0]
    kept = np.argsort(draws(stream_key("demo", seed, "posts"), ids), kind="stable")[:posts]
    return [int(number) for number in np.sort(ids[kept])]


def make_posts(posts: int, seed: int) -> Iterator[DemoPost]:
    """The posts by ascending id."""
    ids = choose_ids(posts, seed)
    order = permutation(stream_key("demo", seed, "kinds"), posts)
    kind_of: dict[int, str] = {}
    start = 0
    for kind, percent in SHARES_PERCENT.items():
        count = max(posts * percent // 100, 1) if posts >= 2 * len(SHARES_PERCENT) else 0
        kind_of |= {int(index): kind for index in order[start : start + count]}
        start += count
    tagless = int(order[-1]) if posts >= 60 else -1
    for index, post_id in enumerate(ids):
        earlier = ids[index // 2] if index else None
        yield make_post(post_id, kind_of.get(index, ""), earlier, index != tagless, seed, max(ids[-1], ID_SPAN))


def make_post(post_id: int, kind: str, earlier: int | None, tagged: bool, seed: int, last_id: int) -> DemoPost:
    """One post, as a function of the seed and its id."""
    rolls = Rolls(seed, "post", post_id)
    rating = rolls.pick(RATINGS)
    shape = rolls.pick(SHAPES)
    size = (shape[0] + rolls.between(-6, 6), shape[1] + rolls.between(-6, 6))
    ext = kind if kind in ("gif", "mp4", "zip", "swf") else rolls.pick(("jpg", "jpg", "jpg", "png", "png", "webp"))
    reduced = rolls.chance(8)
    tags = choose_tags(rolls, rating) if tagged else []
    if kind in ("gif", "mp4", "zip"):
        tags.append("animated")
    if tags and rolls.chance(15):
        tags.append(rolls.pick(tags))
    return DemoPost(
        id=post_id,
        kind=kind,
        created_at="" if kind == "undated" else date_of(post_id, last_id, rolls),
        rating=rating,
        fav_count=favourites_of(rolls.below(10_000), rating),
        file_ext=ext,
        picture_size=size,
        original_size=(size[0] * 2, size[1] * 2) if reduced else size,
        parent_id=earlier if rolls.chance(10) else None,
        tags=tuple(tags),
    )


def choose_tags(rolls: Rolls, rating: int) -> list[str]:
    """The tags of one post, mixed as the relation's rows are."""
    tags = list(rolls.pick_common(PEOPLE))
    tags += [rolls.pick_common(GENERAL_TAGS) for _ in range(rolls.between(6, 28))]
    if rolls.chance(25):
        tags.append(rolls.pick(EMOTICONS))
    series, characters = rolls.pick(SERIES)
    if rolls.chance(85):
        tags.append(series)
        if characters and "no_humans" not in tags:
            tags.append(rolls.pick_common(characters))
            if "2girls" in tags or "2boys" in tags:
                tags.append(rolls.pick(characters))
    tags += [rolls.pick_common(ARTISTS) for _ in range(rolls.pick((0, 1, 1, 1, 1, 2)))]
    tags += [rolls.pick_common(META_TAGS) for _ in range(rolls.between(0, 5))]
    if rating >= 2:
        tags.append("blush")
    return rolls.shuffle(list(dict.fromkeys(tags)))


def date_of(post_id: int, last_id: int, rolls: Rolls) -> str:
    """Uploads follow the ids, and the site writes its local time."""
    moment = FIRST_DAY + timedelta(days=post_id * DAYS // last_id, seconds=rolls.below(86_400))
    offset = "-04:00" if 3 < moment.month < 11 else "-05:00"
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{rolls.below(1000):03}{offset}"


def favourites_of(roll: int, rating: int) -> int:
    """The favourites at `roll` (of 10,000) of the rating's distribution, in whole numbers."""
    counts = FAVOURITES[rating]
    for low, high, first, last in zip(
        FAVOURITES_AT_PERCENT, FAVOURITES_AT_PERCENT[1:], counts, counts[1:], strict=False
    ):
        if roll < high * 100:
            return first + (last - first) * (roll - low * 100) // ((high - low) * 100)
    return counts[-1]
