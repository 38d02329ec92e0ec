"""Folders of one's own become a dataset: every image is checked, ids stay, and an import can be killed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from own_images import captions_of, paint, rows_of, run
from PIL import Image

from kohaku_wrap.cli import program
from kohaku_wrap.dataset.own.images import ImageTask, check_images, read_imported
from kohaku_wrap.files import unheard
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.formats.caption_rows import find_captions
from kohaku_wrap.formats.caption_writer import check_columns


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


def test_names_as_long_as_the_disk_takes(tmp_path: Path, out: Path) -> None:
    name = "x" * 251 + ".png"
    paint(tmp_path / "mine" / name, text="long")
    assert run(tmp_path / "mine", "--out", out)["written"] == 1
    assert run(tmp_path / "mine", "--out", out, "--copy")["copied"] == 1
    assert captions_of(out) == {name: "long"}


def test_an_empty_folder_among_others_takes_no_images_away(mine: Path, tmp_path: Path, out: Path) -> None:
    image = paint(tmp_path / "disk" / "z.png", seed=9)
    run(mine, tmp_path / "disk", "--out", out, "--copy")
    image.unlink()
    assert f"{tmp_path}/disk: no image in there" in run(mine, tmp_path / "disk", "--out", out, "--copy", code=2)
    assert (out / "disk" / "z.png").is_file() and len(rows_of(out)) == 6


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


@pytest.mark.parametrize("resolution", [64, 100, 127, 700])
def test_any_resolution_has_buckets(tmp_path: Path, out: Path, resolution: int) -> None:
    paint(tmp_path / "mine" / "a.png", (64, 48), text="a")
    assert run(tmp_path / "mine", "--out", out, "--resolution", resolution)["too_small"] == 1


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
