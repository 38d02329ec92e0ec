"""Folders of pictures judged: prompts from the files, one pass a picture, and numbers that can be counted by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kohaku_wrap.cli import run_program
from kohaku_wrap.evaluation.judge_folders import open_judge
from kohaku_wrap.evaluation.sheet_judging import find_frechet_distance
from kohaku_wrap.sampling.cells import Cell
from kohaku_wrap.sampling.pictures import ModelFile, Record, hash_pixels, write_picture


def draw(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).normal(40 * seed, 30, (64, 64, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    """Two pictures of kwrap by two models, one of the webui, one without a text, one that is cut, a contact sheet."""
    folder = tmp_path / "sheet"
    folder.mkdir()
    for seed, model in ((1, "a" * 64), (2, "b" * 64)):
        cell = Cell(model, "1girl, (smile:1.2), unheard of", "", seed, 64, 64, "t")
        record = Record(cell, (ModelFile("m.safetensors", model, model),), {}, hash_pixels(draw(seed)))
        write_picture(folder / f"{seed}.png", draw(seed), record)
    text = PngInfo()
    text.add_itxt("parameters", "long hair, smile\nNegative prompt: 1girl\nSteps: 20, Model hash: 0123456789")
    draw(3).save(folder / "3.png", pnginfo=text)
    draw(4).save(folder / "4.jpg")
    (folder / "5.png").write_bytes((folder / "1.png").read_bytes()[:200])
    for name in ("contact-sheet.png", "contact-sheet-2.png"):
        draw(5).save(folder / name)
    return folder


def judge(sheet: Path, folder: Path, *words: object) -> dict[str, Any]:
    assert run_program(["evaluate", "judge", str(sheet), "--judge", str(folder), *map(str, words)]) == 0
    return dict(json.loads((sheet / f"judged-{folder.name}.json").read_text(encoding="utf-8")))


def test_the_recall_of_prompted_tags_is_counted_by_picture_and_tag(sheet: Path, judges: Path) -> None:
    tagger = open_judge(judges / "tagger")
    rows = {number: tagger.look_at(sheet / name) for number, name in ((1, "1.png"), (2, "2.png"), (3, "3.png"))}
    asked = {1: ("1girl", "smile"), 2: ("1girl", "smile"), 3: ("long_hair", "smile")}
    seen = {
        number: [rows[number][tagger.labels.index(tag)] >= tagger.kind.threshold for tag in tags]
        for number, tags in asked.items()
    }
    found = judge(sheet, judges / "tagger")
    assert found["all"]["recall"]["mean"] == pytest.approx(np.mean([np.mean(each) for each in seen.values()]))
    tags = {each["tag"]: each for each in found["all"]["tags"]}
    assert {tag: each["pictures"] for tag, each in tags.items()} == {"1girl": 2, "long_hair": 1, "smile": 3}
    assert tags["smile"]["recall"] == pytest.approx(np.mean([each[1] for each in seen.values()]))
    assert found["all"]["unknown_tags"] == {"unheard_of": 2}
    assert found["all"]["pictures_without_known_tag"] == 1
    assert [each["title"] for each in found["models"]] == ["unknown", "0123456789", "a" * 10, "b" * 10]
    (unreadable,) = found["unreadable"]
    assert "5.png: cannot be read" in unreadable


def test_models_of_a_run_stand_in_the_order_of_its_steps(sheet: Path, judges: Path) -> None:
    pictures = {f"{seed}.png": {"model": f"run step {step}"} for seed, step in ((1, 1000), (2, 400))}
    (sheet / "sheet.json").write_text(json.dumps({"files": {}, "tokenizers": {}, "pictures": pictures}))
    found = judge(sheet, judges / "corruption")
    assert [each["title"] for each in found["models"]] == ["unknown", "0123456789", "run step 400", "run step 1000"]
    assert ("run step 400", "run step 1000") in [(pair["from"], pair["to"]) for pair in found["pairs"]]


def test_looks_and_broken_pictures(sheet: Path, judges: Path) -> None:
    looks = judge(sheet, judges / "aesthetic")["all"]
    shares = looks["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    order = ("worst", "low", "normal", "good", "great", "best", "masterpiece")
    assert looks["score"]["mean"] == pytest.approx(sum(place * shares[name] for place, name in enumerate(order)))
    corruption = open_judge(judges / "corruption")
    found = judge(sheet, judges / "corruption")["all"]
    broken = [name for name in ("1.png", "2.png", "3.png", "4.jpg") if corruption.look_at(sheet / name)[0] >= 0.5]
    assert found["pictures_corrupted"] == broken and found["corrupted"] == len(broken)


def draw_sheet(folder: Path, model: str, seeds: Sequence[int], prediction: str = "epsilon", steps: int = 24) -> Path:
    """A picture a seed, all of one prompt, by one model."""
    folder.mkdir()
    for seed in seeds:
        image, cell = draw(seed + len(model.rstrip("b"))), Cell(
            model, "1girl, smile", "", seed, 64, 64, "t", steps, prediction=prediction
        )  # fmt: skip
        write_picture(
            folder / f"{seed}.png", image, Record(cell, (ModelFile("m", model, model),), {}, hash_pixels(image))
        )
    return folder


def test_two_results_are_compared_over_the_pictures_that_both_drew_alike(tmp_path: Path, judges: Path) -> None:
    first = draw_sheet(tmp_path / "first", "a" * 64, (1, 2, 3))
    second = draw_sheet(tmp_path / "second", "b" * 64, (2, 3, 4), prediction="v")
    draw(9).save(second / "without a text.png")
    judge(first, judges / "aesthetic")
    found = judge(second, judges / "aesthetic", "--against", first / "judged-aesthetic.json")
    aesthetic = open_judge(judges / "aesthetic")
    order = ("worst", "low", "normal", "good", "great", "best", "masterpiece")
    places = [order.index(label) for label in aesthetic.labels]
    apart = [
        float(aesthetic.look_at(first / f"{seed}.png") @ places - aesthetic.look_at(second / f"{seed}.png") @ places)
        for seed in (2, 3)
    ]
    (pair,) = [each for each in found["pairs"] if "unknown" not in each.values()]
    assert (pair["from"], pair["to"], pair["pictures"]) == ("b" * 10, "a" * 10, 2)
    difference = pair["difference"]
    assert difference["mean"] == pytest.approx(np.mean(apart), abs=1e-5)
    assert [difference["low"], difference["high"]] == pytest.approx(sorted(apart), abs=1e-5)
    assert [each["title"] for each in found["models"]] == ["unknown", "b" * 10, "a" * 10]
    assert found["models"][1]["identities"] == ["b" * 64]


def test_results_that_do_not_compare_are_refused_with_the_reason(
    tmp_path: Path, judges: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = draw_sheet(tmp_path / "first", "a" * 64, (1, 2)), draw_sheet(tmp_path / "other", "b" * 64, (3,))
    longer = draw_sheet(tmp_path / "longer", "c" * 64, (1, 2), steps=30)
    result = first / "judged-corruption.json"
    document = judge(first, judges / "corruption")
    for folder, kind, message in (
        (other, "corruption", "has prompt, seed, size and sampler of a picture"),
        (longer, "corruption", "has prompt, seed, size and sampler of a picture"),
        (other, "aesthetic", "(corruption), not by the same files"),
    ):
        assert run_program(["evaluate", "judge", str(folder), "--judge", str(judges / kind), "--against", str(result)])
        assert message in capsys.readouterr().err
        assert not (folder / f"judged-{kind}.json").exists()
    for model in document["models"]:
        del model["judged"]
    result.write_text(json.dumps(document), encoding="utf-8")
    assert run_program(
        ["evaluate", "judge", str(longer), "--judge", str(judges / "corruption"), "--against", str(result)]
    )
    assert "of an earlier kwrap" in capsys.readouterr().err


def test_the_distance_names_its_weakness_and_is_0_to_the_same_pictures(sheet: Path, judges: Path) -> None:
    found = judge(sheet, judges / "ccip", "--reference", sheet)
    distance = found["all"]["frechet"]
    # Of the reference the contact sheets are left out, too.
    assert (distance["pictures"], distance["reference_pictures"]) == (4, 4)
    assert "disagrees with people" in distance["weakness"] and distance["is_few"]
    kept = len(list((sheet / ".judged").rglob("*.npy")))
    assert judge(sheet, judges / "ccip", "--reference", sheet) == found
    assert len(list((sheet / ".judged").rglob("*.npy"))) == kept == 4


def test_the_distance_is_that_of_two_normal_distributions() -> None:
    draw = np.random.default_rng(2)
    one, other = draw.normal(0, 1, (50_000, 3)), draw.normal([1, 0, 2], [2, 1, 3], (50_000, 3))
    assert find_frechet_distance(one, other) == pytest.approx(5 + (1 - 2) ** 2 + (1 - 3) ** 2, rel=0.02)
    assert find_frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{sheet}", "--judge", "{judges}/ccip"], "says nothing of a picture alone"),
        (["{sheet}/none", "--judge", "{judges}/tagger"], "no such folder"),
        (["{judges}", "--judge", "{judges}/tagger"], "no picture in it"),
        (["{sheet}", "--judge", "{sheet}"], "no judge of a known layout"),
    ],
)
def test_what_cannot_be_judged_is_one_message(
    words: list[str], message: str, sheet: Path, judges: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(["evaluate", "judge", *(word.format(sheet=sheet, judges=judges) for word in words)])
    assert message in capsys.readouterr().err
