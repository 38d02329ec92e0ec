"""`kwrap prompt` on the embedded world and on databases of a few tags."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kohaku_wrap.cli import program
from kohaku_wrap.dataset.recipe import load_dataset
from kohaku_wrap.demo.world import make_world
from kohaku_wrap.metadata.database import open_database
from kohaku_wrap.metadata.tags import read_tags
from kohaku_wrap.sampling.chunks import ESTIMATE, cut_chunks
from kohaku_wrap.sampling.compose import compose_tags, place_style
from kohaku_wrap.sampling.grammar import parse_prompt
from kohaku_wrap.sampling.lint import find_oddities, vocabulary_of_tags
from kohaku_wrap.sampling.styles import list_styles

RECIPE = load_dataset("epsilon").caption


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts") / "world"
    make_world(folder)
    return folder


def run(*words: object) -> Result:
    return CliRunner().invoke(program, ["prompt", *map(str, words)])


def ask(*words: object) -> dict[str, Any]:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.output)
    return document


def test_pieces_and_chunks_are_shown_with_both_tokenizers(world: Path) -> None:
    text = "1girl, (smile:1.2)\nBREAK " + "solo, " * 50
    found = ask(text, "--tokenizer", world / "base" / "tokenizers")
    assert [len(part) for part in found["pieces"]] == [2, 1]
    first, second = found["tokenizers"]
    assert first["chunks"] == second["chunks"] and first["tokenizer"] != second["tokenizer"]
    assert [chunk["tokens"] for chunk in first["chunks"]] == [4, 75, 25]
    assert first["chunks"][0]["pieces"] == [["1girl,", 1.0], ["smile", 1.2]]
    assert ask(found["written"])["pieces"] == found["pieces"]


def test_a_full_chunk_ends_behind_a_comma_that_is_near() -> None:
    def sizes(text: str) -> list[int]:
        return [len(chunk.tokens) for chunk in cut_chunks(parse_prompt(text), ESTIMATE)]

    assert sizes("a b c d e f, " * 11) == [70, 7]
    assert sizes("a b, " + "c " * 80) == [75, 8]
    assert sizes("a " * 75) == [75] and sizes("") == [0] and sizes("a BREAK") == [1] and sizes("BREAK a") == [0, 1]


def test_without_a_tokenizer_the_tokens_are_an_estimate() -> None:
    (entry,) = ask("1girl, smile")["tokenizers"]
    assert entry["tokenizer"] == "estimate" and entry["tokens"] == 4
    assert "estimate" in run("1girl").output


def test_a_post_gives_its_caption_as_a_prompt(world: Path) -> None:
    described = CliRunner().invoke(program, ["inspect", str(world / "danbooru.db"), "--json"])
    number = json.loads(described.output)["last_id"]
    caption = CliRunner().invoke(
        program, ["caption", "--db", str(world / "danbooru.db"), "--post", str(number), "--json"]
    )
    post = json.loads(caption.output)
    wanted = [word for entry in post["groups"] if entry["group"] != "|||" for word in entry["words"]]
    found = ask("--post", number, "--db", world / "danbooru.db")
    assert [word for words in found["groups"].values() for word in words] == [
        word.replace("(", "\\(").replace(")", "\\)") for word in wanted
    ]
    assert found["prompt"] == ", ".join(word for words in found["groups"].values() for word in words)
    styled = ask("--post", number, "--db", world / "danbooru.db", "--style", "kohaku-7")
    assert styled["groups"]["artist"] == ["ask \\(askzy\\), torino aqua, migolu"]


def test_tags_come_in_the_models_order_by_the_databases_types(tmp_path: Path, writer: ModuleType) -> None:
    tags = small_tags(tmp_path, writer)
    made = compose_tags(
        "safe, newest, masterpiece, ^_^, long_hair, ask_(askzy), Vocaloid, (hatsune miku (cosplay):1.2), 1girl, "
        "commentary, hatsune_miku",
        RECIPE,
        tags,
        "",
    )
    assert made.text == (
        r"1girl, hatsune miku, vocaloid, ask \(askzy\), ^_^, long hair, (hatsune miku \(cosplay\):1.2), masterpiece, "
        "newest, safe"
    )
    assert made.left_out == (("commentary", "meta black list"),)
    assert compose_tags("smile, safe, 1girl", RECIPE, None, "(x:1.1)").text == "1girl, (x:1.1), smile, safe"


def small_tags(folder: Path, writer: ModuleType) -> Any:
    """A few tags of all kinds with their counts."""
    import sqlite3

    path = folder / "tags.db"
    world = writer.make_world(5, seed=1)
    writer.write_layout(path, world, "v3")
    names = [
        ("hatsune_miku", 2, 50_000), ("vocaloid", 3, 60_000), ("ask_(askzy)", 1, 900), ("long_hair", 0, 4_000_000),
        ("^_^", 0, 20_000), ("commentary", 4, 9_000), ("rare_thing", 0, 7), ("1girl", 0, 5_000_000),
    ]  # fmt: skip
    with sqlite3.connect(path) as connection:
        connection.executemany("DELETE FROM tag WHERE name = ?", [(name,) for name, _, _ in names])
        first = connection.execute("SELECT max(id) FROM tag").fetchone()[0] + 1
        connection.executemany(
            "INSERT INTO tag (id, name, type, popularity) VALUES (?, ?, ?, ?)",
            [(first + at, *entry) for at, entry in enumerate(names)],
        )
    connection.close()
    return read_tags(open_database(path))


def test_what_the_model_cannot_know_is_listed(tmp_path: Path, writer: ModuleType) -> None:
    tags = small_tags(tmp_path, writer)
    vocabulary = vocabulary_of_tags(tags, RECIPE, Path("tags.db"))

    def kinds(text: str, tokens: int = 10) -> list[tuple[str, str]]:
        found = find_oddities(text, parse_prompt(text), RECIPE, vocabulary, tokens, 225)
        return [(each.kind, each.word) for each in found]

    assert kinds(r"1girl, (long hair:1.2), hatsune miku, masterpiece, newest, safe, nsfw, ^_^") == []
    assert kinds("ask (askzy)") == [("brackets", "ask (askzy)")]
    assert kinds(r"ask \(askzy\), rare thing") == [("rare", "ask (askzy)"), ("rare", "rare thing")]
    assert kinds("amazing quality, score_9, very aesthetic, rating:safe, year 2023") == [
        ("quality", "amazing quality"),
        ("quality", "score_9"),
        ("quality", "very aesthetic"),
        ("rating", "rating:safe"),
        ("year", "year 2023"),
    ]
    assert kinds("1girl", tokens=226) == [("length", "")]
    (finding,) = find_oddities("long hiar", parse_prompt("long hiar"), RECIPE, vocabulary, 2, 225)
    assert finding.what == "unknown; did you mean long hair?"
    (finding,) = find_oddities("rare_thing", parse_prompt("rare_thing"), RECIPE, vocabulary, 2, 225)
    assert "7 posts, fewer than 100" in finding.what


def test_captions_are_a_vocabulary_too(world: Path) -> None:
    runner, selection, images = CliRunner(), world / "demo.parquet", world / "images"
    for words in (
        ["select", "demo", "--db", world / "danbooru.db", "--out", selection],
        ["extract", selection, "--tars", world / "tars", "--out", images],
        ["caption", selection, "--db", world / "danbooru.db", "--out", images, "--dataset", "demo"],
    ):
        result = runner.invoke(program, [str(word) for word in words])
        assert result.exit_code == 0, result.output
    found = ask("1girl, solo, not a tag at all", "--captions", images)["findings"]
    assert [each["kind"] for each in found if each["word"] == "not a tag at all"] == ["unknown"]
    (solo,) = [each for each in found if each["word"] == "solo"]
    captions = (images / "captions.jsonl").read_text()
    rows = [json.loads(line)["caption"] for line in captions.splitlines()]
    extracted = sum("solo" in re.split(r", | \|\|\| ", caption) for caption in rows)
    assert f"{extracted} captions" in solo["what"] or int(solo["what"].split()[0]) <= extracted


def test_the_seven_published_styles_are_shipped_and_read() -> None:
    styles = list_styles()
    published = [styles[f"kohaku-{number}"].prompt for number in range(1, 8)]
    assert published[4] == "(azuuru:1.1), (torino aqua:1.2), (azuuru:1.1), kedama milk"
    assert len(set(published)) == 7 and published[6] == r"ask \(askzy\), torino aqua, migolu"
    assert "kohaku-3" in run("--style").output


def test_a_prompt_that_was_read_leniently_is_written_closed() -> None:
    line = run("a (b, [c", "--lenient").output.splitlines()[-1]
    assert ask(line)["pieces"] == ask("a (b, [c", "--lenient")["pieces"]


def test_own_styles_come_first_and_faults_are_named(tmp_path: Path, home: Path) -> None:
    own = home / "templates" / "styles"
    own.mkdir(parents=True)
    (own / "mine.toml").write_text("[styles.kohaku-1]\nprompt = 'own one'\n[styles.two]\nprompt = '(other:1.2)'\n")
    assert ask("1girl, smile", "--style", "two")["prompt"] == "1girl, (other:1.2), smile"
    assert ask("--style", "kohaku-1")["prompt"] == "own one"
    (tmp_path / "bad.toml").write_text("[styles.x]\nprompt = '(open'\nnegativ = ''\n")
    result = run("a", "--style", f"{tmp_path / 'bad.toml'}:x")
    assert result.exit_code == 1 and "2 problems" in str(result.exception) and "never closed" in str(result.exception)
    result = run("a", "--style", "kohaku-8")
    assert "did you mean kohaku-" in str(result.exception)


def test_a_style_goes_to_its_place() -> None:
    assert place_style("1girl, solo, {style}, smile", "x", RECIPE) == "1girl, solo, x, smile"
    assert place_style("2girls, 1boy, smile", "x", RECIPE) == "2girls, 1boy, x, smile"
    assert place_style("{style}", "", RECIPE) == ""
    assert place_style("smile", "", RECIPE) == "smile"


@pytest.mark.parametrize(
    "words,said",
    [
        (["a", "--tags", "b"], "TEXT and --tags"),
        ([], "no prompt is given"),
        (["--post", "3"], "--db DB is missing"),
        (["--tags", " , "], "names no tag"),
        (["a", "--tokenizer", "."], "no tokenizer.json"),
        (["[a:b:0.5]"], "schedules"),
    ],
)
def test_bad_input_is_one_message(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code in (1, 2) and said in str(result.exception)
