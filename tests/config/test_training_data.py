"""What sd-scripts' own dataset reads, and the digests of it: whatever is read otherwise has another digest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from kohaku_wrap.cli import program
from kohaku_wrap.config.trainer_rows import check_trainer_texts, find_caption_extension, read_trainer_rows
from kohaku_wrap.config.training_data import MOST_LENGTHS, describe_data, spread_evenly
from kohaku_wrap.formats.caption_rows import NoImages

FILES: Mapping[str, Any] = {"caption_extension": ".txt"}
CACHE: Mapping[str, Any] = {"caption_extension": ".txt", "cache_info": True}


def paint(path: Path, size: tuple[int, int] = (40, 30), colour: tuple[int, int, int] = (1, 2, 3)) -> None:
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images with captions under two endings, and a cache of a fourth kind of captions."""
    folder = tmp_path / "images"
    folder.mkdir()
    entries = {}
    for name in ("a", "b", "c"):
        paint(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"text of {name}")
        (folder / f"{name}.caption").write_text(f"caption of {name}")
        entries[str(folder / f"{name}.png")] = {"caption": f"cached of {name}", "resolution": [40, 30]}
    (folder / "metadata_cache.json").write_text(json.dumps(entries))
    return folder


def edit_cache(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "metadata_cache.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def other_words(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: {**entry, "caption": "zzz"} for key, entry in entries.items()}


def other_sizes(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: {**entry, "resolution": [30, 40]} for key, entry in entries.items()}


def backwards(entries: dict[str, Any]) -> dict[str, Any]:
    return dict(reversed(entries.items()))


CAPTIONS, ROWS, LENGTHS = "captions_digest", "rows_digest", "image_files_digest"

CHANGES: dict[str, tuple[Mapping[str, Any], Callable[[Path], object], set[str]]] = {
    "a caption in the cache": (CACHE, lambda at: edit_cache(at, other_words), {CAPTIONS}),
    "a size in the cache": (CACHE, lambda at: edit_cache(at, other_sizes), {CAPTIONS, ROWS}),
    "the order of the cache": (CACHE, lambda at: edit_cache(at, backwards), {CAPTIONS, ROWS}),
    "an image out of the cache": (
        CACHE,
        lambda at: edit_cache(at, lambda entries: dict(list(entries.items())[1:])),
        {CAPTIONS, ROWS, LENGTHS},
    ),
    "the cache is gone": (CACHE, lambda at: (at / "metadata_cache.json").unlink(), {CAPTIONS}),
    "a caption file beside the cache": (CACHE, lambda at: (at / "a.txt").write_text("zzz"), set()),
    "a caption file": (FILES, lambda at: (at / "a.txt").write_text("zzz"), {CAPTIONS}),
    "a caption file of another ending": (FILES, lambda at: (at / "a.caption").write_text("zzz"), set()),
    "a caption file is gone": (FILES, lambda at: (at / "b.txt").unlink(), {CAPTIONS}),
    "the cache that is not read": (FILES, lambda at: edit_cache(at, other_words), set()),
    "an image more": (FILES, lambda at: paint(at / "d.png"), {CAPTIONS, ROWS, LENGTHS}),
    "an image fewer": (FILES, lambda at: (at / "c.png").unlink(), {CAPTIONS, ROWS, LENGTHS}),
    "an image of another size": (FILES, lambda at: paint(at / "c.png", (300, 400)), {CAPTIONS, ROWS, LENGTHS}),
    "an image renamed": (FILES, lambda at: (at / "c.png").rename(at / "0.png"), {CAPTIONS, ROWS}),
    "pixels of an image": (FILES, lambda at: (at / "c.png").write_bytes((at / "c.png").read_bytes() + b"0"), {LENGTHS}),
    "an image in a sub-folder": (FILES, lambda at: [(at / "x").mkdir(), paint(at / "x" / "d.png")], set()),
}
"""The dataset's options, what is changed, and the digests that must then be others; no more and no fewer."""


@pytest.mark.parametrize("name", CHANGES)
def test_each_digest_is_of_what_is_read(images: Path, name: str) -> None:
    dataset, change, wanted = CHANGES[name]
    before = describe_data("sd-scripts", images, dataset)
    change(images)
    now = describe_data("sd-scripts", images, dataset)
    assert {key for key in before if before[key] != now[key]} == wanted


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (FILES, {}),
        (FILES, {"caption_extension": ".caption"}),
        (FILES, CACHE),
        (CACHE, {"caption_extension": ".txt", "cache_info": False}),
    ],
)
def test_an_option_that_has_other_captions_read_is_seen(
    images: Path, first: Mapping[str, Any], second: Mapping[str, Any]
) -> None:
    found = [describe_data("sd-scripts", images, dataset) for dataset in (first, second)]
    assert found[0][CAPTIONS] != found[1][CAPTIONS]


def test_the_cache_that_the_trainer_writes_is_the_same_data(tmp_path: Path) -> None:
    """Its first start writes what it read: first lines, without blanks and line ends."""
    for name in ("a", "b"):
        paint(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f" {name}, smile \nsecond line\n")
    before = describe_data("sd-scripts", tmp_path, CACHE)
    entries = {
        str(tmp_path / f"{name}.png"): {"caption": f"{name}, smile", "resolution": [40, 30]} for name in ("a", "b")
    }
    (tmp_path / "metadata_cache.json").write_text(json.dumps(entries))
    assert describe_data("sd-scripts", tmp_path, CACHE) == before


@pytest.mark.parametrize("content", [b"", "猫".encode("cp932")])
def test_a_text_that_the_trainer_fails_at_is_named(tmp_path: Path, content: bytes) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(NoImages, match=r"a\.txt"):
        describe_data("sd-scripts", tmp_path, FILES)


def test_all_texts_that_the_trainer_fails_at_are_named_at_once(tmp_path: Path) -> None:
    for name, content in {"a": b"", "b": b"fine", "c": b"", "d": "猫".encode("cp932"), "e": b"\n"}.items():
        paint(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(content)
    with pytest.raises(NoImages) as refused:
        describe_data("sd-scripts", tmp_path, FILES)
    assert refused.value.message == (
        f"{tmp_path}: sd-scripts ends at 3 of 5 caption files: empty a.txt, c.txt; not UTF-8 d.txt"
    )


def test_all_images_that_cannot_be_read_are_named_at_once(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "away.png")
    (tmp_path / "c.png").write_text("<html>")
    with pytest.raises(NoImages, match=r"2 of 3 images cannot be read, or link to nothing: b\.png, c\.png"):
        read_trainer_rows(tmp_path, FILES)


def test_what_is_trained_with_an_empty_caption_is_counted(tmp_path: Path) -> None:
    for name, content in {"a": "\nsecond line", "b": "fine", "c": None}.items():
        paint(tmp_path / f"{name}.png")
        if content:
            (tmp_path / f"{name}.txt").write_text(content)
    rows = read_trainer_rows(tmp_path, {**FILES, "class_tokens": "cat"})
    assert list(rows.captions) == ["", "fine", "cat"]
    assert rows.source.endswith(
        "their .txt files; 1 without one; 1 with an empty first line, trained with an empty caption"
    )


def test_images_in_sub_folders_are_said_to_be_left_out(tmp_path: Path) -> None:
    for name in ("a", "3_x/b", "3_x/.hidden/c", "y/z/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        paint(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("some")
    rows = read_trainer_rows(tmp_path, FILES)
    assert list(rows.files) == ["a.png"]
    assert rows.source.endswith("their .txt files; 2 in sub-folders are not trained")


def test_imported_captions_are_only_in_the_cache(tmp_path: Path) -> None:
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("some")
    (mine := tmp_path / "mine").mkdir()
    for name in ("a.png", "a.txt"):
        (tmp_path / name).rename(mine / name)
    images = tmp_path / "images"
    assert CliRunner().invoke(program, ["import", str(mine), "--out", str(images)]).exit_code == 0
    assert list(read_trainer_rows(images, {"cache_info": True}).captions) == ["some"]
    with pytest.raises(NoImages, match="reads with cache_info = true alone"):
        read_trainer_rows(images, FILES)
    with pytest.raises(NoImages, match="reads with cache_info = true alone"):
        check_trainer_texts(images, FILES)


def test_a_plan_of_the_trainers_own_data_asks_for_no_captions_file(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    paint(tmp_path / "images" / "a.png")
    site = tmp_path / "site.toml"
    site.write_text(
        '[paths]\nimages = "images"\nbase_model = "b"\nruns = "runs"\n[machine]\ngpus = 0\nbatch_per_gpu = 1\n'
    )
    words = ["plan", "demo", "--site", str(site), "--no-modules", "--set", "kwrap.data=sd-scripts"]
    done = CliRunner().invoke(program, words)
    assert done.exit_code == 0 and "captions.arrow" not in done.stderr, done.output


def test_check_reads_the_texts_that_the_trainer_would(tmp_path: Path) -> None:
    world = tmp_path / "images"
    world.mkdir()
    paint(world / "a.png")
    (world / "a.txt").write_text("")
    site = tmp_path / "site.toml"
    site.write_text('[paths]\nimages = "images"\nbase_model = "b"\nruns = "runs"\n[machine]\ngpus = 0\n')
    template = tmp_path / "t.toml"
    template.write_text('extends = "demo"\n[kwrap]\ndata = "sd-scripts"\n[dataset_options]\ncache_info = false\n')

    def check() -> tuple[int, list[str]]:
        done = CliRunner().invoke(program, ["template", "check", str(template), "--site", str(site), "--json"])
        return done.exit_code, [each["what"] for each in json.loads(done.stdout)["problems"]]

    code, said = check()
    assert code == 1 and any("sd-scripts ends at 1 of 1 caption files: empty a.txt" in each for each in said)
    (world / "a.txt").write_text("1girl")
    assert not any("a.txt" in each for each in check()[1])


def test_the_ending_of_texts_is_found_and_of_two_none_is_chosen(tmp_path: Path, images: Path) -> None:
    assert find_caption_extension(images) is None
    (images / "metadata_cache.json").unlink()
    with pytest.raises(NoImages, match=r"\.txt and \.caption"):
        find_caption_extension(images)
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.txt").write_text("a")
    assert find_caption_extension(tmp_path / "only") == ".txt"


def test_images_that_were_moved_are_the_same(images: Path) -> None:
    def into(folder: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda entries: {str(folder / Path(key).name): entry for key, entry in entries.items()}

    before = [describe_data("sd-scripts", images, dataset) for dataset in (FILES, CACHE)]
    away = images.rename(images.with_name("moved"))
    edit_cache(away, into(away))
    assert [describe_data("sd-scripts", away, dataset) for dataset in (FILES, CACHE)] == before


def test_a_cache_that_names_images_of_an_earlier_place_is_the_same_data(images: Path) -> None:
    """Each attempt has a copy of its own, with the paths of today."""
    before = describe_data("sd-scripts", images, CACHE)
    away = images.rename(images.with_name("moved"))
    assert describe_data("sd-scripts", away, CACHE) == before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"a.png": {}}', '{"a.png": {"caption": "a", "resolution": [1]}}'])
def test_a_cache_that_cannot_be_read_is_named(images: Path, text: str) -> None:
    (images / "metadata_cache.json").write_text(text)
    with pytest.raises(NoImages, match=r"metadata_cache\.json"):
        describe_data("sd-scripts", images, CACHE)


@pytest.mark.parametrize("count", [0, 1, MOST_LENGTHS, MOST_LENGTHS + 1, 5_210_319])
def test_of_very_many_files_some_are_looked_at_from_all_over(count: int) -> None:
    chosen = spread_evenly(count)
    assert len(chosen) == len(np.unique(chosen)) == min(count, MOST_LENGTHS)
    steps = np.diff([*chosen.tolist(), count])
    assert count == 0 or (chosen[0] == 0 and steps.min() >= 1 and steps.max() <= -(-count // MOST_LENGTHS))
