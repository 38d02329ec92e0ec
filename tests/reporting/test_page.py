"""`kwrap report`: what the page says of runs, held against what the other commands say, without a browser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plain_runs import misbehave, train
from reading_pages import HOSTILE, Page, make_page, run_json

from kohaku_wrap.reporting.charts import Range, choose_ticks, show_number
from kohaku_wrap.reporting.curves import BINS, cut_pieces, tabulate
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.supervising.supervise import TrainerFailed

NewRun = Callable[..., Run]


@pytest.fixture
def crashed_and_resumed(new_run: NewRun) -> Run:
    """Twelve optimizer steps: a crash after 7, with states at 2, 4, 6, then the rest."""
    run = new_run("story", epochs=2)
    misbehave(run, attempt_1={"crash": True, "at": 7})
    train(run, restarts=1)
    return run


def test_the_page_tells_of_crash_resume_and_repeated_steps(crashed_and_resumed: Run) -> None:
    run = crashed_and_resumed
    first, second = run_json("status", run.folder)["attempts"]
    assert first["optimizer_step"] > second["start_optimizer_step"] > 0
    page = make_page(run)
    told = " ".join(page.text.split())
    again = (
        f"optimizer steps {second['start_optimizer_step'] + 1} to {first['optimizer_step']} of attempt 1 do not count"
    )
    assert again in told
    assert f"attempt 2 from the state of step {second['start_optimizer_step']}" in told
    assert f"finished: all {second['optimizer_step']} optimizer steps are done" in told
    assert f"not verified: kwrap verify {run.folder}" in told
    pieces = page.data["runs"][0]["charts"]["loss"]
    assert [(each["attempt"], each["kept"]) for each in pieces] == [(1, True), (1, False), (2, True)]
    assert pieces[1]["x"]["steps"] == list(range(second["start_optimizer_step"] + 1, first["optimizer_step"] + 1))


def test_numbers_are_those_of_status_and_verify(crashed_and_resumed: Run) -> None:
    run = crashed_and_resumed
    verify = run_json("verify", run.folder)
    page = make_page(run)
    status = run_json("status", run.folder)
    held = page.data["runs"][0]
    changing = ("disk_free_bytes", "schema_version", "command")
    assert {key: value for key, value in held["status"].items() if key != "disk_free_bytes"} == {
        key: value for key, value in status.items() if key not in changing
    }
    assert held["verify"] == {key: value for key, value in verify.items() if key not in changing}
    assert held["verification"]["standing"] == "proved"
    assert f"proved up to step {verify['optimizer_steps']} by verify on " in page.text
    assert all(check["detail"] in page.text for check in verify["checks"] if not check["is_looked_at"])


@pytest.mark.parametrize(
    ("high", "whole", "shown"),
    [
        (12, True, ["0", "5", "10"]),
        (12, False, ["0", "2.5", "5", "7.5", "10"]),
        (2, True, ["0", "1", "2"]),
        (0.2, True, ["0"]),
        (20_354, True, ["0", "5,000", "10,000", "15,000", "20,000"]),
    ],
)
def test_an_axis_of_steps_has_no_half_ones(high: float, whole: bool, shown: list[str]) -> None:
    assert [show_number(tick) for tick in choose_ticks(Range(0, high), whole=whole)] == shown


@pytest.mark.parametrize("axis", ["steps", "images", "hours"])
def test_curves_are_drawn_where_the_metrics_say(crashed_and_resumed: Run, axis: str) -> None:
    page = make_page(crashed_and_resumed)
    lines = read_metrics(crashed_and_resumed)
    pieces = page.data["runs"][0]["charts"]["loss"]
    spots = [
        spot
        for each in sorted(pieces, key=lambda each: bool(each["kept"]))
        for spot in zip(each["x"][axis], each["value"], strict=True)
    ]
    drawn = page.drawn_points("loss", axis)
    assert len(drawn) == len(spots) > len(lines)
    # The plane has a thousand units on one side, two hundred on the other, in tenths and hundredths.
    width, height = max(x for x, _ in spots), max(max(each["high"]) for each in pieces)
    for (x, y), (real_x, real_y) in zip(drawn, spots, strict=True):
        assert math.isclose(x, real_x, abs_tol=width / 5000) and math.isclose(y, real_y, abs_tol=height / 5000)
    kept = [spot for each in pieces if each["kept"] for spot in zip(each["x"]["steps"], each["low"], strict=True)]
    assert kept == [(line["optimizer_step"], pytest.approx(line["loss"], rel=1e-5)) for line in lines]


def test_a_result_of_verify_holds_for_the_ledger_that_it_read(new_run: NewRun) -> None:
    run = new_run("grows", epochs=2)
    misbehave(run, attempt_1={"crash": True, "at": 5})
    with pytest.raises(TrainerFailed):
        train(run)
    proved = run_json("verify", run.folder)["optimizer_steps"]
    start = run_json("status", run.folder)["states"][-1]["optimizer_step"]
    assert proved > start
    train(run)
    page = make_page(run)
    assert page.data["runs"][0]["verification"]["standing"] == "partly"
    assert f"verified up to step {start} on " in page.text and "the ledger grew since" in page.text
    ledger = sorted(run.ledger.iterdir())[0]
    data = bytearray(ledger.read_bytes())
    data[-1] ^= 1
    ledger.write_bytes(data)
    page = make_page(run)
    assert page.data["runs"][0]["verification"]["standing"] == "changed"
    assert f"not verified: the ledger's {ledger.name} is no longer what was verified" in page.text
    assert run_json("verify", run.folder)["proved"] is False
    page = make_page(run)
    assert page.data["runs"][0]["verification"]["standing"] == "faults" and "NOT proved" in page.text


def test_hostile_names_stay_text(new_run: NewRun) -> None:
    from kohaku_wrap.formats.toml_text import toml_text

    run = new_run(HOSTILE)
    tables = dict(run.lock.tables)
    tables["run"] = {**tables["run"], "template": "</script><script>alert(1)</script>", "dataset": "{{ 7 * 7 }}"}
    tables["values"] = {**tables["values"], HOSTILE: "</textarea><b>"}
    run.lock_file.write_text(toml_text(tables), encoding="utf-8")
    run.forget_lock()
    (run.folder / "evaluation").mkdir()
    (run.folder / "evaluation" / f"{HOSTILE}.json").write_text(json.dumps({"name": "</script>"}))
    train(run)
    page = make_page(run)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and "b" not in tags
    assert [attributes for tag, attributes in page.elements if tag == "img"] == [{"alt": ""}]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "</script><script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text
    assert page.data["runs"][0]["name"] == run.name
    assert "‮" not in page.text and "\\u202e" in page.text


def test_the_policy_names_the_scripts_and_styles_that_are_there(crashed_and_resumed: Run) -> None:
    import base64
    import hashlib

    make_page(crashed_and_resumed)
    text = (crashed_and_resumed.folder / "report.html").read_text(encoding="utf-8")
    elements = Page(crashed_and_resumed.folder / "report.html").elements
    policy = next(attributes["content"] or "" for _, attributes in elements if "http-equiv" in attributes)
    for tag in ("style", "script"):
        source = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert source
        digest = base64.b64encode(hashlib.sha256(source[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", text)


def test_thinned_curves_keep_every_spike() -> None:
    lines: list[dict[str, Any]] = [
        {"optimizer_step": step, "loss": 0.1, "seconds": 1.0, "images": 4, "attempt": 1} for step in range(1, 20_355)
    ]
    for step, loss in ((7, 9.0), (12_345, -3.0), (20_354, 5.0), (500, "nan")):
        lines[step - 1]["loss"] = loss
    (piece,) = cut_pieces(tabulate(lines, [], 4), "loss", "loss", 0)
    assert len(piece.value) <= BINS
    assert sorted(piece.high)[-2:] == [5.0, 9.0] and min(piece.low) == -3.0
    assert piece.x["steps"][-1] == 20_354 and piece.x["images"][-1] == 4 * 20_354
    at = min(at for at, high in enumerate(piece.high) if high == 9.0)
    assert piece.x["steps"][at] >= 7 > (piece.x["steps"][at - 1] if at else 0)


def test_two_runs_lie_over_each_other_with_the_options_that_differ(new_run: NewRun, tmp_path: Path) -> None:
    one, two = new_run("one"), new_run("two", values={"unet_lr": 3e-4})
    for run in (one, two):
        train(run)
    page = make_page(one, two, out=tmp_path / "both.html")
    assert [run["name"] for run in page.data["runs"]] == ["one", "two"]
    assert page.data["options_that_differ"] == [{"option": "unet_lr", "values": [None, 3e-4]}]
    drawn = {attributes["data-run"] for _, attributes in page.elements if "data-run" in attributes}
    assert drawn == {"0", "1"} and "0.0003" in page.text


def test_a_run_that_has_not_begun_has_a_page(new_run: NewRun) -> None:
    page = make_page(new_run("new"))
    assert "not begun at optimizer step 0 of" in page.text and "No optimizer step is recorded yet." in page.text


def test_one_page_over_all_runs_names_those_that_cannot_be_read(new_run: NewRun, tmp_path: Path) -> None:
    train(new_run("done"))
    new_run(HOSTILE)
    (new_run("broken").folder / "run.lock.toml").write_text("= not TOML")
    page = Page(Path(run_json("report", "--index", tmp_path / "runs")["page"]))
    told = {each["name"]: each["condition"] for each in page.data["index"]}
    assert told == {"done": "finished", HOSTILE: "new"}
    assert "broken: " in page.text and "img" not in [tag for tag, _ in page.elements]


def test_watching_ends_with_the_run(crashed_and_resumed: Run) -> None:
    page = Path(run_json("report", crashed_and_resumed.folder, "--watch")["page"])
    assert 'data-reload="0"' in page.read_text(encoding="utf-8")


def test_a_merged_file_shows_its_recipe_and_parents(tmp_path: Path) -> None:
    nested = {"sd_merge_recipe": {"formula": "x - y", "models": {"x": "1" * 64}}, "name": "p.safetensors"}
    recipe = {"type": "kwrap", "formula": HOSTILE, "models": {"a": "0" * 64}}
    metadata = {"sd_merge_recipe": json.dumps(recipe), "sd_merge_models": json.dumps({"0" * 64: nested})}
    header = json.dumps({"__metadata__": metadata}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    page = Page(Path(run_json("report", path)["page"]))
    assert [step["title"] for step in page.data["way"]] == ["Merge", "Merge of a parent"]
    assert "0" * 64 in page.text and "1" * 64 in page.text and "x - y" in page.text
    assert "img" not in [tag for tag, _ in page.elements]
