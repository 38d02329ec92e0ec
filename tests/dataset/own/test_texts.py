"""Captions of images of one's own: files beside them and tables of every kind, as sd-scripts reads them."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from own_images import captions_of, lines, paint, run


def test_endings_of_captions_in_capitals_are_read(tmp_path: Path, out: Path) -> None:
    for place, name in enumerate(("A.TXT", "B.Txt", "C.txt")):
        paint((tmp_path / "mine" / name).with_suffix(".PNG"), seed=place)
        (tmp_path / "mine" / name).write_text(name)
    (tmp_path / "mine" / "C.TXT").write_text("not this one")
    report = run(tmp_path / "mine", "--out", out)
    assert captions_of(out) == {"A.PNG": "A.TXT", "B.PNG": "B.Txt", "C.PNG": "C.txt"}
    [note] = [note for note in report["notes"] if "in capitals" in note]
    assert note == (
        f"{tmp_path}/mine: 2 caption files with an ending in capitals (A.TXT, B.Txt), which kwrap reads; sd-scripts "
        "reads .txt alone where names differ by case"
    )
    assert report["without_caption"] == 0


Table = Callable[[Path, dict[str, str]], list[object]]


def table_csv(path: Path, texts: dict[str, str]) -> list[object]:
    with (path / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows([("file_name", "text"), *texts.items()])
    return []


def parquet(path: Path, texts: dict[str, str]) -> list[object]:
    pq.write_table(pa.table({"file_name": list(texts), "caption": list(texts.values())}), path / "metadata.parquet")
    return []


def fine_tuning(path: Path, texts: dict[str, str]) -> list[object]:
    halves = {name: text.split(",", 1) for name, text in texts.items()}
    keys = {str((path / name).with_suffix("")): {"caption": a, "tags": b} for name, (a, b) in halves.items()}
    file = path.parent / "meta_cap.json"
    file.write_text(json.dumps(keys))
    return ["--captions", file]


def cache(path: Path, texts: dict[str, str]) -> list[object]:
    entries = {str(path / name): {"caption": text, "resolution": [64, 48]} for name, text in texts.items()}
    (path / "metadata_cache.json").write_text(json.dumps(entries))
    return []


@pytest.mark.parametrize("write", [lines, table_csv, parquet, fine_tuning, cache])
def test_captions_come_from_tables(tmp_path: Path, out: Path, write: Table) -> None:
    folder = tmp_path / "mine"
    texts = {"a.png": "one, two", "sub/ü b.png": 'three, "four" ☂'}
    for seed, name in enumerate(texts):
        paint(folder / name, seed=seed)
    run(folder, "--out", out, *write(folder, texts))
    assert captions_of(out) == {"a.png": "one, two", "ü b.png": 'three, "four" ☂'}


def dictionaries(path: Path) -> None:
    columns = {"file_name": ["a.png", "b.png"], "text": ["one", "two"]}
    table = pa.table({name: pa.array(some).dictionary_encode() for name, some in columns.items()})
    pq.write_table(table, path / "metadata.parquet")


def lists(path: Path) -> None:
    table = pa.table({"file_name": ["a.png", "b.png"], "text": [["one", "another"], ["two"]]})
    pq.write_table(table, path / "metadata.parquet")


def lists_in_lines(path: Path) -> None:
    rows = ({"file_name": "a.png", "text": ["one", "another"]}, {"file_name": "b.png", "text": "two"})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("write", [dictionaries, lists, lists_in_lines])
def test_captions_of_any_type_of_text_are_read(tmp_path: Path, out: Path, write: Callable[[Path], None]) -> None:
    folder = tmp_path / "mine"
    for seed, name in enumerate(("a.png", "b.png")):
        paint(folder / name, seed=seed)
    write(folder)
    report = run(folder, "--out", out)
    several = write is not dictionaries
    assert captions_of(out) == {"a.png": "one\nanother" if several else "one", "b.png": "two"}
    assert report["several_lines"] == several


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metadata.csv", "file_name,Caption\na.png,one\n", "no captions: none of text, caption"),
        ("metadata.csv", "file_name,Caption\na.png,one\n", "its columns: file_name, Caption"),
        ("metadata.csv", "", "it holds no row"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": {"en": "one"}}', 'row 1: {"en": "one"} is no caption'),
        ("metadata.jsonl", '{"file_name": "a.png", "text": true}', "row 1: true is no caption"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "one"}\n\n{"file_name": ', "line 3 is no JSON"),
        ("metadata_cache.json", '{"a.png": {"caption": [["one"]]}}', 'a.png: [["one"]] is no caption'),
    ],
)
def test_a_table_that_says_no_captions_is_refused(tmp_path: Path, out: Path, name: str, text: str, said: str) -> None:
    folder = tmp_path / "mine"
    paint(folder / "a.png")
    (folder / name).write_text(text)
    assert said in run(folder, "--out", out, code=2)
    assert not out.exists()


def test_tags_of_a_table_follow_the_separator_of_their_subset(tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "mine" / "a.png")
    (tmp_path / "meta.json").write_text('{"a": {"caption": "one", "tags": "two; three"}}')
    (tmp_path / "set.toml").write_text(
        f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{tmp_path}/mine"\n'
        f'metadata_file = "{tmp_path}/meta.json"\ncaption_separator = ";"\n'
    )
    run(tmp_path / "set.toml", "--out", out)
    assert captions_of(out) == {"a.png": "one;two; three"}


def test_a_face_without_a_caption_has_that_of_its_picture_as_in_sd_scripts(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "4_me"
    for seed, name in enumerate(("x_y_10_20_30_40.png", "x_y_1_2_3_4.png", "own_1_2_3_4.png", "none_1_2_3_4.png")):
        paint(folder / name, seed=seed)
    (folder / "x_y.txt").write_text("of both")
    (folder / "own.txt").write_text("of the picture")
    (folder / "own_1_2_3_4.txt").write_text("of the face")
    report = run(folder, "--out", out)
    assert captions_of(out) == {
        "x_y_10_20_30_40.png": "of both",
        "x_y_1_2_3_4.png": "of both",
        "own_1_2_3_4.png": "of the face",
        "none_1_2_3_4.png": "me",
    }
    assert (report["without_caption"], report["shared_text"]) == (1, 2)


def test_any_line_of_a_caption_with_wildcards_is_trained_as_in_sd_scripts(tmp_path: Path, out: Path) -> None:
    for seed, (name, text) in enumerate({"a.png": "\n\none\n \ntwo", "b.png": "{x|y}", "c.png": " \n\t\n"}.items()):
        paint(tmp_path / "mine" / name, seed=seed, text=text)
    (tmp_path / "set.toml").write_text(
        f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{tmp_path}/mine"\ncaption_extension = ".txt"\n'
        "enable_wildcard = true\n"
    )
    report = run(tmp_path / "set.toml", "--out", out)
    assert captions_of(out) == {"a.png": "one\ntwo", "b.png": "{x|y}", "c.png": ""}
    assert (report["several_lines"], report["empty_caption"]) == (0, 1)


def test_a_table_that_names_what_is_not_there_is_counted(tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "mine" / "a.png")
    lines(tmp_path / "mine", {"a.png": "a", "gone.png": "b"})
    said = run(tmp_path / "mine", "--out", out, code=1)
    assert "1 of 2 images cannot be used" in said and "gone.png" in said
    report = run(tmp_path / "mine", "--out", out, "--max-missing", 1)
    assert (report["missing"], report["total"]) == (1, 1)


def test_what_a_table_says_twice_and_what_is_linked_is_told(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "mine"
    paint(folder / "a.png")
    paint(tmp_path / "elsewhere" / "b.png", seed=1)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "metadata.csv").write_text("file_name,text\na.png,first\na.png,second\n")
    notes = run(folder, "--out", out)["notes"]
    assert captions_of(out) == {"a.png": "second"}
    assert any("1 row of images that have a later row" in note for note in notes)
    assert any(note.startswith(f"{folder}/link: a link to a folder") for note in notes)


def test_odd_captions_are_counted_and_listed(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "mine"
    paint(folder / "good.png", text="good")
    paint(folder / "lines.png", seed=1, text="first\r\n\r\nsecond\n")
    paint(folder / "empty.png", seed=2, text="")
    paint(folder / "none.png", seed=3)
    paint(folder / "marked.png", seed=4, text="\ufeffmarked")
    paint(folder / "same.png", seed=5, text="shared")
    paint(folder / "same.jpg", seed=6)
    paint(folder / "bad.png", seed=7)
    (folder / "bad.txt").write_bytes("猫".encode("cp932"))
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "clip.mp4").write_bytes(b"x")
    assert "not UTF-8" in run(folder, "--out", out, code=1)
    report = run(folder, "--out", out, "--max-missing", 2)
    names = ("several_lines", "empty_caption", "without_caption", "shared_text", "not_utf8", "corrupt", "total")
    assert [report[name] for name in names] == [1, 1, 1, 2, 1, 1, 7]
    assert report["other_files"] == {".mp4": 1}
    captions = captions_of(out)
    assert captions["lines.png"] == "first\nsecond"
    assert (captions["marked.png"], captions["none.png"], captions["empty.png"]) == ("marked", "", "")
    lists = json.loads((out / "import-report.json").read_text())["lists"]
    assert lists["corrupt"][0]["image"].endswith("broken.png")
    assert lists["shared_text"] == [str(folder / "same.jpg"), str(folder / "same.png")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda at: (at / "a.caption").write_text("x"), [".txt and in .caption", "--captions .txt"]),
        (lambda at: paint(at / "reg" / "1_girl" / "a.png"), ["regularisation"]),
        (lambda at: paint(at / "all" / "girl" / "Reg_Images" / "a.png"), ["girl/Reg_Images: ", "regularisation"]),
        (lambda at: lines(at, {"a.png": "x"}), [".txt and in metadata.jsonl"]),
    ],
)
def test_what_is_not_clear_is_asked(mine: Path, out: Path, change: Callable[[Path], object], words: list[str]) -> None:
    change(mine)
    said = run(mine, "--out", out, code=2)
    assert all(word in said for word in words)
    assert not out.exists()


def test_a_file_that_may_hold_the_captions_is_named(tmp_path: Path, out: Path) -> None:
    place = paint(tmp_path / "mine" / "a b.png")
    table = tmp_path / "mine" / "my list.json"
    table.write_text(json.dumps({str(place): {"caption": "1girl, hat"}}))
    report = run(tmp_path / "mine", "--out", out)
    assert report["without_caption"] == 1
    typed = report["notes"][0].partition("run this again with ")[2]
    assert run(tmp_path / "mine", "--out", out, *shlex.split(typed))["without_caption"] == 0
    assert captions_of(out) == {"a b.png": "1girl, hat"}
