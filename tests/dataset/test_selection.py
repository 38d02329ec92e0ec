"""The seeded selection: each post once, every drop counted, the same everywhere."""

from __future__ import annotations

import json
import tomllib
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, strategies

from kohaku_wrap.cli import run_program
from kohaku_wrap.cli.select import command
from kohaku_wrap.dataset import selection
from kohaku_wrap.dataset.recipe import read_dataset
from kohaku_wrap.dataset.selection import EmptySelection, SelectionReport, sample_stratum, select_posts
from kohaku_wrap.dataset.selection_file import BadSelection, read_about, read_selected_posts
from kohaku_wrap.metadata.database import open_database
from kohaku_wrap.metadata.tags import UnknownTags
from kohaku_wrap.streams import draws, stream_key

RECIPE: dict[str, Any] = {
    "seed": 7,
    "strata": [
        {"first_id": 0, "last_id": 299, "sample": 40},
        {"first_id": 300, "last_id": 599, "sample": 60},
        {"first_id": 600},
    ],
    "drop": {"after_sample": ["deleted", "gold", "no_still_image"]},
}


@pytest.fixture(scope="module")
def database_file(tmp_path_factory: pytest.TempPathFactory, writer: ModuleType) -> Path:
    path: Path = writer.write_layout(tmp_path_factory.mktemp("db") / "a.db", writer.make_world(300))
    return path


def select(path: Path, out: Path, selection: dict[str, Any]) -> tuple[SelectionReport, list[dict[str, Any]]]:
    report = select_posts(open_database(path), read_dataset({"selection": selection}, "mine"), out)
    return report, pq.read_table(out).to_pylist()


def posts_of(writer: ModuleType) -> dict[int, dict[str, Any]]:
    return {post["id"]: post for post in writer.make_world(300).posts}


def reason_to_drop(post: dict[str, Any]) -> str:
    if post["is_deleted"]:
        return "deleted"
    if not post["md5"] or not post["file_url"]:
        return "gold"
    return "" if post["file_ext"] in ("jpg", "jpeg", "png", "webp", "avif") else "no_still_image"


def test_counts_add_up_and_every_post_comes_once(tmp_path: Path, database_file: Path, writer: ModuleType) -> None:
    report, rows = select(database_file, tmp_path / "sel.parquet", RECIPE)
    ids = [row["id"] for row in rows]
    assert ids == sorted(set(ids))
    assert [stratum.sampled for stratum in report.strata] == [40, 60, 101]
    assert report.sampled == 201 == report.selected + sum(report.dropped.values())
    assert report.selected == len(rows) == sum(stratum.selected for stratum in report.strata)
    posts = posts_of(writer)
    assert all(not reason_to_drop(posts[post_id]) for post_id in ids)
    late = [post_id for post_id in posts if post_id >= 600]
    assert [post_id for post_id in ids if post_id >= 600] == [one for one in late if not reason_to_drop(posts[one])]
    for row in rows:
        post = posts[row["id"]]
        assert {name: row[name] for name in row if name != "md5"} == {name: post[name] for name in row if name != "md5"}


def test_each_drop_counts_under_its_first_reason(tmp_path: Path, database_file: Path, writer: ModuleType) -> None:
    everything = {"drop": RECIPE["drop"]}
    report, _ = select(database_file, tmp_path / "sel.parquet", everything)
    reasons = [reason_to_drop(post) for post in posts_of(writer).values()]
    assert report.dropped == {name: reasons.count(name) for name in ("deleted", "gold", "no_still_image")}
    assert list(report.dropped) == ["deleted", "gold", "no_still_image"]


def test_filters_before_the_sample_fill_it(tmp_path: Path, database_file: Path) -> None:
    before = RECIPE | {"drop": {"before_sample": ["deleted", "gold", "no_still_image"]}}
    report, _ = select(database_file, tmp_path / "sel.parquet", before)
    # Of the second stratum only 50 posts pass, so all are taken.
    assert [(stratum.available > 40, stratum.selected) for stratum in report.strata][:2] == [(True, 40), (True, 50)]
    assert report.dropped == {} and sum(report.dropped_before_sample.values()) > 0


def test_golden_sample(tmp_path: Path, database_file: Path) -> None:
    """These ids pin the generator: they must be the same on every machine, Python and version of kwrap."""
    _, rows = select(database_file, tmp_path / "sel.parquet", {"seed": 1337, "strata": [{"sample": 12}]})
    assert [row["id"] for row in rows] == [219, 300, 327, 351, 360, 366, 423, 579, 603, 711, 807, 840]
    ids = np.arange(2_000_000)
    large = ids[sample_stratum(ids, ids, 8, 1337, 0)].tolist()
    assert large == [20664, 501459, 524508, 767936, 1225094, 1230633, 1433416, 1474565]


def test_other_seeds_and_strata_draw_others(tmp_path: Path, database_file: Path) -> None:
    samples = []
    for seed in (1, 2):
        _, rows = select(database_file, tmp_path / "sel.parquet", {"seed": seed, "strata": [{"sample": 50}]})
        samples.append({row["id"] for row in rows})
    assert samples[0] != samples[1]


def test_every_stratum_draws_from_a_stream_of_its_own(tmp_path: Path, database_file: Path) -> None:
    """One stream for all would make a post's chance in one stratum decide its chance in another."""
    ids = np.arange(100)
    drawn = [ids[sample_stratum(ids, ids, 5, 1337, number)].tolist() for number in range(3)]
    assert drawn == [[22, 26, 43, 77, 79], [9, 17, 21, 39, 94], [19, 24, 35, 41, 48]]
    # The same ids as a recipe's first stratum and as its second.
    cut = {"first_id": 0, "last_id": 499, "sample": 40}
    samples = []
    for strata in ([cut, {"first_id": 500}], [{"first_id": 500}, cut]):
        report, rows = select(database_file, tmp_path / "sel.parquet", {"seed": 3, "strata": strata})
        samples.append({row["id"] for row in rows if row["id"] < 500})
        assert sorted(stratum.sampled for stratum in report.strata)[0] == len(samples[-1]) == 40
    assert samples[0] != samples[1]


@pytest.mark.parametrize(("posts", "sample"), [(5000, 1000), (5000, 4999), (997, 3), (64, 63), (64, 64)])
def test_samples_are_the_smallest_draws(posts: int, sample: int) -> None:
    ids = np.arange(posts) * 3 + 5
    numbers = draws(stream_key("select", 11, 2), ids)
    wanted = np.sort(np.argsort(numbers, kind="stable")[:sample])
    assert sample_stratum(ids, np.arange(posts), sample, 11, 2).tolist() == wanted.tolist()


def test_samples_of_any_size_are_the_smallest_draws() -> None:
    ids = np.arange(2000)
    by_draw = np.argsort(draws(stream_key("select", 1, 0), ids), kind="stable")
    for sample in range(1, 2000, 3):
        assert np.array_equal(sample_stratum(ids, ids, sample, 1, 0), np.sort(by_draw[:sample])), sample


def test_filters_take_in_turn_and_count_what_they_cannot_know() -> None:
    """Three filters of the scan, bit by bit, their unknown posts in the bits above, and one by tags."""
    drop = {"a": [1, 0, 0, 1, 0, 0], "b": [1, 1, 0, 0, 0, 0], "c": [0, 0, 0, 0, 0, 1]}
    unknown = {"a": [0, 1, 1, 0, 0, 0], "b": [1, 0, 0, 1, 1, 0], "c": [0, 0, 0, 0, 0, 0]}
    deleted, no_offset = [1, 0, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]
    tags = [0, 0, 1, 1, 0, 0]
    columns = [*drop.values(), *unknown.values(), deleted, no_offset, tags]
    bits = np.sum([np.array(column, dtype=np.int64) << place for place, column in enumerate(columns)], axis=0)
    names = [*drop, *(f"unknown {name}" for name in unknown), "deleted", "no_offset", "tags"]
    drops = selection.Drops(bits, {name: place for place, name in enumerate(names)})
    for name in drop:
        assert drops.of(name).tolist() == [bool(one) for one in drop[name]]
        assert drops.of(f"unknown {name}").tolist() == [bool(one) for one in unknown[name]]
    assert [int(drops.of(name).sum()) for name in ("deleted", "no_offset")] == [2, 3]
    assert drops.of("tags").tolist() == [bool(one) for one in tags] and not drops.of("unknown tags").any()
    kept = np.array([1, 1, 1, 1, 1, 0], dtype=bool)
    asked = {"before": 7}
    counts = selection.count_first_reasons(["tags", "a", "b", "c"], drops, kept, asked)
    assert counts == {"tags": 2, "a": 1, "b": 1, "c": 0} and list(counts) == ["tags", "a", "b", "c"]
    assert asked == {"before": 7, "a": 1, "b": 1}
    assert kept.tolist() == [False, False, False, False, True, False]


def test_posts_outside_the_strata_are_counted(tmp_path: Path, database_file: Path) -> None:
    strata = [{"first_id": 100, "last_id": 199}, {"first_id": 600, "last_id": 602, "sample": 1}]
    report, rows = select(database_file, tmp_path / "sel.parquet", {"seed": 1, "strata": strata})
    inside = [row["id"] for row in rows if row["id"] < 600]
    assert report.posts == 300 and report.outside_strata == 300 - sum(one.available for one in report.strata)
    assert [one.available for one in report.strata] == [len(inside), 1] and report.selected == len(inside) + 1
    assert min(inside) >= 100 and max(inside) <= 199
    with pytest.raises(FrozenInstanceError):
        report.seed = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        report.strata[0].asked = 2  # type: ignore[misc]


@given(
    ids=strategies.sets(strategies.integers(0, 10**7), min_size=1, max_size=60),
    more=strategies.sets(strategies.integers(0, 10**7), max_size=60),
    sample=strategies.integers(1, 70),
    seed=strategies.integers(0, 2**40),
)
def test_sample_is_without_replacement_and_stable(ids: set[int], more: set[int], sample: int, seed: int) -> None:
    array = np.array(sorted(ids), dtype=np.int64)
    taken = array[sample_stratum(array, np.arange(len(array)), sample, seed, 0)]
    assert len(set(taken.tolist())) == len(taken) == min(sample, len(array))
    assert (np.diff(taken) > 0).all()
    # A post's draw is its own: in a larger database a post is only ever pushed out by one that was not there before.
    larger = np.array(sorted(ids | more), dtype=np.int64)
    again = set(larger[sample_stratum(larger, np.arange(len(larger)), sample, seed, 0)].tolist())
    assert again & ids <= set(taken.tolist())


def test_the_same_from_every_layout(tmp_path: Path, writer: ModuleType, database_file: Path) -> None:
    condition = {"tags_any": ["1girl", ">_<", "k-on!"], "tags_none": ["solo"]}
    recipe = RECIPE | {"drop": RECIPE["drop"] | {"unless": condition}}
    report, rows = select(database_file, tmp_path / "sel.parquet", recipe)
    assert report.dropped_before_sample["tags_none"] and report.selected > 10
    for layout in writer.LAYOUTS:
        path = writer.write_layout(tmp_path / f"{layout}.db", writer.make_world(300), layout, indexed=False)
        other, other_rows = select(path, tmp_path / "other.parquet", recipe)
        assert other_rows == rows
        assert other.dropped == report.dropped and other.dropped_before_sample == report.dropped_before_sample


def test_tag_conditions(tmp_path: Path, database_file: Path, writer: ModuleType) -> None:
    world = writer.make_world(300)
    names = {tag[0]: tag[1] for tag in world.tags}
    tags_of: dict[int, set[str]] = {post["id"]: set() for post in world.posts}
    for post, tag in world.relations:
        tags_of[post].add(names[tag])
    cases = {
        "tags_all": (["1girl", "solo"], lambda tags: {"1girl", "solo"} <= tags),
        "tags_any": (["1girl", "solo"], lambda tags: {"1girl", "solo"} & tags),
        "tags_none": (["1girl", "solo"], lambda tags: not {"1girl", "solo"} & tags),
    }
    for name, (value, keeps) in cases.items():
        _, rows = select(database_file, tmp_path / "sel.parquet", {"drop": {"unless": {name: value}}})
        assert [row["id"] for row in rows] == [post for post, tags in tags_of.items() if keeps(tags)]


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ('ratings = ["sensitive", "explicit"]', [2, 4]),
        ('extensions = ["png"]', [3]),
        ("date = {first = 2017-01-01, last = 2018-12-31}", [2, 3]),
        ("pixels = {min = 2000}", [2, 3, 4]),
        ("pixels = {max = 2000}", [1, 2]),
        ("score = {min = 1, max = 2}", [2, 3]),
        ("fav_count = {min = 20}", [3, 4]),
        ("width = {max = 20}", [1, 2]),
        ("height = {min = 100}", [2, 3, 4]),
    ],
)
def test_every_kind_of_condition(tmp_path: Path, writer: ModuleType, condition: str, kept: list[int]) -> None:
    posts = [
        writer.make_post(
            number + 1,
            rating=number,
            file_ext="png" if number == 2 else "jpg",
            created_at=f"{2016 + number}-05-24T19:16:10.000-04:00",
            image_width=10 * (number + 1),
            image_height=90 if number == 0 else 100 if number < 3 else 50 * number,
            score=number,
            fav_count=10 * number,
        )
        for number in range(4)
    ]
    path = writer.write_layout(tmp_path / "a.db", writer.World(posts, [], []))
    recipe = tomllib.loads(f"[drop.unless]\n{condition}\n")
    _, rows = select(path, tmp_path / "sel.parquet", recipe)
    assert [row["id"] for row in rows] == kept


def test_unknown_tag_is_an_error_not_an_empty_filter(tmp_path: Path, database_file: Path) -> None:
    with pytest.raises(UnknownTags, match=r"selection.drop.unless.tags_none: the database has no tag 'solo_'"):
        select(database_file, tmp_path / "sel.parquet", {"drop": {"unless": {"tags_none": ["solo_"]}}})
    assert not (tmp_path / "sel.parquet").exists()


def test_shortages_are_told(tmp_path: Path, database_file: Path) -> None:
    strata = [{"last_id": 899, "sample": 5000}, {"first_id": 900, "last_id": 999}, {"first_id": 5000, "sample": 3}]
    report, _ = select(database_file, tmp_path / "sel.parquet", {"seed": 1, "strata": strata})
    assert report.warnings == (
        "ids the first to 899: 5,000 asked, only 299 there; all were taken",
        "ids 5,000 to the last: empty, no post there passes the filters before the sample",
    )


def test_a_sample_of_all_there_are_is_no_shortage(tmp_path: Path, database_file: Path) -> None:
    for sample, told in ((300, 0), (301, 1)):
        strata = {"seed": 1, "strata": [{"sample": sample}]}
        report, _ = select(database_file, tmp_path / "sel.parquet", strata)
        assert len(report.warnings) == told and report.selected == 300


def test_empty_selection_is_an_error_and_writes_nothing(tmp_path: Path, database_file: Path) -> None:
    out = tmp_path / "sel.parquet"
    with pytest.raises(EmptySelection, match="no post is left of 300"):
        select(database_file, out, {"strata": [{"first_id": 10**6}]})
    with pytest.raises(EmptySelection, match=r"dropped: 300 score"):
        select(database_file, out, {"drop": {"unless": {"score": {"min": 10**6}}}})
    assert list(tmp_path.iterdir()) == []


def test_selection_file_tells_where_it_comes_from(tmp_path: Path, database_file: Path) -> None:
    out = tmp_path / "sel.parquet"
    select(database_file, out, RECIPE)
    posts, about = read_about(out)
    assert about["dataset"] == "mine" and about["seed"] == 7 and about["counts"]["selected"] == posts
    assert len(about["db_digest"]) == 64
    first = out.read_bytes()
    select(database_file, out, RECIPE)
    assert out.read_bytes() == first


def test_other_files_are_no_selection(tmp_path: Path) -> None:
    with pytest.raises(BadSelection, match="no such file"):
        read_selected_posts(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("id\n1\n")
    with pytest.raises(BadSelection, match="not a selection"):
        read_selected_posts(tmp_path / "text.parquet")


def test_command_prints_one_document(tmp_path: Path, database_file: Path) -> None:
    out = tmp_path / "sel.parquet"
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        "[selection]\nseed = 7\n[[selection.strata]]\nlast_id = 600\nsample = 50\n"
        '[selection.drop]\nafter_sample = ["deleted", "gold"]\n'
    )
    result = CliRunner().invoke(command, [str(recipe), "--db", str(database_file), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert document["sampled"] == 50 == document["selected"] + sum(document["dropped"].values())
    assert document["seed"] == 7 and set(document["dropped"]) == {"deleted", "gold"}
    assert pq.read_metadata(out).num_rows == document["selected"]


def test_command_names_the_next_one(tmp_path: Path, database_file: Path) -> None:
    out = tmp_path / "sel.parquet"
    result = CliRunner().invoke(command, ["epsilon", "--db", str(database_file), "--out", str(out)])
    assert result.exit_code == 0
    assert f"Next: kwrap extract {out} --tars TARS --out IMAGES" in result.stdout
    assert "note: ids 2,000,000 to 4,999,999: empty" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["epsilom", "--db", "DB"], 2, "did you mean epsilon"),
        (["demo", "--db", "NONE"], 1, "no such file"),
        (["demo", "--db", "TEXT"], 1, "not a sqlite database"),
        (["demo"], 2, "--db"),
    ],
)
def test_faults_end_in_one_message(
    tmp_path: Path,
    database_file: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    (tmp_path / "text.db").write_text("hello" * 99)
    paths = {"DB": str(database_file), "NONE": str(tmp_path / "none.db"), "TEXT": str(tmp_path / "text.db")}
    out = tmp_path / "sel.parquet"
    assert run_program(["select", *(paths.get(one, one) for one in arguments), "--out", str(out)]) == code
    assert words in capsys.readouterr().err
    assert not out.exists()
