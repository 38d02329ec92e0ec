"""Captions in the recipe's groups: order, words, what is left out, and that they parse back."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies

from kohaku_wrap.dataset.captions.earlier import EarlierCaptions
from kohaku_wrap.dataset.captions.explanation import NoSuchPost, explain_post
from kohaku_wrap.dataset.captions.making import POST_COUNTS, CaptionCounts, find_repeats, make_captions
from kohaku_wrap.dataset.captions.plan import FATES, plan_captions
from kohaku_wrap.dataset.captions.quality import find_cutoffs
from kohaku_wrap.dataset.captions.recipe import CaptionRecipe
from kohaku_wrap.dataset.captions.text_table import NoTexts, read_batches
from kohaku_wrap.dataset.captions.words import KAOMOJI, PEOPLE_TAGS, breaks_caption
from kohaku_wrap.dataset.recipe import read_dataset
from kohaku_wrap.dataset.selection import select_posts
from kohaku_wrap.dataset.selection_file import SelectedPosts, read_selected_posts
from kohaku_wrap.metadata.chunks import TagChunk
from kohaku_wrap.metadata.database import open_database
from kohaku_wrap.metadata.relations import map_tag_chunks
from kohaku_wrap.metadata.tags import TagTable, read_tags


def recipe_of(**caption: Any) -> CaptionRecipe:
    return read_dataset({"caption": caption}, "test").caption


class Maker:
    """Captions of a few posts: give tags, get captions."""

    def __init__(self, folder: Path, writer: ModuleType) -> None:
        self.folder, self.writer = folder, writer
        self.counts = CaptionCounts()
        self.unused: tuple[str, ...] = ()
        self.path = folder / "a.db"

    def make(
        self, posts: Iterable[tuple[dict[str, Any], list[tuple[str, int]]]], recipe: CaptionRecipe, layout: str = "v3"
    ) -> list[str]:
        """Captions of posts given as values and (tag, type) pairs."""
        posts = list(posts)
        known: dict[tuple[str, int], int] = {}
        relations = []
        for number, (_, tags) in enumerate(posts, start=1):
            relations += [(number, known.setdefault(tag, len(known) + 1)) for tag in tags]
        rows = [self.writer.make_post(number, **values) for number, (values, _) in enumerate(posts, start=1)]
        world = self.writer.World(rows, [(tag_id, *tag, 1) for tag, tag_id in known.items()], relations)
        self.path.unlink(missing_ok=True)
        return self.make_all(self.writer.write_layout(self.path, world, layout), recipe)

    def make_all(self, path: Path, recipe: CaptionRecipe) -> list[str]:
        """Captions of every post of a database."""
        database = open_database(path)
        selection = self.folder / "all.parquet"
        select_posts(database, read_dataset({}, "all"), selection)
        posts = read_selected_posts(selection, "dateutil" if recipe.style == "hakubooru" else "iso")
        tags = read_tags(database)
        plan = plan_captions(recipe, tags)
        self.unused = plan.unused
        cutoffs = find_cutoffs(plan.recipe.quality, database, posts)
        self.counts = CaptionCounts()
        captions: list[str] = []
        for made, counts in map_tag_chunks(
            database, tags, posts.ids, lambda chunk: make_captions(plan, chunk, posts, cutoffs), 2, None
        ):
            captions += made.to_pylist()
            self.counts.add(counts)
        return captions

    def one(self, tags: list[tuple[str, int]], recipe: CaptionRecipe | None = None, **values: Any) -> str:
        """The caption of one post."""
        return self.make([(values, tags)], recipe or CaptionRecipe())[0]

    def fates(self) -> dict[str, int]:
        """Tags by what became of them, without zeros."""
        return {name: count for name, count in zip(FATES, self.counts.tags.tolist(), strict=True) if count}

    def lacking(self) -> dict[str, int]:
        """Posts by what they lack, without zeros."""
        return {name: count for name, count in zip(POST_COUNTS, self.counts.lacking.tolist(), strict=True) if count}


@pytest.fixture
def maker(tmp_path: Path, writer: ModuleType) -> Maker:
    return Maker(tmp_path, writer)


FULL = [
    ("highres", 4),
    ("long_hair", 0),
    ("wlop", 1),
    ("1girl", 0),
    ("vocaloid", 3),
    ("hatsune_miku", 2),
    (">_<", 0),
    ("solo", 0),
    ("commentary_request", 4),
    ("banned_artist", 1),
]


def test_nine_groups_in_the_order_of_the_recipe(maker: Maker) -> None:
    assert maker.one(FULL, rating=3, fav_count=9) == (
        "1girl, hatsune miku, vocaloid, wlop ||| long hair, >_<, solo ||| worst quality, mid, highres, nsfw, explicit"
    )
    assert maker.fates() == {"written": 8, "meta_black_list": 1, "artist_black_list": 1}


def test_separators_stand_around_empty_groups(maker: Maker) -> None:
    assert maker.one([], rating=0) == " |||  ||| worst quality, mid, safe"
    assert maker.lacking() == {"without_tags": 1}
    assert maker.one([("solo", 0)], recipe_of(suffix=[])) == " ||| solo ||| "
    assert maker.one([("wlop", 1)], recipe_of(suffix=[])) == "wlop |||  ||| "
    assert maker.one([("wlop", 1)], recipe_of(prefix=[], shuffled=[], suffix=["year"])) == " |||  ||| mid"


def test_groups_can_be_moved_and_left_out(maker: Maker) -> None:
    recipe = recipe_of(prefix=["artist", "rating"], shuffled=["general", "character", "year"], suffix=["people"])
    assert maker.one(FULL, recipe, rating=2) == "wlop, nsfw ||| long hair, >_<, solo, hatsune miku, mid ||| 1girl"
    assert maker.fates()["group_left_out"] == 2


def test_people_counts_are_general_tags_without_their_group(maker: Maker) -> None:
    recipe = recipe_of(prefix=["character"], suffix=[])
    assert maker.one(FULL, recipe) == "hatsune miku ||| long hair, 1girl, >_<, solo ||| "


def test_only_counts_of_people_stand_in_front(maker: Maker) -> None:
    tags = [(name, 0) for name in (*PEOPLE_TAGS, "male_focus", "solo")]
    caption = maker.one(tags, recipe_of(suffix=[]))
    assert caption.split(" ||| ")[1] == "male focus, solo"
    assert caption.split(" ||| ")[0].split(", ") == [name.replace("_", " ") for name in PEOPLE_TAGS]


@pytest.mark.parametrize(
    ("year", "word"),
    [(2004, ""), (2005, "old"), (2010, "old"), (2011, "early"), (2014, "early"), (2015, "mid"), (2017, "mid"),
     (2018, "recent"), (2020, "recent"), (2021, "newest"), (2024, "newest"), (2025, ""),
     (2999, ""), (3000, ""), (9998, "")],
)  # fmt: skip
def test_years(maker: Maker, year: int, word: str) -> None:
    # The local year counts: in UTC this is the next one already.
    date = f"{year}-12-31T23:30:00.000-05:00"
    assert maker.one([], recipe_of(suffix=["year"]), created_at=date) == f" |||  ||| {word}"
    assert maker.lacking() == {"without_tags": 1} | ({} if word else {"year_without_word": 1})


@pytest.mark.parametrize("date", ["", "soon", "2016", "2016-02-30T10:00:00.000-05:00", "24 May 2016", "2016/05/24"])
def test_unreadable_dates_get_no_year_and_are_counted(maker: Maker, date: str) -> None:
    assert maker.one([], recipe_of(suffix=["year"]), created_at=date) == " |||  ||| "
    assert maker.lacking() == {"without_tags": 1, "unknown_date": 1}


@pytest.mark.parametrize(("rating", "words"), [(0, "safe"), (1, "sensitive"), (2, "nsfw"), (3, "nsfw, explicit")])
def test_ratings(maker: Maker, rating: int, words: str) -> None:
    assert maker.one([], recipe_of(suffix=["rating"]), rating=rating) == f" |||  ||| {words}"


def test_unknown_rating_has_neither_rating_nor_quality(maker: Maker) -> None:
    assert maker.one([("solo", 0)], rating=7, fav_count=5) == " ||| solo ||| mid"
    assert maker.lacking() == {"unknown_rating": 1, "without_quality_word": 1}


def test_quality_by_percentile_within_the_rating(maker: Maker) -> None:
    recipe = recipe_of(suffix=["quality"])
    posts: list[Any] = [
        ({"rating": rating, "fav_count": fav + 1000 * rating}, []) for rating in (0, 3) for fav in range(1, 101)
    ]
    words = [caption.removeprefix(" |||  ||| ") for caption in maker.make(posts, recipe)]
    expected = (
        ["worst quality"] * 10 + ["low quality"] * 20 + ["normal quality"] * 15 + ["good quality"] * 15
        + ["great quality"] * 15 + ["best quality"] * 15 + ["masterpiece"] * 10
    )  # fmt: skip
    assert words == expected * 2


def test_quality_limits(maker: Maker) -> None:
    posts: list[Any] = [({"rating": 0, "fav_count": fav}, []) for fav in (28, 27, 17, 11, 8, 5, 2, 1)]
    published = recipe_of(suffix=["quality"], quality={"cutoffs": "published", "max_id": 7})
    assert [caption.removeprefix(" |||  ||| ") for caption in maker.make(posts, published)] == [
        "masterpiece", "best quality", "best quality", "great quality", "good quality", "normal quality",
        "low quality", "",
    ]  # fmt: skip
    assert maker.lacking() == {"without_tags": 8, "without_quality_word": 1}


def test_underscores(maker: Maker) -> None:
    names = [*sorted(KAOMOJI), "m_k", "n_u", "a_b_c", "cat_(animal)"]
    tags = [(name, 0) for name in names]
    by_list = maker.one(tags, recipe_of(suffix=[])).split(" ||| ")[1].split(", ")
    assert by_list == [*sorted(KAOMOJI), "m k", "n u", "a b c", "cat (animal)"]
    short = maker.one(tags, recipe_of(suffix=[], underscores="short")).split(" ||| ")[1].split(", ")
    assert short == [name if len(name) <= 3 else name.replace("_", " ") for name in names]
    own = maker.one(tags, recipe_of(suffix=[], kaomoji=["a_b_c"])).split(" ||| ")[1].split(", ")
    assert own[-2:] == ["a_b_c", "cat (animal)"] and own[0] == names[0].replace("_", " ")


BREAKING = ["a,b", "a|||b", "|||", "a\nb", "a\rb", "a\u2028b", "a\tb", "a\ufffdb", " ", ""]


@pytest.mark.parametrize("name", BREAKING)
@pytest.mark.parametrize("style", ["kohaku", "hakubooru"])
def test_tags_that_would_break_a_caption_are_dropped_and_counted(maker: Maker, name: str, style: str) -> None:
    caption = maker.one([("solo", 0), (name, 0), ("hat", 0)], recipe_of(style=style))
    assert "solo, hat" in caption and caption.count("|||") == (2 if style == "kohaku" else 1)
    assert maker.fates() == {"written": 2, "would_break_caption": 1}


@pytest.mark.parametrize("name", ["_", "___"])
def test_tags_of_underscores_alone_would_be_blank(maker: Maker, name: str) -> None:
    assert maker.one([(name, 0), ("hat", 0)], recipe_of(suffix=[])) == " ||| hat ||| "
    assert maker.fates() == {"written": 1, "would_break_caption": 1}


def test_duplicates_are_written_once(maker: Maker) -> None:
    tags = [("solo", 0), ("hat", 0), ("solo", 0), ("wlop", 1), ("solo", 0), ("wlop", 1)]
    assert maker.one(tags, recipe_of(suffix=[])) == "wlop ||| solo, hat ||| "
    assert maker.counts.duplicates == 3


@pytest.mark.parametrize("posts", [8, 1 << 40, 1 << 62])
def test_repeats_are_found_however_many_posts_there_are(posts: int) -> None:
    """Beyond 62 bits of post, element and row another way is taken; both keep the first of each."""
    owners = np.array([0, 0, 1, 0, 1, 7, 7, 6, 1], dtype=np.int32)
    elements = np.array([64, 96, 64, 64, 32, 0, 0, 224, 64], dtype=np.int32)
    assert sorted(find_repeats(owners, elements, posts).tolist()) == [3, 6, 8]
    assert find_repeats(owners[:0], elements[:0], posts).tolist() == []


def test_posts_that_differ_in_their_highest_bits_alone_are_no_repeats() -> None:
    owners = np.array([0, 1 << 30, 0, 1 << 30], dtype=np.int32)
    elements = np.array([(1 << 31) - 1, (1 << 31) - 1, 5, (1 << 31) - 1], dtype=np.int32)
    assert find_repeats(owners, elements, 1 << 31).tolist() == [3]


def test_drops_aliases_and_what_fits_nothing(maker: Maker) -> None:
    recipe = recipe_of(
        suffix=[], drop=["*_hair", "cat_?", "nothing_*"],
        aliases={"wlop": "w_l_o_p", "rin": "kagamine_rin", "kagamine_rin_(old)": "kagamine_rin", "gone": "solo"},
    )  # fmt: skip
    tags = [("long_hair", 0), ("hair", 0), ("cat_a", 0), ("wlop", 1), ("rin", 0), ("kagamine_rin", 2),
            ("kagamine_rin_(old)", 0)]  # fmt: skip
    assert maker.one(tags, recipe) == "kagamine rin, w l o p ||| hair ||| "
    assert maker.fates() == {"written": 5, "drop_pattern": 2} and maker.counts.duplicates == 2
    assert maker.unused == ("gone", "nothing_*")


def test_black_lists_are_of_their_type(maker: Maker) -> None:
    tags = [("bad_anatomy", 0), ("bad_id", 4), ("banned_goods", 0), ("who_(banned)", 1), ("audio", 2), ("scan", 4)]
    assert maker.one(tags, recipe_of(suffix=["meta"])) == "audio ||| bad anatomy, banned goods ||| scan"
    assert maker.one(tags, recipe_of(suffix=["meta"], drop_meta=[], drop_artist=[])) == (
        "audio, who (banned) ||| bad anatomy, banned goods ||| bad id, scan"
    )


def test_brackets_stay_plain(maker: Maker) -> None:
    assert maker.one([("ask_(askzy)", 1)], recipe_of(suffix=[])) == "ask (askzy) |||  ||| "


NAMES = strategies.text("ab_(|:;,\n 0", min_size=1, max_size=5)
TAGS = strategies.lists(strategies.tuples(NAMES, strategies.integers(0, 4)), max_size=20, unique_by=lambda tag: tag[0])


@given(TAGS, strategies.lists(strategies.lists(strategies.integers(0, 19), max_size=12), min_size=1, max_size=6))
def test_captions_parse_back_into_their_groups(tags: list[tuple[str, int]], picks: list[list[int]]) -> None:
    posts = [[pick % len(tags) for pick in some] if tags else [] for some in picks]
    size = len(posts)
    table = TagTable(
        np.arange(len(tags), dtype=np.int64),
        tuple(name for name, _ in tags),
        np.array([kind for _, kind in tags], dtype=np.int8),
        np.zeros(len(tags), dtype=np.int64),
    )
    numbers = np.zeros(size, dtype=np.int16)
    selected = SelectedPosts(np.arange(size), numbers.astype(np.int8), numbers.astype(np.int32), numbers, None, {})
    chunk = TagChunk(
        0,
        size,
        np.repeat(np.arange(size, dtype=np.int32), [len(some) for some in posts]),
        np.array([tag for some in posts for tag in some], dtype=np.int32),
    )
    plan = plan_captions(recipe_of(drop_meta=[], suffix=["meta"]), table)
    captions, _ = make_captions(plan, chunk, selected, np.zeros((4, 6), dtype=np.int64))
    for some, caption in zip(posts, captions.to_pylist(), strict=True):
        groups: list[list[str]] = [[], [], [], [], []]
        for name, kind in (tags[tag] for tag in dict.fromkeys(some)):
            text = name if name in KAOMOJI else name.replace("_", " ").strip()
            if not breaks_caption(text):
                groups[kind].append(text)
        general, artist, character, series, meta = groups
        parts = [part.split(", ") if part else [] for part in caption.split(" ||| ")]
        assert parts == [character + series + artist, general, meta]


@pytest.mark.parametrize("cut", range(1, 9))
def test_captions_of_a_chunk_are_those_of_its_posts(cut: int) -> None:
    table = TagTable(np.arange(1), ("solo",), np.zeros(1, dtype=np.int8), np.array([9]))
    ratings, years = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0], np.int8), np.arange(2016, 2025, dtype=np.int16)
    selected = SelectedPosts(np.arange(9), ratings, np.arange(9, dtype=np.int32), years, None, {})
    plan = plan_captions(recipe_of(), table)

    def make(first: int, stop: int) -> list[str]:
        posts = np.arange(stop - first, dtype=np.int32)
        chunk = TagChunk(first, stop, posts, np.zeros(len(posts), dtype=np.int32))
        return list(make_captions(plan, chunk, selected, np.zeros((4, 6), dtype=np.int64))[0].to_pylist())

    whole = make(0, 9)
    assert len(set(whole)) == 9
    assert [*make(0, cut), *make(cut, 9)] == whole


@pytest.mark.parametrize("style", ["kohaku", "hakubooru"])
def test_every_layout_and_order_gives_the_same_captions(maker: Maker, writer: ModuleType, style: str) -> None:
    world = writer.make_world(400)
    recipe = CaptionRecipe(style=style)
    expected = maker.make_all(writer.write_layout(maker.folder / "v3.db", world), recipe)
    assert len(set(expected)) > 300
    for layout in writer.LAYOUTS:
        path = writer.write_layout(maker.folder / f"{layout}-plain.db", world, layout, indexed=False)
        assert maker.make_all(path, recipe) == expected


def test_no_post_has_an_id_beyond_64_bits(tmp_path: Path, writer: ModuleType) -> None:
    database = open_database(writer.write_layout(tmp_path / "a.db", writer.make_world(3)))
    with pytest.raises(NoSuchPost):
        explain_post(database, CaptionRecipe(), 1 << 64)


def test_explanation_is_the_caption(maker: Maker, writer: ModuleType) -> None:
    world = writer.make_world(25)
    path = writer.write_layout(maker.folder / "b.db", world)
    for style in ("kohaku", "hakubooru"):
        recipe = CaptionRecipe(style=style)
        expected = maker.make_all(path, recipe)
        for post, caption in zip(world.posts, expected, strict=True):
            explanation = explain_post(open_database(path), recipe, post["id"])
            assert explanation.caption == caption
            for _, words in explanation.groups:
                assert all(word in caption for word in words)
            assert len(explanation.tags) == len([row for row in world.relations if row[0] == post["id"]])
    with pytest.raises(NoSuchPost, match="no post 4"):
        explain_post(open_database(path), CaptionRecipe(), 4)


def test_a_pipe_in_place_of_earlier_captions_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "captions.arrow")
    assert EarlierCaptions(tmp_path / "captions.arrow").ids.size == 0


def test_a_pipe_in_place_of_texts_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "texts.parquet")
    with pytest.raises(NoTexts, match="not a regular file"):
        next(read_batches(tmp_path / "texts.parquet", ""))
