"""What a PNG says of itself: the webui's text, kwrap's own chunk, and when a picture counts as drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from kohaku_wrap.cli import program
from kohaku_wrap.sampling.cells import Cell, Hires, read_cell
from kohaku_wrap.sampling.pictures import (
    ModelFile,
    NotOurs,
    Record,
    compose_parameters,
    describe_record,
    hash_pixels,
    is_drawn,
    read_record,
    write_picture,
)
from kohaku_wrap.sampling.replaying import describe_picture

FILES = (
    ModelFile("base, v1.safetensors", "a" * 64, "b" * 64),
    ModelFile("kohaku.safetensors", "c" * 64, "d" * 64, "0.8"),
    ModelFile("other.safetensors", "e" * 64, "f" * 64, "1"),
)
ODD = 'a, "quoted",\nSteps: 20, Sampler: none, Seed: 5\n(b:1.2), \\(c\\): d, é 日本'


def draw(path: Path, cell: Cell, colour: str = "red") -> Record:
    image = Image.new("RGB", (16, 8), colour)
    record = Record(cell, FILES, {"kwrap": "1"}, hash_pixels(image), 400, "", "CPU")
    write_picture(path, image, record)
    return record


def test_galleries_read_the_parameters(tmp_path: Path, cell: Cell) -> None:
    from sd_parsers import ParserManager

    cell = replace(cell, prompt=ODD, negative="low quality, Steps: 3,\nworst", guidance=5.5, hires=Hires(1.5, 0.4))
    draw(tmp_path / "a.png", cell)
    found = ParserManager().parse(tmp_path / "a.png")
    assert found is not None
    (sampler,) = found.samplers
    assert [prompt.value for prompt in sampler.prompts] == [ODD]
    assert [prompt.value for prompt in sampler.negative_prompts] == [cell.negative]
    assert sampler.name == "Euler a"
    assert sampler.parameters["steps"] == "3" and sampler.parameters["cfg_scale"] == "5.5"
    assert sampler.parameters["seed"] == "3" and sampler.parameters["scheduler"] == "Exponential"
    assert sampler.model is not None and sampler.model.hash == "a" * 10
    last = compose_parameters(read_record(tmp_path / "a.png")[0]).splitlines()[-1]
    assert 'Lora hashes: "kohaku: dddddddddddd, other: ffffffffffff"' in last
    assert 'Model: "base, v1"' in last and "Size: 64x64" in last and "Hires upscale: 1.5" in last


def test_a_record_comes_back_whole(tmp_path: Path, cell: Cell) -> None:
    cell = replace(cell, prompt=ODD, hires=Hires(1.25, 0.3), seed=(1 << 63) - 1)
    record = draw(tmp_path / "a.png", cell)
    assert read_record(tmp_path / "a.png") == (record, record.pixels_sha256)
    assert read_cell(json.loads(json.dumps(cell.describe()))) == cell


def test_inspect_shows_the_sizes_that_the_picture_has(tmp_path: Path, cell: Cell) -> None:
    path = tmp_path / "a.png"
    draw(path, replace(cell, width=64, height=128, hires=Hires(1.5)))
    with Image.open(path) as image:
        kept = json.loads(image.info["kwrap"])
    found = json.loads(CliRunner().invoke(program, ["inspect", str(path), "--json"]).stdout)
    for name, size in {"original_size": [128, 64], "crop_top_left": [0, 0], "target_size": [128, 64],
                       "second_pass_size": [192, 96]}.items():  # fmt: skip
        assert kept[name] == found[name] == size, name
    shown = CliRunner().invoke(program, ["inspect", str(path)]).stdout
    assert "original and target 64x128, crop at 0, 0; in the second pass 96x192" in shown


def test_a_picture_counts_as_drawn_only_when_it_is_whole_and_of_this_cell(tmp_path: Path, cell: Cell) -> None:
    path = tmp_path / cell.name
    assert not is_drawn(path, cell)
    draw(path, cell)
    assert is_drawn(path, cell)
    assert not is_drawn(path, replace(cell, seed=4))
    content = path.read_bytes()
    for cut in range(0, len(content), 37):
        path.write_bytes(content[:cut])
        assert not is_drawn(path, cell)
    path.write_bytes(content)
    with PngImageFile(path) as image:
        text = PngInfo()
        for name, value in image.text.items():
            text.add_itxt(name, value)
        changed = image.convert("RGB")
    changed.putpixel((3, 3), (0, 0, 1))
    changed.save(path, pnginfo=text)
    assert not is_drawn(path, cell)


def test_the_name_follows_from_the_content(cell: Cell) -> None:
    names = {replace(cell, **change).name for change in (
        {}, {"seed": 4}, {"prompt": "x"}, {"negative": "y"}, {"model": "z"}, {"guidance": 5.1}, {"steps": 4},
        {"hires": Hires(1.5)}, {"compute": replace(cell.compute, batch=3)},
        {"compute": replace(cell.compute, threads=2)},
    )}  # fmt: skip
    assert len(names) == 10
    assert replace(cell, prompt="../../日本").name.startswith("picture_3_")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("plain", "no picture of kwrap: it has no text of kwrap"),
        ("parameters", "no picture of kwrap: it has the webui's text alone"),
        ("part", "not a whole PNG of kwrap (its text has no 'files')"),
        ("noise", "not a whole PNG of kwrap"),
        ("json", "not a whole PNG of kwrap"),
        ("other format", "not a whole PNG of kwrap"),
    ],
)
def test_other_pictures_are_named_as_such(tmp_path: Path, cell: Cell, kind: str, words: str) -> None:
    path, text = tmp_path / "a.png", PngInfo()
    if kind == "parameters":
        text.add_text("parameters", "a cat\nSteps: 3")
    if kind == "part":
        text.add_text("kwrap", json.dumps({"cell": cell.describe()}))
    if kind == "json":
        text.add_text("kwrap", "[" * 5000)
    if kind == "other format":
        text.add_text("kwrap", json.dumps({"cell": {**cell.describe(), "format": 99}, "files": [{}]}))
    Image.new("RGB", (4, 4)).save(path, pnginfo=text)
    if kind == "noise":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(200)))
    with pytest.raises(NotOurs) as refused:
        read_record(path)
    assert refused.value.message.startswith(f"{path}: {words}") and refused.value.next_step


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value of a document stands."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places_in(inner, (*path, key))


@pytest.mark.parametrize(
    "odd",
    [None, True, -1, "unipc", "", [], {"a": 1}, 10**400, float("nan")],
    ids=["null", "true", "negative", "a word", "no word", "list", "table", "huge", "nan"],
)
def test_a_text_of_a_later_kwrap_or_a_stranger_is_read_or_refused(tmp_path: Path, cell: Cell, odd: object) -> None:
    path = tmp_path / "a.png"
    record = draw(path, replace(cell, hires=Hires(1.5)))
    whole = describe_record(record)
    for *before, last in places_in(whole):
        document = json.loads(json.dumps(whole))
        inner = document
        for key in before:
            inner = inner[key]
        inner[last] = odd
        text = PngInfo()
        text.add_itxt("kwrap", json.dumps(document))
        Image.new("RGB", (4, 4)).save(path, pnginfo=text)
        try:
            found = read_record(path)
        except NotOurs:
            continue
        assert describe_picture(path, *found)["replay"].startswith("kwrap sample ")
