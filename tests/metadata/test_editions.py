"""Every published edition of the same posts: what is recognised, and the same selection and captions from each."""

from __future__ import annotations

import datetime
import glob
import json
import os
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from zoneinfo import ZoneInfo

import duckdb
import edition_writer as editions
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from kohaku_wrap.cli import program
from kohaku_wrap.dataset.captions.writing import write_captions
from kohaku_wrap.dataset.recipe import DatasetRecipe, load_dataset, read_dataset
from kohaku_wrap.dataset.selection import SelectionReport, select_posts
from kohaku_wrap.errors import KwrapError, ProblemsFound
from kohaku_wrap.files import shipped_folder
from kohaku_wrap.metadata.columns import DANBOORU, SiteMapping
from kohaku_wrap.metadata.description import describe_database
from kohaku_wrap.metadata.dialects import Duck
from kohaku_wrap.metadata.opening import is_metadata, open_metadata
from kohaku_wrap.metadata.posts import NoZone, with_offsets

POSTS = 240
RECIPE = {
    "selection": {
        "seed": 5,
        "strata": [{"last_id": 400, "sample": 90}, {"first_id": 401, "sample": "all"}],
        "drop": {
            "after_sample": ["deleted", "gold", "banned", "no_still_image"],
            "unless": {"tags_none": ["c.c."], "score": {"min": -15}, "date": {"first": "2004-06-01"}},
        },
    }
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, writer: ModuleType) -> duckdb.DuckDBPyConnection:
    made = writer.make_world(POSTS)
    for post in made.posts:
        # Dates with the offset of the site at that time, as it gives them.
        if post["created_at"].endswith("T19:16:10-04:00"):
            local = datetime.datetime.fromisoformat(post["created_at"][:19] + ".250")
            post["created_at"] = local.replace(tzinfo=ZoneInfo("America/New_York")).isoformat(timespec="milliseconds")
    folder = tmp_path_factory.mktemp("world")
    path = writer.write_layout(folder / "v3.db", made)
    connection = editions.load_world(path)
    connection.execute(f"CREATE TABLE place AS SELECT '{path}' AS path")
    return connection


def sqlite_of(world: duckdb.DuckDBPyConnection) -> Path:
    return Path(world.execute("SELECT path FROM place").fetchall()[0][0])


def make(
    place: Path, out: Path, recipe: DatasetRecipe | None = None, mapping: SiteMapping | None = None
) -> tuple[SelectionReport, list[dict[str, Any]], list[str]]:
    """The report, the rows of the selection, and the captions."""
    recipe = recipe or read_dataset(RECIPE, "test")
    source = open_metadata(place, mapping or recipe.metadata)
    selection = out / "selection.parquet"
    out.mkdir(parents=True, exist_ok=True)
    report = select_posts(source, recipe, selection)
    write_captions(source, selection, out, recipe.caption, ["jsonl"], threads=2)
    lines = [json.loads(line)["caption"] for line in (out / "captions.jsonl").read_text().splitlines()]
    return report, pq.read_table(selection).to_pylist(), lines


SAME = ("dump", "duckdb", "snapshot-2026", "metadata-2024", "tags-only-2024", "sqlite-api")


@pytest.mark.parametrize("name", SAME)
def test_every_edition_gives_the_same_selection_and_captions(
    tmp_path: Path, world: duckdb.DuckDBPyConnection, name: str
) -> None:
    plain, rows, captions = make(sqlite_of(world), tmp_path / "plain")
    place = editions.EDITIONS[name](world, tmp_path / name)
    report, others, written = make(place, tmp_path / "out")
    assert len(rows) > 40 and others == rows
    assert written == captions and len(set(captions)) > 40
    assert (report.dropped, report.strata, report.posts) == (plain.dropped, plain.strata, plain.posts)
    known = {"tags-only-2024": {"order"}}
    assert set(report.lacks) == known.get(name, set())
    about = json.loads(pq.read_schema(tmp_path / "out/selection.parquet").metadata[b"kwrap"])
    assert about["edition"]["name"] == report.edition and about["edition"]["lacks"] == report.lacks


def test_moments_are_written_in_the_zone_of_the_site(tmp_path: Path, world: duckdb.DuckDBPyConnection) -> None:
    _, rows, captions = make(sqlite_of(world), tmp_path / "plain")
    _, others, written = make(editions.write_shards_2025(world, tmp_path / "shards"), tmp_path / "out")
    assert written == captions
    # Expected: what is no date is no moment, and so empty; all else is the same to the letter.
    for one, other in zip(rows, others, strict=True):
        assert {**one, "created_at": ""} == {**other, "created_at": ""}
        assert other["created_at"] in (one["created_at"], "")
        assert other["created_at"] or not one["created_at"][:4].isdecimal() or len(one["created_at"]) != 29


def test_dates_without_offset_are_read_in_the_zone_of_the_site(
    tmp_path: Path, world: duckdb.DuckDBPyConnection
) -> None:
    _, rows, _ = make(sqlite_of(world), tmp_path / "plain")
    for number, date in enumerate(
        ("replace(substr(created_at, 1, 23), 'T', ' ')", "TRY_CAST(substr(created_at, 1, 23) AS TIMESTAMP)")
    ):
        query = f"SELECT * REPLACE ({date} AS created_at) FROM api WHERE length(created_at) = 29 ORDER BY id"
        place = editions.save(world, query, tmp_path / f"local-{number}.parquet")
        report, others, _ = make(place, tmp_path / f"out-{number}")
        assert "America/New_York" in report.lacks["zone"]
        by_id = {row["id"]: row for row in rows}
        assert others and all(row == by_id.get(row["id"], row) for row in others)


def test_the_first_of_several_rows_counts(tmp_path: Path, world: duckdb.DuckDBPyConnection) -> None:
    recipe = read_dataset({"selection": {}}, "all")
    _, rows, captions = make(sqlite_of(world), tmp_path / "plain", recipe)
    place = editions.write_shards_2026(world, tmp_path / "shards")
    report, others, written = make(place, tmp_path / "out", recipe)
    assert (others, written) == (rows, captions)
    again = world.execute("SELECT count(*) FROM api WHERE id % 20 = 1").fetchall()[0]
    assert (report.duplicate_ids, report.posts) == (again[0], POSTS)
    assert "is_deleted" in report.lacks
    described = describe_database(place)
    assert (described.posts, described.duplicate_ids) == (POSTS, again[0])
    assert sum(described.ratings.values()) == sum(described.extensions.values()) == POSTS


def test_without_deleted_posts_the_population_is_another(tmp_path: Path, world: duckdb.DuckDBPyConnection) -> None:
    recipe = read_dataset({"selection": {"drop": {"after_sample": ["deleted"]}}}, "all")
    plain, rows, _ = make(sqlite_of(world), tmp_path / "plain", recipe)
    report, others, _ = make(editions.write_sqlite_api(world, tmp_path, "NOT is_deleted"), tmp_path / "out", recipe)
    assert plain.dropped["deleted"] and report.posts == plain.posts - plain.dropped["deleted"]
    assert others == rows and "deleted posts" in report.lacks


def test_a_table_of_tags_gives_categories(tmp_path: Path, world: duckdb.DuckDBPyConnection) -> None:
    _, rows, captions = make(sqlite_of(world), tmp_path / "plain")
    place = editions.write_whole_tags(world, tmp_path)
    mapping = replace(DANBOORU, tag_table=tmp_path / "tags" / "tags.parquet")
    report, others, written = make(place, tmp_path / "out", mapping=mapping)
    assert (others, written) == (rows, captions) and not report.lacks
    assert set(describe_database(place).lacks) == {"categories"}
    dump = editions.write_dump(world, tmp_path / "dump")
    fractions = editions.save(world, "SELECT name, type::DOUBLE AS type FROM tag", tmp_path / "fractions.parquet")
    for number, table in enumerate((sqlite_of(world), dump, fractions)):
        # danbooru2023 counts its types in another way than the site.
        mapping = replace(DANBOORU, tag_table=table)
        assert make(place, tmp_path / f"out-{number}", mapping=mapping)[2] == captions


def test_json_beside_images_is_a_table(tmp_path: Path, world: duckdb.DuckDBPyConnection) -> None:
    _, rows, captions = make(sqlite_of(world), tmp_path / "plain")
    report, others, written = make(editions.write_sidecars(world, tmp_path / "images"), tmp_path / "out")
    assert (others, written) == (rows, captions) and "JSON" in report.edition


def test_old_ratings_and_capital_letters(tmp_path: Path, world: duckdb.DuckDBPyConnection) -> None:
    old = "CASE rating WHEN 'g' THEN 'S' WHEN 's' THEN 'q' ELSE upper(rating) END AS rating"
    place = editions.save(world, f"SELECT * REPLACE ({old}) FROM api", tmp_path / "old.parquet")
    described = describe_database(place)
    counted = dict(world.execute("SELECT rating, count(*) FROM api GROUP BY rating").fetchall())
    assert described.ratings["general"] == counted["g"] and described.ratings["sensitive"] == 0
    assert "sensitive" in described.lacks


def write_table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_other_types_of_columns(tmp_path: Path) -> None:
    place = write_table(
        tmp_path / "a.parquet",
        id=pa.array(["7", "9"]),
        rating=pa.array(["General", "E"]),
        score=pa.array([1.0, float("nan")]),
        fav_count=pa.array(["5", "many"]),
        created_at=pa.array([1116976570, 1700000000]),
        tag_string_general=pa.array([["long hair", "1girl"], None]),
        media_asset=pa.array([{"file_ext": "PNG", "md5": "a", "image_width": 5, "image_height": 6}] * 2),
    )
    _, rows, captions = make(place, tmp_path / "out", read_dataset({"selection": {}}, "all"))
    assert [row["id"] for row in rows] == [7, 9] and [row["rating"] for row in rows] == [0, 3]
    assert rows[0]["created_at"] == "2005-05-24T19:16:10.000-04:00" and rows[1]["created_at"][:4] == "2023"
    assert (rows[0]["file_ext"], rows[0]["md5"], rows[0]["image_width"]) == ("png", "a", 5)
    assert rows[1]["score"] == rows[1]["fav_count"] == -(1 << 31)
    assert captions[0].startswith("1girl ||| long hair ||| ") and captions[1].startswith(" |||  ||| ")


MOMENTS = [1116976570, 1116976570000, -(2**60), 2**60, None]


@pytest.mark.parametrize("kind", ["int", "double", "sqlite"])
def test_moments_are_counted_in_seconds_or_milliseconds(tmp_path: Path, kind: str) -> None:
    if kind == "sqlite":
        place = tmp_path / "a.db"
        with closing(sqlite3.connect(place)) as database, database:
            database.execute("CREATE TABLE posts (id INTEGER PRIMARY KEY, tag_string, created_at)")
            times = [*MOMENTS, 1116976570.0]
            database.executemany("INSERT INTO posts VALUES (?, 'a', ?)", enumerate(times))
    else:
        values = pa.array([each if kind == "int" or each is None else float(each) for each in MOMENTS])
        place = write_table(
            tmp_path / "a.parquet", id=pa.array(range(5)), tag_string=pa.array(["a"] * 5), created_at=values
        )
    _, rows, _ = make(place, tmp_path / "out", read_dataset({"selection": {}}, "all"))
    moments = [row["created_at"] and datetime.datetime.fromisoformat(row["created_at"]).timestamp() for row in rows]
    assert moments[:5] == [1116976570, 1116976570, "", "", ""]
    assert moments[5:] == ([1116976570] if kind == "sqlite" else [])


def test_a_system_without_the_zone_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoZone, match="Nowhere/Land: this system knows no such time zone") as raised:
        with_offsets(pa.array(["2020-01-01 10:00:00"]), "Nowhere/Land")
    assert "apt install tzdata" in raised.value.next_step
    monkeypatch.setattr("kohaku_wrap.metadata.columns.available_timezones", set)  # As where Python finds no table.
    assert read_dataset({}, "any").metadata.zone == "America/New_York"
    with pytest.raises(ProblemsFound, match="no time zone"):
        read_dataset({"metadata": {"zone": "Europe/Paris"}}, "any")


def test_tags_between_commas(tmp_path: Path) -> None:
    place = write_table(
        tmp_path / "a.parquet", id=pa.array([1]), general=pa.array(["1girl, long hair, >_<"]), artist=pa.array(["a b"])
    )
    everything = read_dataset({"selection": {}}, "all")
    assert make(place, tmp_path / "out", everything)[2] == ["1girl, a b ||| long hair, >_< ||| "]
    tight = write_table(tmp_path / "b.parquet", id=pa.array([1, 2]), general=pa.array(["1girl,long hair", "a b,c"]))
    assert make(tight, tmp_path / "out-b", everything)[2] == ["1girl ||| long hair ||| ", " ||| a b, c ||| "]


@pytest.mark.parametrize("kind", ["parquet", "sqlite"])
def test_every_way_to_write_an_offset_is_one(tmp_path: Path, kind: str) -> None:
    zones = ["-04", "-0400", "-04:00", "+00", "+0530", "Z", ""]
    dates = [f"2020-05-01{between}10:00:00{rest}{zone}" for between in "T " for rest in ("", ".25") for zone in zones]
    place = tmp_path / "posts.parquet"
    if kind == "sqlite":
        with closing(sqlite3.connect(tmp_path / "posts.db")) as database, database:
            database.execute("CREATE TABLE posts (id INTEGER PRIMARY KEY, created_at, general)")
            database.executemany("INSERT INTO posts (created_at, general) VALUES (?, 'a')", [(date,) for date in dates])
        place = tmp_path / "posts.db"
    else:
        write_table(place, id=pa.array(range(len(dates))), created_at=pa.array(dates), general=["a"] * len(dates))
    described = describe_database(place)
    assert (described.no_offset, described.unknown_dates, described.posts) == (4, 0, 28)


@pytest.mark.parametrize("name", ["gelbooru", "e621"])
def test_the_shipped_mappings(tmp_path: Path, name: str) -> None:
    recipe = load_dataset(name)
    tags = tmp_path / "tags.csv"
    if name == "gelbooru":
        place = write_table(
            tmp_path / "gelbooru.parquet",
            id=pa.array([5, 4]),
            created_at=pa.array(["Sat Oct 14 17:46:14 -0500 2023", "Sun Jan 01 00:00:00 -0600 2012"]),
            score=pa.array([3, 4]),
            width=pa.array([10, 20]),
            height=pa.array([30, 40]),
            md5=pa.array(["a", "b"]),
            rating=pa.array(["sensitive", "explicit"]),
            image=pa.array(["a.jpg", "b.PNG"]),
            status=pa.array(["active", "deleted"]),
            tags=pa.array([" 1girl smile miku wlop highres ", "x"]),
        )
        tags.write_text("id,name,count,type\n1,1girl,5,0\n2,smile,5,0\n3,miku,1,4\n4,wlop,1,1\n5,highres,9,5\n")
        expected = ["1girl, miku, wlop ||| smile ||| newest, highres, sensitive"]
        year, ids = "2023-10-14T17:46:14.000-05:00", [5]
    else:
        place = tmp_path / "posts.csv"
        place.write_text(
            "id,created_at,md5,rating,image_width,image_height,tag_string,fav_count,file_ext,is_deleted,score,description\n"
            '8,2012-07-01 05:02:57.1,a,s,10,20,solo wolf miku wlop hi_res,3,png,f,1,"two\nlines, a comma"\n'
            "9,2012-01-01 05:02:57.1,b,e,10,20,solo,3,webm,t,1,\n"
        )
        tags.write_text("id,name,category,post_count\n1,solo,0,5\n2,wolf,5,5\n3,miku,4,1\n4,wlop,1,1\n5,hi_res,7,9\n")
        expected = ["miku, wlop ||| solo, wolf ||| worst quality, early, hi res, safe"]
        year, ids = "2012-07-01T05:02:57.100+00:00", [8]
    report, rows, captions = make(place, tmp_path / "out", recipe, replace(recipe.metadata, tag_table=tags))
    assert captions == expected and report.edition.startswith(f"{name}: ")
    assert [row["id"] for row in rows] == ids and rows[0]["created_at"] == year


def test_a_word_of_two_ratings_is_named() -> None:
    with pytest.raises(ProblemsFound, match=r"metadata\.ratings\.sensitive  'S' stands under general too"):
        read_dataset({"metadata": {"ratings": {"general": ["s", "s"], "sensitive": ["S"]}}}, "own")


def test_a_mapping_names_columns_that_exist(tmp_path: Path) -> None:
    place = write_table(tmp_path / "a.parquet", number=pa.array([1]), words=pa.array(["1girl"]))
    with pytest.raises(ProblemsFound, match="number, words"):
        open_metadata(place)
    tables = {"selection": {}, "metadata": {"columns": {"id": "number", "general": "words"}}}
    assert make(place, tmp_path / "out", read_dataset(tables, "own"))[2] == ["1girl |||  ||| "]
    tables["metadata"] = {"columns": {"id": "nummer", "general": "words"}}
    with pytest.raises(ProblemsFound, match="nummer"):
        open_metadata(place, read_dataset(tables, "own").metadata)
    with pytest.raises(ProblemsFound, match="Mars"):
        read_dataset(
            {"metadata": {"zone": "Mars", "columns": {"score": ["a", "b"]}, "ratings": {"general": "g"}}}, "own"
        )


def small(path: Path, **more: Any) -> Path:
    return write_table(path, id=pa.array([1, 2]), tag_string_general=pa.array(["a", "b"]), **more)


def test_odd_files_are_one_error(tmp_path: Path, world: duckdb.DuckDBPyConnection) -> None:
    shards = editions.write_shards_2025(world, tmp_path / "gap")
    (shards / "train-00001-of-00003.parquet").unlink()
    cut = small(tmp_path / "cut.parquet")
    cut.write_bytes(cut.read_bytes()[:-9])
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    small(mixed / "a-0.parquet")
    write_table(mixed / "a-1.parquet", id=pa.array([3]), other=pa.array(["c"]))
    both = tmp_path / "both"
    both.mkdir()
    small(both / "a-0.parquet")
    write_table(both / "a-1.parquet", id=pa.array([3]), tag_string_general=pa.array([["c"]]))
    empty = tmp_path / "empty"
    empty.mkdir()
    os.mkfifo(tmp_path / "pipe.parquet")
    piped = tmp_path / "piped"
    piped.mkdir()
    small(piped / "a-0.parquet")
    os.mkfifo(piped / "a-1.parquet")
    cut_off = tmp_path / "cut_off"
    cut_off.mkdir()
    small(cut_off / "a-0.parquet")
    (cut_off / "a-1.parquet").symlink_to("nowhere")
    page = tmp_path / "page.parquet"
    page.write_text("<!doctype html><html>")
    several = tmp_path / "several.db"
    with closing(sqlite3.connect(several)) as database:
        database.executescript("CREATE TABLE a (id INTEGER, tags TEXT); CREATE TABLE b (id INTEGER, tags TEXT);")
    no_relation = editions.write_dump(world, tmp_path / "dump")
    (no_relation / "tag.parquet").unlink()
    words = write_table(tmp_path / "words.parquet", id=pa.array(["x-1"]), tags=pa.array(["a"]))
    aside, bare, notes = tmp_path / "aside.duckdb", tmp_path / "bare.duckdb", tmp_path / "notes.db"
    duckdb.connect(str(aside)).execute("CREATE SCHEMA dan; CREATE TABLE dan.posts (id INTEGER, tags TEXT)").close()
    duckdb.connect(str(bare)).close()
    with closing(sqlite3.connect(notes)) as database:
        database.execute("CREATE TABLE notes (number, body)")
    for place, said in (
        (shards, "missing 1 of 3 files: 1"),
        (cut, "cut off or damaged"),
        (mixed, "which other files have"),
        (both, "a-0.parquet  tag_string_general: text, in other files lists"),
        (empty, "no Parquet, CSV or JSON file"),
        (piped, "a-1.parquet: not a regular file"),
        (cut_off, "a-1.parquet: a link to nothing"),
        (tmp_path / "pipe.parquet", "not a regular file"),
        (tmp_path / "none.parquet", "no such file"),
        (page, "a web page"),
        (several, "has an id and tags"),
        (no_relation, "no such table"),
        (words, "no whole number"),
        (aside, "there are some in dan"),
        (bare, "no table in it"),
        (notes, "notes  columns"),
    ):
        with pytest.raises(KwrapError) as caught:
            describe_database(place)
        assert said in str(caught.value) and caught.value.next_step, place
    posts, torn, odd = small(tmp_path / "b.parquet"), tmp_path / "torn.db", tmp_path / "odd.db"
    torn.write_bytes(sqlite_of(world).read_bytes()[:5000])
    with closing(sqlite3.connect(odd)) as database, database:
        database.execute("CREATE TABLE tags (name, category)")
        database.execute("INSERT INTO tags VALUES (CAST(x'ff61' AS TEXT), 0), ('b', 1)")
    for table, said in (
        (tmp_path / "gone.csv", "no such file"),
        (tmp_path / "pipe.parquet", "not a regular file"),
        (torn, "cut off"),
        (page, "a web page"),
        (aside, "none in DuckDB's schema main"),
    ):
        with pytest.raises(KwrapError, match=said):
            describe_database(posts, replace(DANBOORU, tag_table=table))
    assert describe_database(posts, replace(DANBOORU, tag_table=odd)).tags == 2


@pytest.mark.parametrize(
    "names",
    [
        ("posts-20231001120000.csv", "posts-20241001120000.csv"),
        ("posts-0000.tsv", "posts-0001.TSV"),
        ("danbooru.posts-1.CSV", "danbooru.posts-2.csv"),
    ],
)
def test_files_of_any_names_are_one_table(tmp_path: Path, names: tuple[str, str]) -> None:
    for number, name in enumerate(names):
        between = "," if name.lower().endswith("csv") else "\t"
        (tmp_path / name).write_text(f"id{between}tag_string\n{number}{between}solo\n")
    assert describe_database(tmp_path).posts == 2


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_name_is_no_pattern(tmp_path: Path, ending: str) -> None:
    for number, name in enumerate(("set[1]", "set1", "set*", "setx", "set?"), 1):
        (tmp_path / name).mkdir()
        ids, tags = pa.array(range(number)), pa.array(["a"] * number)
        path = write_table(tmp_path / name / "posts.parquet", id=ids, tag_string=tags)
        if ending != "parquet":
            kind = "FORMAT csv, HEADER" if ending == "csv" else "FORMAT json"
            target = path.with_suffix(f".{ending}")
            duckdb.sql(f"COPY (SELECT * FROM '{glob.escape(str(path))}') TO '{target}' ({kind})")
            path.unlink()
    found = {place.name: describe_database(place / f"posts.{ending}").posts for place in tmp_path.iterdir()}
    assert found == {"set[1]": 1, "set1": 2, "set*": 3, "setx": 4, "set?": 5}


def test_columns_may_have_dots_in_their_names(tmp_path: Path) -> None:
    """As pandas flattens JSON; the same names lead into structures elsewhere."""
    table = tmp_path / "flat.csv"
    table.write_text('id,tags.general,score.total,file.ext,"a ""b"""\n1,solo,5,.JPG,x\n')
    described = describe_database(table)
    assert described.would_drop["no_still_image"] == described.unknown["score"] == 0
    assert described.tag_types["general"] == 1 and described.columns["score"] == "score.total"


def test_the_lines_for_e621s_json_read_it(tmp_path: Path) -> None:
    text = (shipped_folder("datasets") / "e621.toml").read_text(encoding="utf-8")
    lines = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ") and " = " in line]
    (tmp_path / "mine.toml").write_text(text.replace('tags = "tag_string"', "\n".join(lines)), encoding="utf-8")
    post = {
        "id": 7, "created_at": "2022-01-01T00:00:00.000-05:00", "rating": "s", "fav_count": 9,
        "file": {"width": 70, "height": 60, "ext": "png", "md5": "0" * 32, "url": "https://a/b.png"},
        "score": {"up": 5, "down": -1, "total": 4}, "flags": {"deleted": False, "pending": False},
        "tags": {"general": ["hat"], "species": ["cat"], "artist": ["bob"], "copyright": [], "character": ["ann"],
                 "meta": ["hi_res"], "lore": [], "invalid": []},
    }  # fmt: skip
    (tmp_path / "posts").mkdir()
    (tmp_path / "posts" / "e621_7.png.json").write_text(json.dumps(post))
    _, rows, captions = make(tmp_path / "posts", tmp_path / "out", load_dataset(str(tmp_path / "mine.toml")))
    assert captions == ["ann, bob ||| hat, cat ||| worst quality, newest, hi res, safe"]
    assert (rows[0]["score"], rows[0]["image_width"], rows[0]["file_ext"]) == (4, 70, "png")


def test_json_of_several_kinds_of_values_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"id": 7, "tag_string": "x y", "tag_string_general": "x y", "score": 5}')
    (tmp_path / "b.json").write_text('{"id": "8", "tag_string": "z", "tag_string_general": "z", "score": "many"}')
    described = describe_database(tmp_path)
    assert (described.posts, described.tag_types["general"], described.unknown["score"]) == (2, 3, 1)


def test_a_file_that_is_no_posts_is_not_counted_among_them(tmp_path: Path) -> None:
    small(tmp_path / "posts.parquet")
    write_table(tmp_path / "other.parquet", x=pa.array([1]))
    assert describe_database(tmp_path).edition == "API columns, Parquet"


def test_lists_of_words_that_stand_once_are_read(tmp_path: Path) -> None:
    words = pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), pa.array(["x", "y", "x"]).dictionary_encode())
    described = describe_database(
        write_table(tmp_path / "lists.parquet", id=pa.array([1, 2]), tag_string_general=words)
    )
    assert (described.tags, described.tag_types["general"]) == (2, 2)


def test_rows_come_in_the_order_of_the_files(tmp_path: Path) -> None:
    """Several threads read them, and a join in the plan would hand them over as they come."""
    row = "2023-05-01T10:00:00.000-04:00,g,5,9,png,10,10,f,f,1girl solo,1girl solo"
    header = "id,created_at,rating,score,fav_count,file_ext,image_width,image_height,is_deleted,is_banned,tag_string,"
    for shard in range(12):
        lines = (f"{shard * 5000 + number},{row}\n" for number in range(5000))
        (tmp_path / f"posts-{shard:02}.csv").write_text(f"{header}tag_string_general\n{''.join(lines)}")
    source = open_metadata(tmp_path)
    for _ in range(4):
        batches = source.scan(f"SELECT id, is_deleted FROM ({source.edition.posts}) AS post WHERE is_deleted = 0")
        ids = np.concatenate([batch.column(0).to_numpy() for batch in batches])
        assert (ids == np.arange(60_000)).all()


def test_a_dump_in_csv_is_filtered_by_tags(tmp_path: Path, world: duckdb.DuckDBPyConnection) -> None:
    recipe = read_dataset({"selection": {"drop": {"unless": {"tags_any": ["c.c."]}}}}, "some")
    plain, rows, captions = make(sqlite_of(world), tmp_path / "plain", recipe)
    (tmp_path / "dump").mkdir()
    for table in editions.DUMP:
        world.execute(f"COPY (SELECT * FROM {table} ORDER BY id) TO '{tmp_path}/dump/{table}.csv' (HEADER)")
    report, others, written = make(tmp_path / "dump", tmp_path / "out", recipe)
    assert len(others) == len(rows) > 2 and written == captions and report.dropped == plain.dropped


def test_inspect_knows_what_is_metadata(tmp_path: Path) -> None:
    assert is_metadata(small(tmp_path / "a.parquet"))
    model = tmp_path / "model.safetensors"
    model.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert not is_metadata(model)


def test_inspect_names_a_column_once_where_both_names_are_one(tmp_path: Path) -> None:
    shown = CliRunner().invoke(program, ["inspect", str(small(tmp_path / "a.parquet"))]).output
    (columns,) = (line for line in shown.splitlines() if line.startswith("columns"))
    assert columns.split(maxsplit=1)[1] == "id, general tags: tag_string_general"


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32()])
def test_flags_of_a_column_of_fractions(kind: pa.DataType) -> None:
    table = pa.table({"flag": pa.array([0.0, 1.0, float("nan"), None, 2.0, 0.5], kind)})
    query = f"SELECT {Duck({'flag': ('flag', kind)}).flag('flag')} FROM table"
    with duckdb.connect() as connection:
        connection.register("table", table)
        rows = connection.execute(query.replace("FROM table", 'FROM "table"')).fetchall()
    assert [value for (value,) in rows] == [0, 1, None, None, None, None]
