"""Natural-language captions beside tags: placed, mixed, cleaned, counted, and whole in every form."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kohaku_wrap.cli import program
from kohaku_wrap.dataset.captions.mixing import ALONE, BOTH, TAGS, TEXT, TextMix, put_text, put_texts
from kohaku_wrap.dataset.captions.text_table import NoTexts, TextTable, read_text_table
from kohaku_wrap.dataset.recipe import read_dataset
from kohaku_wrap.dataset.selection import select_posts
from kohaku_wrap.errors import ProblemsFound, UsageError
from kohaku_wrap.formats.caption_rows import open_captions, read_captions_metadata
from kohaku_wrap.formats.caption_writer import DamagedCaptions, check_columns
from kohaku_wrap.metadata.database import open_database

MIXED = '[caption]\nprefix = ["people", "text"]\n[caption.text]\ntags = 0.3\ntext = 0.3\nboth = 0.4\n'


class World:
    """A database of 150 posts, all selected, with images, and texts for two of three in no order."""

    def __init__(self, path: Path, writer: ModuleType, extract: Callable[..., None]) -> None:
        self.path, self.images, self.selection = path, path / "images", path / "sel.parquet"
        self.database = writer.write_layout(path / "a.db", writer.make_world(150))
        dataset = {"selection": {"drop": {"after_sample": ["deleted", "gold", "no_still_image"]}}}
        select_posts(open_database(self.database), read_dataset(dataset, "mine"), self.selection)
        self.ids: list[int] = pq.read_table(self.selection)["id"].to_pylist()
        extract(self.selection, self.images)
        self.texts = {id: f"Post {id}, a girl, sits" for place, id in enumerate(self.ids) if place % 3}
        self.write_texts(self.texts)

    def write_texts(self, texts: dict[int, str], name: str = "texts.parquet", **columns: str) -> Path:
        rows = random.Random(3).sample(sorted(texts.items()), len(texts))
        table = {
            columns.get("id", "id"): [id for id, _ in rows],
            columns.get("text", "text"): [text for _, text in rows],
        }
        pq.write_table(pa.table(table), self.path / name, row_group_size=7)
        return self.path / name

    def call(self, *words: object, toml: str = "", code: int = 0) -> Any:
        (self.path / "mine.toml").write_text(toml)
        common = ["caption", str(self.selection), "--db", str(self.database), "--dataset", str(self.path / "mine.toml")]
        result = CliRunner().invoke(program, [*common, *map(str, words), "--json"])
        if code:
            assert getattr(result.exception, "exit_code", None) == code, result.output
            return str(result.exception)
        assert result.exception is None, result.exception
        return json.loads(result.stdout)

    def caption(self, *words: object, toml: str = "", formats: str = "txt,cache,jsonl") -> Any:
        places = ("--text", self.path / "texts.parquet", "--out", self.images, "--format", formats)
        return self.call(*places, *words, toml=toml)

    @property
    def rows(self) -> dict[int, dict[str, Any]]:
        check_columns(self.images / "captions.arrow")
        return {row["id"]: row for row in open_captions(self.images).read_all().to_pylist()}

    @property
    def written(self) -> dict[int, str]:
        """Captions of the cache, which those of the two other forms equal."""
        cache = json.loads((self.images / "metadata_cache.json").read_text())
        found = {int(Path(name).stem): entry["caption"] for name, entry in cache.items()}
        assert found == {int(path.stem): path.read_text() for path in self.images.glob("*/*.txt")}
        lines = [json.loads(line) for line in (self.images / "captions.jsonl").read_text().splitlines()]
        assert found == {int(Path(line["image_path"]).stem): line["caption"] for line in lines}
        return found


@pytest.fixture
def world(tmp_path: Path, writer: ModuleType, extract: Callable[..., None]) -> World:
    return World(tmp_path, writer, extract)


def test_without_a_place_of_its_own_a_text_ends_the_prefix_of_every_post_that_has_one(world: World) -> None:
    report = world.caption()
    assert report["texts"]["with_text"] == len(world.texts)
    plain = {id: row["caption"] for id, row in world.rows.items()}
    for id, caption in world.written.items():
        head, separator, rest = plain[id].partition(" ||| ")
        text = world.texts.get(id, "")
        assert caption == ", ".join(part for part in (head, text) if part) + separator + rest
    about = read_captions_metadata(world.images)
    assert (about["format"], about["text"]) == (3, {"tags": 0.0, "text": 0.0, "both": 1.0})
    assert about["prompt_format"].startswith("<1girl/1boy/1other/...>, <character>, <series>, <artists>, <text>, ")


def test_the_columns_keep_tags_and_texts_apart_and_the_tags_are_those_without_texts(world: World) -> None:
    world.call("--out", world.images)
    before, digest = (
        {id: row["caption"] for id, row in world.rows.items()},
        read_captions_metadata(world.images)["digest"],
    )
    assert "text" not in next(iter(world.rows.values()))
    world.caption(toml=MIXED)
    world.call("--out", world.images, toml='[caption]\nprefix = ["people", "character", "series", "artist", "text"]')
    assert read_captions_metadata(world.images)["digest"] == digest, "a place for texts alone changes nothing"
    report = world.caption()
    assert {id: row["caption"] for id, row in world.rows.items()} == before
    assert {id: row["text"] for id, row in world.rows.items()} == {id: world.texts.get(id, "") for id in world.ids}
    assert read_captions_metadata(world.images)["digest"] != digest
    assert (report["formats"]["arrow"]["written"], report["formats"]["arrow"]["unchanged"]) == (
        len(world.texts), len(world.ids) - len(world.texts))  # fmt: skip
    assert world.caption()["formats"]["arrow"]["unchanged"] == len(world.ids)


def test_shares_are_drawn_once_for_files_and_belong_to_the_digest(world: World) -> None:
    first = world.caption(toml=MIXED)
    texts, forms = world.written, Counter[str]()
    for id, row in world.rows.items():
        whole = put_text(row["caption"], row["text"], row["text_at"], BOTH)
        form = {row["caption"]: "tags", f"{row['text']}{ALONE}": "text", whole: "both"}[texts[id]]
        forms[form if row["text"] else "none"] += 1
    assert all(forms[form] > 10 for form in ("tags", "text", "both", "none")), forms
    assert any("drawn once" in note for note in first["notes"])
    digest = first["digest"]
    assert world.caption(toml=MIXED)["digest"] == digest
    assert world.caption(toml=MIXED.replace("0.4", "0.5").replace("tags = 0.3", "tags = 0.2"))["digest"] != digest


def test_texts_are_made_one_line_without_separators_and_all_of_it_is_counted(world: World) -> None:
    a, b, c, d, *_ = world.ids
    odd = {a: " one\r\ntwo\u2028three\t ", b: "x ||| y|||||z", c: "1,000 girls", d: " \n "}
    world.write_texts({**odd, 999_999: "of no post ||| \n"})
    report = world.caption()
    assert {id: world.rows[id]["text"] for id in odd} == {a: "one two three", b: "x | y|z", c: "1,000 girls", d: ""}
    counted = {name: report["texts"][name] for name in ("with_text", "line_ends", "separators", "tight_commas")}
    assert counted == {"with_text": 3, "line_ends": 1, "separators": 1, "tight_commas": 1}
    assert any("1 text with a comma without one space" in note for note in report["notes"])


def test_captions_beyond_the_limits_of_tokens_are_counted(world: World) -> None:
    long, longer = world.ids[:2]
    world.write_texts({long: "word " * 100, longer: "word " * 300})
    report = world.caption()
    shown = {name: report["texts"][f"over_{name}_tokens"] for name in (75, 150, 225)}
    assert shown[225] == 1
    assert shown[75] >= 2
    assert report["tokens_by"] == "estimate"
    stats = world.call("--text", world.path / "texts.parquet", "--stats")
    assert stats["cut"] == {str(name): count for name, count in shown.items()}
    assert stats["groups"]["text"] == 2
    assert stats["token_quantiles"]["maximum"] >= 300


def test_a_post_is_explained_with_its_text(world: World) -> None:
    id = next(iter(world.texts))
    found = world.call("--text", world.path / "texts.parquet", "--post", id, toml=MIXED)
    assert {"group": "text", "words": [world.texts[id]]} in found["groups"]
    world.caption(toml=MIXED.replace("tags = 0.3\ntext = 0.3\nboth = 0.4", "both = 1"))
    assert found["caption"] == world.written[id]


def test_a_post_alone_keeps_its_texts_in_the_current_folder(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.path / "here").mkdir()
    monkeypatch.chdir(world.path / "here")
    folders = []

    def note(path: Path, column: str, folder: Path) -> TextTable:
        folders.append(folder)
        return read_text_table(path, column, folder)

    monkeypatch.setattr("kohaku_wrap.dataset.captions.text_table.read_text_table", note)
    words = ["--post", next(iter(world.texts)), "--db", world.database, "--text", world.path / "texts.parquet"]
    assert CliRunner().invoke(program, ["caption", *map(str, words)], catch_exceptions=False).exit_code == 0
    assert folders == [world.path / "here"]  # Of its parent nothing says that one may write there.


def test_ids_may_be_text_shards_lie_in_a_folder_and_of_equal_ids_the_first_counts(world: World, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    a, b = world.ids[:2]
    pq.write_table(pa.table({"post_id": [str(a), str(a)], "caption": ["first", "second"]}), shards / "0.parquet")
    pq.write_table(pa.table({"id": [b, None], "text": ["third", "lost"]}), shards / "1.parquet")
    table = read_text_table(shards, "", tmp_path)
    assert (table.texts_of(np.array([a, b, 5_000_000]))[0].to_pylist(), table.repeated) == (["first", "third", ""], 1)


@pytest.mark.parametrize(
    ("columns", "option", "said"),
    [
        ({"id": [1], "text": ["a"], "caption": ["b"]}, "", "texts stand in text and in caption"),
        ({"id": [1], "words": ["a"]}, "", "no column named text, caption"),
        ({"id": [1], "text": ["a"]}, "other", "no column other; its columns: id, text"),
        ({"name": [1], "text": ["a"]}, "", "no column named id, post_id"),
        ({"id": ["x1"], "text": ["a"]}, "", "cannot be read"),
        ({"id": [1], "text": [["a", "b"]]}, "", "cannot be read"),
    ],
)
def test_a_table_that_is_unclear_is_refused(columns: Any, option: str, said: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(NoTexts, match=said):
        read_text_table(tmp_path / "t.parquet", option, tmp_path)


def test_what_is_no_parquet_is_refused_in_one_message(world: World) -> None:
    (world.path / "t.csv").write_text("id,text\n1,a\n")
    assert "cannot be read" in world.call("--text", world.path / "t.csv", "--out", world.images, code=2)
    assert "no-such" in world.call("--text", world.path / "no-such", "--out", world.images, code=2)
    said = world.call("--text", world.path / "texts.parquet", "--out", world.images, "--style", "hakubooru", code=2)
    assert "hakubooru has no place for texts" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--relocate --out I --stats --rare 3", "--stats and --rare do nothing with --relocate"),
        ("S --relocate --out I", "SEL.parquet does nothing with --relocate"),
        ("--image I/a.png --format txt --style kohaku", "--format and --style do nothing with --image FILE"),
        ("--stats --out I --db D --jobs 2", "--db and --jobs do nothing with --stats without SEL.parquet"),
        ("S --db D --stats --format txt --out I", "--out and --format do nothing with --stats of SEL.parquet"),
        ("--post 3 --db D --stats --rare 1", "--stats and --rare do nothing with --post ID"),
        ("S --db D --out I --rare 7", "--rare does nothing without --stats"),
        (
            "S --db D --out I --text-column t --tokenizer K",
            "--text-column and --tokenizer do nothing without --text FILE",
        ),
        ("S --db D --stats --text-column t", "--text-column does nothing without --text FILE"),
        ("--post 3 --db D --text-column t", "--text-column does nothing without --text FILE"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words: str, said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(program, ["caption", *words.split()], standalone_mode=False)
    assert isinstance(done.exception, UsageError), done.output
    assert done.exception.message.startswith(said), done.exception.message
    assert "kwrap caption --help" in done.exception.next_step


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ({"shuffled": ["general", "text"]}, "place it in prefix or suffix"),
        ({"text": {"tags": 0.5, "both": 0.6}}, "make 1 together"),
        ({"text": {"tags": True, "both": 0}}, "make 1 together"),
        ({"text": {"tag": 1}}, "did you mean tags"),
        ({"prefix": ["text"], "suffix": ["text"]}, "stands twice"),
    ],
)
def test_faults_of_placing_and_mixing_are_named(caption: Any, said: str) -> None:
    with pytest.raises(ProblemsFound, match=said):
        read_dataset({"caption": caption}, "mine")


def test_a_changed_text_is_damage(world: World) -> None:
    world.write_texts({world.ids[0]: "Unmistakable"})
    world.caption()
    path = world.images / "captions.arrow"
    path.write_bytes(path.read_bytes().replace(b"Unmistakable", b"Unmistakably"))
    with pytest.raises(DamagedCaptions):
        check_columns(path)


WORDS = st.lists(st.sampled_from(["a", "b c", "ü", "|_|"]), max_size=3).map(", ".join)


@given(
    st.tuples(WORDS, WORDS, WORDS),
    WORDS,
    st.sampled_from(["", "Text, 1,0.", "猫"]),
    st.sampled_from([TAGS, TEXT, BOTH]),
)
def test_many_texts_are_placed_as_one_is(parts: tuple[str, str, str], after: str, text: str, form: int) -> None:
    head, middle, tail = parts
    captions = [f"{head} ||| {middle} ||| {tail}", f"{head} ||| {middle} ||| {tail}", after]
    places = [len(head.encode()), len(f"{head} ||| {middle} ||| ".encode()), 0]
    many = put_texts(
        pa.array(captions), pa.array([text] * 3), np.array(places, np.int32), np.full(3, form, np.int8)
    ).to_pylist()
    assert many == [put_text(caption, text, at, form) for caption, at in zip(captions, places, strict=True)]
    if text and form == BOTH:
        pieces = [each.strip() for each in many[0].split("|||")]
        assert pieces == [f"{head}, {text}" if head else text, middle, tail]
        assert many[1].split("|||")[2].strip() == (f"{text}, {tail}" if tail else text)


def test_the_draws_have_their_shares_and_are_those_of_each_id_alone() -> None:
    ids = np.arange(20_000, dtype=np.int64) * 7
    forms = TextMix(0.2, 0.3, 0.5).choose(1, 2, ids)
    assert np.abs(np.bincount(forms) / len(ids) - [0.2, 0.3, 0.5]).max() < 0.02
    assert (TextMix(0.2, 0.3, 0.5).choose(1, 2, ids[5000:5001]) == forms[5000]).all()
    assert (TextMix(0.2, 0.3, 0.5).choose(1, 3, ids) != forms).mean() > 0.4
    assert (TextMix(0.2, 0.3, 0.5).choose(1, 2, ids, repeat=1) != forms).mean() > 0.4
    assert set(TextMix(1, 0, 0).choose(0, 0, ids)) == {TAGS}
    assert set(TextMix(0, 1, 0).choose(0, 0, ids)) == {TEXT}
    assert set(TextMix().choose(0, 0, ids)) == {BOTH}


def test_an_image_is_explained_with_what_may_be_trained_and_counted_with_tags_and_text(world: World) -> None:
    world.caption(toml=MIXED)
    id = next(iter(world.texts))
    row = world.rows[id]
    shown = CliRunner().invoke(program, ["caption", "--image", str(world.images / row["file"]), "--json"])
    found = json.loads(shown.stdout)
    assert (found["raw"], found["text"]) == (row["caption"], row["text"])
    forms = [put_text(row["caption"], row["text"], row["text_at"], form) for form in (TAGS, TEXT, BOTH)]
    assert found["trained"] == forms
    stats = json.loads(CliRunner().invoke(program, ["caption", "--stats", "--out", str(world.images), "--json"]).stdout)
    others = world.call("--text", world.path / "texts.parquet", "--stats", toml=MIXED)
    assert stats["token_quantiles"] == others["token_quantiles"]
    assert stats["cut"] == others["cut"]
