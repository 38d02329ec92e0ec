"""`kwrap merge --grid` in real processes on the tiny world: killed, gone on with, scored, and read back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kohaku_wrap.cli import run_program
from kohaku_wrap.evaluation.small_judges import build_small_judges
from kohaku_wrap.formats.safetensors import read_header

SHEET = """
prompts = ["1girl, solo"]
seeds = [1, 2]
sizes = ["64x64"]
steps = 1
"""


@pytest.fixture(scope="module")
def sheet(world: Path) -> Path:
    path = world / "grid-sheet.toml"
    path.write_text(SHEET)
    return path


def words_of(world: Path, out: Path, *more: object) -> list[str]:
    words: list[object] = ["merge", "--grid", "slerp(a, b, A)", "A=0.25,0.75"]
    words += ["-m", f"a={world / 'base' / 'model.safetensors'}", "-m", f"b={world / 'other' / 'model.safetensors'}"]
    return [str(word) for word in [*words, "-o", out, *more]]


Printed = pytest.CaptureFixture[str]


def run(words: list[str], capsys: Printed) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `kwrap`."""
    capsys.readouterr()
    code = run_program(words)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def drawing(world: Path, sheet: Path) -> list[object]:
    tokenizers = world / "base" / "tokenizers"
    return ["--sheet", sheet, "--sample", f"--tokenizers '{tokenizers}' --threads 1 --device cpu"]


def test_a_dry_run_counts_and_writes_nothing(world: Path, sheet: Path, tmp_path: Path, capsys: Printed) -> None:
    words = words_of(world, tmp_path / "grid", *drawing(world, sheet), "--dry-run", "--json")
    code, printed, errors = run(words, capsys)
    assert code == 0, errors
    found = json.loads(printed)["grid"]
    assert (found["merges"], found["pictures_each"], found["pictures"], found["steps_waiting"]) == (2, 2, 4, 4)
    size = read_header(world / "base" / "model.safetensors").size_bytes
    assert 0.9 * 2 * size < found["disk_bytes"] <= 2 * size
    assert [each["formula"] for each in found["points"]] == ["slerp(a, b, 0.25)", "slerp(a, b, 0.75)"]
    assert not (tmp_path / "grid").exists()
    _, printed, _ = run([*words, "--keep", "recipes"], capsys)
    assert json.loads(printed)["grid"]["disk_bytes"] * 2 == found["disk_bytes"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_grid_goes_on_and_is_compared_on_one_page(
    world: Path, sheet: Path, tmp_path: Path, capsys: Printed
) -> None:
    (tmp_path / "judges").mkdir()
    build_small_judges(tmp_path / "judges", ("1girl", "smile"))
    out, judge = tmp_path / "grid", tmp_path / "judges" / "tagger"
    words = words_of(world, out, *drawing(world, sheet), "--evaluate", f"judge --judge '{judge}'")
    child = subprocess.Popen([sys.executable, "-m", "kohaku_wrap", *words], stderr=subprocess.DEVNULL)
    record = out / "A0.25" / "point.json"
    deadline = time.monotonic() + 300
    while not record.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and record.exists() and not (out / "A0.75" / "point.json").exists()
    made = (out / "A0.25" / "A0.25.safetensors").stat()
    code, _, errors = run(words, capsys)
    assert code == 0, errors
    after = (out / "A0.25" / "A0.25.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    page = (out / "grid.html").read_text(encoding="utf-8")
    for point in ("A0.25", "A0.75"):
        pictures = [path for path in (out / point / "pictures").glob("*.png") if path.name != "contact-sheet.png"]
        assert len(pictures) == 2
        assert all(f"./{point}/pictures/{path.name}" in page for path in pictures)
        score = json.loads((out / point / "score-1.json").read_text())["models"][0]["recall"]["mean"]
        assert f'<td data-sort="{score}">' in page
        assert set(json.loads((out / point / "point.json").read_text())["done"]) == {"merge", "sample", "judge-1"}
    for more in ([], ["--keep", "recipes"]):
        _, printed, _ = run([*words, *more, "--json"], capsys)
        assert json.loads(printed)["grid"]["steps_done"] == 0
    assert not list(out.rglob("*.safetensors")) and "recipe only" in (out / "grid.html").read_text(encoding="utf-8")
    code, _, errors = run([word.replace("slerp(a, b, A)", "cosine(a, b, A)") for word in words], capsys)
    assert code == 2 and "holds the merge of another formula" in errors


def test_a_step_that_fails_is_told_once_with_its_command(world: Path, tmp_path: Path, capsys: Printed) -> None:
    out = tmp_path / "grid"
    words = words_of(world, out, "--evaluate", "loss --images /nowhere")
    code, _, errors = run(words, capsys)
    assert code == 1
    assert errors.count("error: ") == 1
    assert "kwrap evaluate loss" in errors and "/nowhere" in errors and "it goes on" in errors
    assert json.loads((out / "A0.25" / "point.json").read_text())["done"].keys() == {"merge"}


def test_a_recipes_options_hold_for_every_merge(world: Path, tmp_path: Path, capsys: Printed) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text('formula = "a + A*(b - a)"\n[options]\ndtype = "fp32"\nmerge_vae = true\n')
    words = [str(recipe) if word == "slerp(a, b, A)" else word for word in words_of(world, tmp_path / "grid")]
    code, _, errors = run(words, capsys)
    assert code == 0, errors
    for point in ("A0.25", "A0.75"):
        header = read_header(tmp_path / "grid" / point / f"{point}.safetensors")
        assert {spot.dtype for spot in header.tensors.values()} <= {"F32", "I64"}
        recorded = json.loads(header.metadata["sd_merge_recipe"])["options"]
        assert recorded == {"dtype": "F32", "merge_vae": True}


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--evaluate", "judges --judge x"], "judges is none of judge, ccip, loss"),
        (["--evaluate", "judge --judge x"], "has no pictures to judge"),
        (["--evaluate", "judge 'x"], "No closing quotation"),
        (["--sheet", "/nowhere.toml"], "no such file"),
        (["--as", "lora"], "makes checkpoints, not networks"),
        (["B=1"], "B stands for no number in the formula"),
        (["-o", "x.safetensors"], "writes into a folder"),
    ],
)
def test_grids_that_cannot_be(world: Path, tmp_path: Path, more: list[str], what: str, capsys: Printed) -> None:
    code, _, errors = run(words_of(world, tmp_path / "grid", *more), capsys)
    assert code == 2, errors
    assert what in errors


@pytest.mark.parametrize("record", ["[" * 100_000, "[]", '{"done": 1}'], ids=["deep", "list", "number"])
def test_what_is_no_record_of_a_grid_is_refused(world: Path, tmp_path: Path, record: str, capsys: Printed) -> None:
    place = tmp_path / "grid" / "A0.25"
    place.mkdir(parents=True)
    (place / "point.json").write_text(record)
    code, _, errors = run(words_of(world, tmp_path / "grid"), capsys)
    assert code == 2 and "is no record of a grid" in errors


def test_letters_without_grid_are_refused(world: Path, tmp_path: Path, capsys: Printed) -> None:
    words = [word for word in words_of(world, tmp_path / "x.safetensors") if word != "--grid"]
    code, _, errors = run(words, capsys)
    assert code == 2 and "A=0.25,0.75 means nothing without --grid" in errors
    assert not list(tmp_path.iterdir())
