"""Which folders and dataset files are taken: repeats, subsets, labels, and what plain sd-scripts would leave out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from own_images import captions_of, paint, rows_of, run

from kohaku_wrap.cli import program
from kohaku_wrap.formats.caption_rows import read_subsets


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


def test_paths_of_a_dataset_file_may_begin_at_it(tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "deep" / "mine" / "a.png")
    (tmp_path / "deep" / "meta.json").write_text('{"a": {"caption": "one"}}')
    subset = '[[datasets]]\n[[datasets.subsets]]\nmetadata_file = "meta.json"\n'
    (tmp_path / "deep" / "set.toml").write_text(f'{subset}image_dir = "mine"\n')
    run(tmp_path / "deep" / "set.toml", "--out", out)
    assert captions_of(out) == {"a.png": "one"}
    (tmp_path / "deep" / "set.toml").write_text(subset)
    assert "names no image_dir" in run(tmp_path / "deep" / "set.toml", "--out", out, code=2)


def test_a_folder_that_nobody_may_list_is_named_not_passed_by(mine: Path, out: Path) -> None:
    run(mine, "--out", out)
    (mine / "sub dir").chmod(0o000)
    rights = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    argv = [*rights, sys.executable, "-m", "kohaku_wrap", "import", str(mine), "--out", str(out)]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    (mine / "sub dir").chmod(0o755)
    assert (ended.returncode, len(rows_of(out))) == (1, 5)
    assert f"{mine}/sub dir: Permission denied" in ended.stderr


def test_a_folder_that_the_trainer_leaves_out_is_named(tmp_path: Path, out: Path) -> None:
    paint(tmp_path / "0_cats" / "a.png", text="a")
    assert "0_ in front" in run(tmp_path / "0_cats", "--out", out, code=2)
    assert run(tmp_path / "0_cats", "--out", out, "--plain")["total"] == 1


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


def test_equal_labels_are_refused_by_name(mine: Path, tmp_path: Path, out: Path) -> None:
    other = tmp_path / "other" / "mine"
    paint(other / "a.png", seed=50, text="x")
    assert str(other) in run(mine, other, "--out", out, code=1)
    run(mine, "--out", out)
    assert "--label" in run(other, "--out", out, code=1)
    both = run(other, "--label", "second", "--out", out)
    assert (both["total"], both["others"]) == (6, 5)
    assert captions_of(out)["d.bmp"] == "猫/d.bmp, ☂ smile"


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_the_image_folder_is_not_among_the_images(mine: Path, place: str) -> None:
    assert "beside the images" in run(mine, "--out", mine / place, code=2)


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
