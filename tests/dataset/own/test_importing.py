"""Folders of one's own become a dataset: every image is checked, every caption is the trainer's, ids stay."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from kohaku_wrap.cli import program
from kohaku_wrap.dataset.own.images import ImageTask, check_images, read_imported
from kohaku_wrap.files import unheard
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.caption_rows import find_captions, open_captions, read_subsets
from kohaku_wrap.formats.caption_writer import check_columns


def paint(path: Path, size: tuple[int, int] = (64, 48), seed: int = 0, text: str | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


def run(*words: object, code: int = 0) -> Any:
    """The document of `kwrap import … --json`, or what is said on stderr of one that ends otherwise."""
    result = CliRunner().invoke(program, ["import", *map(str, words), "--json"])
    failure = result.exception
    if failure is not None and not isinstance(failure, SystemExit):
        assert getattr(failure, "exit_code", None) == code, failure
        return str(failure)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def rows_of(images: Path) -> dict[str, dict[str, Any]]:
    """Each row of captions.arrow by its file."""
    check_columns(images / "captions.arrow")
    return {row["file"]: row for row in open_captions(images).read_all().to_pylist()}


def captions_of(images: Path) -> dict[str, str]:
    return {Path(file).name: row["caption"] for file, row in rows_of(images).items()}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    for seed, name in enumerate(("a.png", "sub dir/b.jpg", "sub dir/ünter/c.webp", "猫/d.bmp", "E.PNG")):
        paint(folder / name, seed=seed, text=f"{name}, ☂ smile")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "images"


def test_a_folder_with_text_files_becomes_rows_links_and_a_cache(mine: Path, out: Path) -> None:
    report = run(mine, "--out", out)
    assert (report["found"], report["written"], report["linked"], report["dataset"]) == (5, 5, 5, "mine")
    rows = rows_of(out)
    assert list(rows) == [row["file"] for row in sorted(rows.values(), key=lambda row: row["id"])]
    for file, row in rows.items():
        assert (out / file).is_symlink()
        assert (out / file).samefile(mine / Path(file).relative_to("mine"))
        assert (row["width"], row["height"], row["repeats"], row["subset"]) == (64, 48, 1, 0)
        digest = hashlib.sha256(file.encode()).digest()
        assert row["id"] == int.from_bytes(digest[:8], "big") >> 1
    cache = json.loads((out / "metadata_cache.json").read_text())
    assert {key: (entry["caption"], entry["resolution"]) for key, entry in cache.items()} == {
        str(out / file): (row["caption"], [64, 48]) for file, row in rows.items()
    }


def test_a_second_call_keeps_all_and_added_images_keep_ids(mine: Path, out: Path) -> None:
    run(mine, "--out", out)
    before, digest = rows_of(out), (out / "captions.arrow").read_bytes()
    again = run(mine, "--out", out)
    assert (again["written"], again["kept"]) == (0, 5)
    assert (out / "captions.arrow").read_bytes() == digest
    paint(mine / "f.png", seed=9, text="new")
    (mine / "a.txt").write_text("changed")
    grown = run(mine, "--out", out)
    now = rows_of(out)
    assert (grown["written"], grown["kept"], len(now)) == (1, 5, 6)
    assert {file: row["id"] for file, row in now.items() if file in before} == {
        file: row["id"] for file, row in before.items()
    }
    assert now["mine/a.png"]["caption"] == "changed"
    old = Columns.open(out, again["digest"])
    assert len(old) == 5
    assert find_captions(out, again["digest"]).name != "captions.arrow"
    check_columns(find_captions(out, again["digest"]))


def test_a_changed_image_is_checked_again_and_a_removed_one_is_gone(mine: Path, out: Path) -> None:
    run(mine, "--out", out)
    paint(mine / "a.png", (32, 32), seed=99)
    (mine / "猫" / "d.bmp").unlink()
    report = run(mine, "--out", out)
    assert (report["written"], report["removed"], report["kept"]) == (1, 1, 3)
    assert rows_of(out)["mine/a.png"]["width"] == 32
    assert not os.path.lexists(out / "mine" / "猫" / "d.bmp")


def test_what_must_be_shown_otherwise_is_written_anew(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "odd"
    turned = Image.Exif()
    turned[0x112] = 6
    paint(folder / "turned.jpg", (40, 30), text="t", exif=turned)
    Image.new("RGBA", (30, 30), (255, 0, 0, 128)).save(folder / "clear.png")
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (30, 30), "blue").save(folder / "named.png", "JPEG")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = run(folder, "--out", out)
    assert (report["rewritten"], report["linked"]) == (3, 1)
    rows = rows_of(out)
    assert (rows["odd/turned.jpg"]["width"], rows["odd/turned.jpg"]["height"]) == (30, 40)
    for file, row in rows.items():
        with Image.open(out / file) as image:
            assert image.size == (row["width"], row["height"])
            assert image.mode in ("RGB", "L")
    with Image.open(out / "odd" / "clear.png") as image:
        assert image.getpixel((0, 0)) == (255, 127, 127)
    assert (out / "odd" / "named.png.jpg").is_symlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_disk_without_links_is_named(mine: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)  # No such disk is at hand.
    assert "this disk takes no links" in (said := run(mine, "--out", out, code=1)) and "add --copy" in said
    assert run(mine, "--out", out, "--copy")["copied"] == 5


def test_a_copy_is_no_link(mine: Path, out: Path) -> None:
    run(mine, "--out", out)
    report = run(mine, "--out", out, "--copy")
    assert (report["copied"], report["linked"]) == (5, 0)
    assert not any((out / file).is_symlink() for file in rows_of(out))


def test_a_dry_run_writes_nothing(mine: Path, out: Path) -> None:
    report = run(mine, "--out", out, "--dry-run")
    assert report["total"] == 5
    assert not out.exists()


def test_n_name_folders_repeat_as_the_trainer_does(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "img"
    paint(folder / "3_alice" / "a.png", text="alice, smile")
    paint(folder / "3_alice" / "b.png", seed=1)
    paint(folder / "2_bob of b" / "a.png", seed=2, text="\n")
    paint(folder / "0_none" / "a.png", seed=3)
    paint(folder / "loose.png", seed=4, text="loose")
    report = run(folder, "--out", out)
    rows = rows_of(out)
    assert {file: (row["repeats"], row["caption"]) for file, row in rows.items()} == {
        "img-3_alice/a.png": (3, "alice, smile"),
        "img-3_alice/b.png": (3, "alice"),
        "img-2_bob of b/a.png": (2, "bob of b"),
        "img/loose.png": (1, "loose"),
    }
    subsets = read_subsets(out)
    assert {each.name: each.repeats for each in subsets} == {"img": 1, "img-2_bob of b": 2, "img-3_alice": 3}
    assert all(subsets[row["subset"]].name == file.split("/")[0] for file, row in rows.items())
    for each in subsets:
        cache = json.loads((out / each.name / "metadata_cache.json").read_text())
        assert set(cache) == {str(out / file) for file in rows if file.startswith(f"{each.name}/")}
    assert any("1 image without a caption: trained with 'alice'" in note for note in report["notes"])
    empty = next(note for note in report["notes"] if "1 image with an empty caption" in note)
    assert "trained with 'bob of b', the folder's name; sd-scripts' own dataset ends at an empty file" in empty
    assert any("0_none" in note for note in report["notes"])
    plain = run(folder, "--out", tmp_path / "plain", "--plain")
    assert {row["repeats"] for row in rows_of(tmp_path / "plain").values()} == {1}
    assert any(note.endswith("2 images without a caption: trained with an empty one") for note in plain["notes"])
    assert any("1 image with an empty caption: trained with an empty one; sd-sc" in note for note in plain["notes"])
    assert plain["found"] == 5


def test_names_as_long_as_the_disk_takes(tmp_path: Path, out: Path) -> None:
    name = "x" * 251 + ".png"
    paint(tmp_path / "mine" / name, text="long")
    assert run(tmp_path / "mine", "--out", out)["written"] == 1
    assert run(tmp_path / "mine", "--out", out, "--copy")["copied"] == 1
    assert captions_of(out) == {name: "long"}


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


def test_options_of_a_dataset_file_that_are_not_taken_are_named(tmp_path: Path, out: Path) -> None:
    for place, name in enumerate(("a", "b")):
        paint(tmp_path / name / "1.png", seed=place, text="a ||| b ||| c")
    config = tmp_path / "set.toml"
    config.write_text(
        '[general]\ncaption_extension = ".txt"\nenable_bucket = true\nshuffle_caption = true\n'
        '[[datasets]]\nresolution = 512\nbatch_size = 8\n[[datasets.subsets]]\nimage_dir = "a"\n'
        '[[datasets]]\nresolution = 1024\nbatch_size = 8\n[[datasets.subsets]]\nimage_dir = "b"\n'
    )
    [note] = [note for note in run(config, "--out", out)["notes"] if "not taken" in note]
    assert note == (
        f"{config}: not taken: batch_size = 8, enable_bucket = true, resolution = 512 or 1024; one template trains all"
        " of its images alike: set them there, batch_size by the site"
    )


def test_many_folders_are_told_of_once_each_kind(tmp_path: Path, out: Path) -> None:
    for number in range(12):
        folder = tmp_path / "img" / f"{number + 1}_name{number:02}"
        for name in ("a", "b"):
            paint(folder / f"{name}.png", seed=number, text=f"name{number:02}, {name}")
        paint(folder / "c.png", seed=number)
        (folder / "d.txt").write_text("")
        paint(folder / "d.png", seed=number)
    for number in range(2):
        paint(tmp_path / "img" / f"0_none{number}" / "a.png")
    notes = run(tmp_path / "img", "--out", out)["notes"]
    shown = CliRunner().invoke(program, ["import", str(tmp_path / "img"), "--out", str(out)]).output
    assert "0 images" not in shown and "img-10_name09" in shown
    places = f"12 folders ({tmp_path}/img/10_name09, {tmp_path}/img/11_name10, {tmp_path}/img/12_name11, …)"
    assert notes == [
        f"{places}: 48 captions without |||: a template that shuffles or drops tags does so with all of theirs, and the"
        " tag with which those of a folder begin ('name09', 'name10', 'name11', …) moves and drops out too."
        " dataset_options.keep_tokens = 1 keeps the first tag in its place",
        f"{places}: 12 images without a caption: trained with the folder's name, as sd-scripts does it",
        f"{places}: 12 images with an empty caption: trained with the folder's name; sd-scripts' own dataset ends at"
        " an empty file, and trains a blank first line as an empty caption",
        f"2 folders ({tmp_path}/img/0_none0, {tmp_path}/img/0_none1): a number below 1 in front; sd-scripts leaves such"
        " a folder out, and so does this",
    ]


BEYOND = "of which plain sd-scripts would train none"


def test_what_plain_sd_scripts_would_not_train_is_said_once_and_listed(tmp_path: Path, out: Path) -> None:
    names = ("3_a/1.png", "3_a/in/2.png", "3_a/in/3.png", "5_b/4.png", "some/5.png", "some/7_c/6.png", "7.png")
    for seed, name in enumerate(names):
        paint(tmp_path / "img" / name, seed=seed, text="a ||| b ||| c")
    report = run(tmp_path / "img", "--out", out)
    beyond = [str(tmp_path / "img" / names[place]) for place in (1, 2, 4, 5, 6)]
    assert report["total"] == 7 and report["beyond_sd_scripts"] == 5
    assert json.loads((out / "import-report.json").read_text())["lists"]["beyond_sd_scripts"] == sorted(beyond)
    [note] = [note for note in report["notes"] if BEYOND in note]
    assert note == (
        f"4 folders ({tmp_path}/img, {tmp_path}/img/3_a/in, {tmp_path}/img/some, …): 5 images, {BEYOND}: it takes what"
        " lies directly in an N_name folder. kwrap trains them all; move away what is not meant"
    )
    assert "which plain sd-scripts would not train  5" in " ".join(
        CliRunner().invoke(program, ["import", str(tmp_path / "img"), "--out", str(out)]).output.split(" " * 3)
    )


def test_nothing_is_said_of_plain_sd_scripts_where_it_would_train_all_or_is_not_meant(tmp_path: Path) -> None:
    for name in ("kohya/3_a/1.png", "plain/2.png", "plain/sub/3.png", "8_own/4.png"):
        paint(tmp_path / name, text="a ||| b ||| c")
    for words in (["kohya"], ["plain"], ["8_own"], ["kohya", "--plain"]):
        report = run(tmp_path / words[0], *words[1:], "--out", tmp_path / "out" / "".join(words))
        assert report["beyond_sd_scripts"] == 0 and BEYOND not in str(report["notes"])


def test_sub_folders_of_a_dataset_file_and_of_one_n_name_folder_are_beyond_sd_scripts(tmp_path: Path) -> None:
    for name in ("8_own/1.png", "8_own/in/2.png"):
        paint(tmp_path / name, text="a ||| b ||| c")
    (tmp_path / "set.toml").write_text(
        f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{tmp_path}/8_own"\ncaption_extension = ".txt"\n'
    )
    for given, place in (("8_own", "an N_name folder"), ("set.toml", "an image_dir")):
        report = run(tmp_path / given, "--out", tmp_path / f"of {given}")
        [note] = [note for note in report["notes"] if BEYOND in note]
        assert note.startswith(f"{tmp_path}/8_own/in: 1 image, {BEYOND}: it takes what lies directly in {place}.")


Table = Callable[[Path, dict[str, str]], list[object]]


def lines(path: Path, texts: dict[str, str]) -> list[object]:
    entries = [json.dumps({"file_name": name, "text": text, "extra": 1}) for name, text in texts.items()]
    (path / "metadata.jsonl").write_text("\n".join(entries) + "\n\n")
    return []


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


def test_paths_of_a_dataset_file_may_begin_at_it(tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "deep" / "mine" / "a.png")
    (tmp_path / "deep" / "meta.json").write_text('{"a": {"caption": "one"}}')
    subset = '[[datasets]]\n[[datasets.subsets]]\nmetadata_file = "meta.json"\n'
    (tmp_path / "deep" / "set.toml").write_text(f'{subset}image_dir = "mine"\n')
    run(tmp_path / "deep" / "set.toml", "--out", out)
    assert captions_of(out) == {"a.png": "one"}
    (tmp_path / "deep" / "set.toml").write_text(subset)
    assert "names no image_dir" in run(tmp_path / "deep" / "set.toml", "--out", out, code=2)


def test_an_empty_folder_among_others_takes_no_images_away(mine: Path, tmp_path: Path, out: Path) -> None:
    image = paint(tmp_path / "disk" / "z.png", seed=9)
    run(mine, tmp_path / "disk", "--out", out, "--copy")
    image.unlink()
    assert f"{tmp_path}/disk: no image in there" in run(mine, tmp_path / "disk", "--out", out, "--copy", code=2)
    assert (out / "disk" / "z.png").is_file() and len(rows_of(out)) == 6


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


def test_a_folder_that_nobody_may_list_is_named_not_passed_by(mine: Path, out: Path) -> None:
    run(mine, "--out", out)
    (mine / "sub dir").chmod(0o000)
    rights = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    argv = [*rights, sys.executable, "-m", "kohaku_wrap", "import", str(mine), "--out", str(out)]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    (mine / "sub dir").chmod(0o755)
    assert (ended.returncode, len(rows_of(out))) == (1, 5)
    assert f"{mine}/sub dir: Permission denied" in ended.stderr


def test_a_dry_run_does_not_name_a_report_as_if_it_were_there(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "mine"
    paint(folder / "a.png", text="one")
    (folder / "b.png").write_bytes(b"")
    assert "\nWithout --dry-run" in run_plainly(folder, "--out", out, "--dry-run")
    assert "\nWithout --dry-run" not in run_plainly(folder, "--out", out)


def run_plainly(*words: object) -> str:
    """What is shown by an import that ends with 1."""
    argv = [sys.executable, "-m", "kohaku_wrap", "import", *map(str, words)]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    return ended.stderr


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


def test_a_journal_that_a_full_disk_cut_goes_on_with_whole_lines(tmp_path: Path, out: Path) -> None:
    source = paint(tmp_path / "mine" / "a.png")
    out.mkdir()
    (out / ".importing.jsonl").write_text('{"id": 1, "lab')
    task = ImageTask(7, "mine", "a.png", "mine", str(source), "mine/a.png")
    assert len(list(check_images([task], out, copy=False, dry_run=False, jobs=1, on_progress=unheard))) == 1
    assert set(read_imported(out)) == {7}


@pytest.mark.parametrize(("name", "text"), [("imported.parquet", "junk"), (".importing.jsonl", '{"x": 1}\n')])
def test_a_damaged_record_is_named(mine: Path, out: Path, name: str, text: str) -> None:
    run(mine, "--out", out)
    before = rows_of(out)
    (out / name).write_text(text)
    assert f"{out / name}: damaged" in run(mine, "--out", out, code=1)
    image = ["caption", "--image", str(out / "mine" / "a.png")]
    assert f"{name}: damaged" in str(CliRunner().invoke(program, image).exception)
    (out / name).unlink()
    run(mine, "--out", out)
    assert rows_of(out) == before
    (out / "import-report.json").write_text("{}")
    assert "caption from" not in CliRunner().invoke(program, image, catch_exceptions=False).stdout


def test_posts_do_not_take_the_place_of_own_images(mine: Path, out: Path, tmp_path: Path) -> None:
    run(mine, "--out", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    posts, database = tmp_path / "posts.parquet", tmp_path / "posts.csv"
    database.write_text("id,tag_string,file_ext\n1,solo,png\n")
    (tmp_path / "all.toml").touch()
    for words in (
        ("select", tmp_path / "all.toml", "--db", database, "--out", posts),
        ("extract", posts, "--tars", mine, "--out", out),
        ("caption", posts, "--db", database, "--out", out),
    ):
        said = str(CliRunner().invoke(program, list(map(str, words))).exception)
        assert words[0] == "select" or said.startswith(f"{out}: holds images of your own"), said
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_folder_that_the_trainer_leaves_out_is_named(tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "0_cats" / "a.png", text="a")
    assert "0_ in front" in run(tmp_path / "0_cats", "--out", out, code=2)
    assert run(tmp_path / "0_cats", "--out", out, "--plain")["total"] == 1


@pytest.mark.parametrize("resolution", [64, 100, 127, 700])
def test_any_resolution_has_buckets(tmp_path: Path, out: Path, resolution: int) -> None:
    paint(tmp_path / "mine" / "a.png", (64, 48), text="a")
    assert run(tmp_path / "mine", "--out", out, "--resolution", resolution)["too_small"] == 1


def test_a_dataset_file_gives_subsets_with_options(tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "first" / "a.png", text="a, b")
    paint(tmp_path / "second" / "b.png", seed=1)
    (tmp_path / "second" / "b.caption").write_text("c, d")
    (tmp_path / "set.toml").write_text(
        f"""
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 512
[[datasets.subsets]]
image_dir = "{tmp_path}/first"
num_repeats = 4
keep_tokens = 1
[[datasets.subsets]]
image_dir = "{tmp_path}/second"
caption_extension = ".caption"
flip_aug = true
"""
    )
    run(tmp_path / "set.toml", "--out", out)
    assert {each.name: (each.repeats, dict(each.options)) for each in read_subsets(out)} == {
        "first": (4, {"keep_tokens": 1}),
        "second": (1, {"flip_aug": True}),
    }
    assert captions_of(out) == {"a.png": "a, b", "b.png": "c, d"}


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


def test_doubles_are_listed_by_content_and_by_look(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "mine"
    whole = paint(folder / "a.png", (320, 240), text="a")
    (folder / "b.png").write_bytes(whole.read_bytes())
    blocks = np.random.default_rng(3).integers(0, 255, (8, 9, 3), dtype=np.uint8)
    for name, size in (("large.png", (900, 800)), ("small.jpg", (450, 400))):
        Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(folder / name)
    report = run(folder, "--out", out, "--resolution", 512)
    lists = json.loads((out / "import-report.json").read_text())["lists"]
    assert lists["doubles"] == [[str(folder / "a.png"), str(folder / "b.png")]]
    assert lists["similar"] == [[str(folder / "large.png"), str(folder / "small.jpg")]]
    assert report["too_small"] == 3


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


def test_equal_labels_are_refused_by_name(mine: Path, tmp_path: Path, out: Path) -> None:
    other = tmp_path / "other" / "mine"
    paint(other / "a.png", seed=50, text="x")
    assert str(other) in run(mine, other, "--out", out, code=1)
    run(mine, "--out", out)
    assert "--label" in run(other, "--out", out, code=1)
    both = run(other, "--label", "second", "--out", out)
    assert (both["total"], both["others"]) == (6, 5)
    assert captions_of(out)["d.bmp"] == "猫/d.bmp, ☂ smile"


def test_the_same_files_under_another_label_are_told(mine: Path, out: Path) -> None:
    assert "twice" not in str(run(mine, "--out", out)["notes"])
    again = run(mine, "--label", "other", "--out", out)
    assert again["total"] == 10 and "under the label 'mine' too, and are trained twice" in str(again["notes"])


def test_refused_images_are_not_counted_as_trained_without_a_caption(tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "mine" / "good.png")
    for name, text in (("torn.png", None), ("blank.png", ""), ("lines.png", "a\nb")):
        (tmp_path / "mine" / name).write_bytes(b"")
        if text is not None:
            (tmp_path / "mine" / name).with_suffix(".txt").write_text(text)
    report = run(tmp_path / "mine", "--out", out, "--max-missing", 3)
    assert (report["corrupt"], report["total"]) == (3, 1)
    assert (report["without_caption"], report["empty_caption"], report["several_lines"]) == (1, 0, 0)
    assert "mine: 1 image without a caption: trained" in str(report["notes"])
    assert "empty caption" not in str(report["notes"])


def test_images_of_a_renamed_folder_that_lead_nowhere_are_shown(mine: Path, out: Path) -> None:
    run(mine, "--out", out)
    new = mine.rename(mine.with_name("new"))
    again = run(new, "--out", out)
    linked = sum((out / file).is_symlink() for file in rows_of(out) if file.startswith("mine/"))
    assert again["others"] == 5 and linked
    [note] = [note for note in again["notes"] if "no longer there" in note]
    assert f"the files of {linked} image" in note and "--label mine" in note and "a new folder" in note
    assert "no longer there" not in str(run(new, "--label", "mine", "--out", out)["notes"])


def test_a_moved_folder_keeps_its_ids(mine: Path, out: Path) -> None:
    run(mine, "--out", out)
    before = {row["id"] for row in rows_of(out).values()}
    (mine.parent / "new place").mkdir()
    mine.rename(mine.parent / "new place" / "mine")
    run(mine.parent / "new place" / "mine", "--out", out)
    assert {row["id"] for row in rows_of(out).values()} == before
    assert all((out / file).is_file() for file in rows_of(out))


def test_a_file_that_may_hold_the_captions_is_named(tmp_path: Path, out: Path) -> None:
    place = paint(tmp_path / "mine" / "a b.png")
    table = tmp_path / "mine" / "my list.json"
    table.write_text(json.dumps({str(place): {"caption": "1girl, hat"}}))
    report = run(tmp_path / "mine", "--out", out)
    assert report["without_caption"] == 1
    typed = report["notes"][0].partition("run this again with ")[2]
    assert run(tmp_path / "mine", "--out", out, *shlex.split(typed))["without_caption"] == 0
    assert captions_of(out) == {"a b.png": "1girl, hat"}


def test_a_moved_image_folder_gets_its_caches_from_another_import(mine: Path, out: Path) -> None:
    run(mine, "--out", out)
    ids = {row["id"] for row in rows_of(out).values()}
    away = out.rename(out.with_name("away"))
    relocated = CliRunner().invoke(program, ["caption", "--relocate", "--out", str(away)])
    assert "kwrap import FOLDER" in str(relocated.exception)
    assert run(mine, "--out", away)["kept"] == 5
    assert {row["id"] for row in rows_of(away).values()} == ids
    assert all(Path(key).is_file() for key in json.loads((away / "metadata_cache.json").read_text()))


@pytest.mark.parametrize("name", ["pipe.png", "a.txt"])
def test_a_pipe_is_not_waited_for(mine: Path, out: Path, name: str) -> None:
    (mine / name).unlink(missing_ok=True)
    os.mkfifo(mine / name)
    result = CliRunner().invoke(program, ["import", str(mine), "--out", str(out)])
    assert result.exit_code == 1
    assert "regular" in str(result.exception)


def test_one_spelling_of_a_name(tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "mine" / unicodedata.normalize("NFD", "é.png"), text="x")
    run(tmp_path / "mine", "--out", out)
    assert list(rows_of(out)) == [unicodedata.normalize("NFC", "mine/é.png")]
    assert captions_of(out) == {unicodedata.normalize("NFC", "é.png"): "x"}


def test_a_subset_with_its_own_words_gets_no_advice_for_others(tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "mine" / "a.png", text="1girl, hat")
    paint(tmp_path / "mine" / "b.png", seed=2)
    config = tmp_path / "d.toml"
    config.write_text(
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "mine"\nclass_tokens = "cat"\nkeep_tokens = 1\n'
        'caption_extension = ".txt"\n'
    )
    notes = run(config, "--out", out)["notes"]
    assert [note.partition("trained with ")[2] for note in notes] == ["'cat', its class_tokens, as sd-scripts does it"]


def test_folders_that_the_disk_spells_otherwise_are_imported_again(tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "mine" / unicodedata.normalize("NFD", "ü/é.png"), text="x")
    run(tmp_path / "mine", "--out", out)
    assert run(tmp_path / "mine", "--out", out)["kept"] == 1


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_the_image_folder_is_not_among_the_images(mine: Path, place: str) -> None:
    assert "beside the images" in run(mine, "--out", mine / place, code=2)


@pytest.mark.slow
def test_a_killed_import_goes_on(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "mine"
    for seed in range(900):
        paint(folder / f"{seed}.png", (96, 96), seed=seed, text=str(seed))
    words = [sys.executable, "-m", "kohaku_wrap", "import", str(folder), "--out", str(out), "--jobs", "2"]
    for sign in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        journal = out / ".importing.jsonl"
        begun = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        while process.poll() is None and (not journal.exists() or len(journal.read_bytes().splitlines()) < begun + 30):
            time.sleep(0.01)
        process.send_signal(sign)
        process.communicate()
        assert process.returncode in (-sign, 130)
        assert not (out / "captions.arrow").exists()
    # Left by a process that was killed between writing a file and naming it; another may have its number now.
    for pid in (99999999, os.getpid()):
        (out / "mine" / f".{pid}.part").touch()
    report = run(folder, "--out", out)
    assert report["kept"] >= 60
    assert report["kept"] + report["written"] == report["total"] == 900
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("num_repeats = 9223372036854775807", "is above 1,000,000"),
        ("num_repeats = 0", "0 is below 1"),
        ('num_repeats = "3"', "is not a whole number"),
        ("class_tokens = 3", "3 is not a string"),
        ('keep_tokens = "two"', "'two' is not a whole number from 0 on"),
        ("keep_tokens = true", "True is not a whole number from 0 on"),
        ("keep_tokens = -1", "-1 is not a whole number from 0 on"),
        ('flip_aug = "yes"', "'yes' is not true or false"),
        ("caption_dropout_rate = 1.5", "1.5 is not a number from 0 to 1"),
        ("caption_prefix = 3", "3 is not a text"),
        ("\n[[datasets]]\nsubsets = 3", "is not a list of tables"),
    ],
)
def test_odd_values_of_a_dataset_file_are_named(mine: Path, tmp_path: Path, out: Path, line: str, said: str) -> None:
    config = tmp_path / "set.toml"
    config.write_text(f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{mine}"\n{line}\n')
    told = run(config, "--out", out, code=1)
    assert said in told and "set.toml: 1 problem" in told and not out.exists()


def test_a_dataset_file_takes_no_label(mine: Path, tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "other" / "mine" / "z.png", text="z")
    config = tmp_path / "set.toml"
    tables = (f'[[datasets.subsets]]\nimage_dir = "{place}"\n' for place in (mine, tmp_path / "other" / "mine"))
    config.write_text("[[datasets]]\n" + "".join(tables))
    assert "Give the folders, each with a label" in run(config, "--out", out, code=1)
    assert "--label is for folders" in run(config, "--label", "one", "--out", out, code=2)
    assert run(mine, tmp_path / "other" / "mine", "--label", "a", "--label", "b", "--out", out)["total"] == 6


def test_repeats_beyond_counting_are_refused(tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "mine" / f"{10**20}_cat" / "a.png")
    assert "repeats are above 1,000,000" in run(tmp_path / "mine", "--out", out, code=2)
    run(tmp_path / "mine", "--out", out, "--plain")


def test_options_that_would_do_nothing_are_refused(tmp_path: Path, out: Path, mine: Path) -> None:
    said = run(mine, "--out", out, "--text-column", "text", code=2)
    assert said.startswith(f"--text-column does nothing here: the captions of {mine} are .txt files")
    (tmp_path / "set.toml").write_text(f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{mine}"\n')
    said = run(tmp_path / "set.toml", "--out", out, "--plain", code=2)
    assert said.startswith("--plain does nothing with dataset files alone")
    assert not out.exists()


def caption(*words: object, code: int = 0) -> Any:
    """The document of `kwrap caption … --json`, or what is said of one that ends otherwise."""
    result = CliRunner().invoke(program, ["caption", *map(str, words), "--json"])
    if code:
        assert getattr(result.exception, "exit_code", None) == code, result.output
        return str(result.exception)
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


def test_an_image_is_explained_by_its_own_file_and_by_its_link(tmp_path: Path, out: Path) -> None:
    root = tmp_path / "set"
    paint(root / "3_my cat" / "a b.png", text="1girl, ☂\n\nsecond line")
    paint(root / "3_my cat" / "c.png", seed=1)
    run(root, "--out", out)
    by_link = caption("--image", out / "set-3_my cat" / "a b.png")
    assert by_link == caption("--image", root / "3_my cat" / "a b.png", "--out", out)
    assert (by_link["repeats"], by_link["subset"]) == (3, "set-3_my cat")
    assert by_link["raw"] == "1girl, ☂\nsecond line"
    assert by_link["trained"] == ["1girl, ☂"]
    assert (by_link["origin"], by_link["source"]) == (".txt files", str(root / "3_my cat" / "a b.png"))
    without = caption("--image", root / "3_my cat" / "c.png", "--out", out)
    assert (without["raw"], without["origin"]) == ("my cat", "none of its own")
    assert "has no row of it" in caption("--image", root / "x.png", "--out", out, code=1)
    assert "Name the image folder with --out" in caption("--image", root / "3_my cat" / "a b.png", code=1)


def test_the_lists_of_a_report_have_whole_paths(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("none.png", "odd.png", "in/deep.png")):
        paint(tmp_path / "3_me" / name, seed=seed)
    (tmp_path / "3_me" / "odd.txt").write_bytes(b"caf\xe9")
    monkeypatch.chdir(tmp_path)
    run("3_me", "--out", out, "--max-missing", 1)
    lists = json.loads((out / "import-report.json").read_text())["lists"]
    assert [entry["image"] for entry in lists["not_utf8"]] == [str(tmp_path / "3_me" / "odd.png")]
    assert lists["beyond_sd_scripts"] == [str(tmp_path / "3_me" / "in" / "deep.png")]
    assert caption("--image", "3_me/none.png", "--out", out)["origin"] == "none of its own"


def test_what_is_trained_has_the_options_of_the_subset(tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "a" / "x.png", text="one\ntwo")
    table = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\nnum_repeats = 4\ncaption_extension = ".txt"\n'
    table += 'caption_prefix = "pre,"\ncaption_suffix = ", post"\n'
    for wildcard, trained in (("", ["pre, one"]), ("enable_wildcard = true\n", ["pre, one", "two , post"])):
        (tmp_path / "set.toml").write_text(table + wildcard)
        run(tmp_path / "set.toml", "--out", out)
        found = caption("--image", out / "a" / "x.png")
        assert (found["trained"], found["repeats"]) == (trained, 4)


def test_statistics_of_imported_captions_count_subsets_and_rare_words(tmp_path: Path, out: Path) -> None:
    root = tmp_path / "set"
    for number in range(6):
        paint(root / ("2_x" if number < 2 else "5_y") / f"{number}.png", seed=number, text=f"cat, cat, n{number}\nmore")
    paint(root / "plain.png", seed=9, text="cat ||| a ||| safe")
    run(root, "--out", out)
    found = caption("--stats", "--out", out, "--rare", 2)
    assert (found["images"], found["epoch_images"], found["style"]) == (7, 1 + 2 * 2 + 4 * 5, "own")
    assert [(each["name"], each["images"], each["repeats"]) for each in found["subsets"]] == [
        ("set", 1, 1), ("set-2_x", 2, 2), ("set-5_y", 4, 5)]  # fmt: skip
    assert found["frequent"]["set-5_y"][0] == ["cat", 4]
    assert found["rare"] == [[word, 1] for word in sorted(["a", "safe", *(f"n{number}" for number in range(6))])]
    assert (found["several_lines"], found["without_separator"], found["empty"]) == (6, 6, 0)
    assert found["distinct_words"] == 9
    assert "SEL.parquet, or --out IMAGES" in caption("--stats", code=2)


def test_an_import_loads_neither_pandas_nor_duckdb(mine: Path, out: Path) -> None:
    program_text = (
        "import sys; from kohaku_wrap.cli import run_program; code = run_program(sys.argv[1:]); "
        "print(code, sorted({'pandas', 'duckdb'} & set(sys.modules)), file=sys.stderr); import pandas"
    )
    command = [sys.executable, "-c", program_text, "import", str(mine), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "0 []" and (out / "captions.arrow").is_file()
