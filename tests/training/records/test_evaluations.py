"""What validation keeps in a run: whole files, read back to the bit, left behind by a resume, shown by the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from plain_runs import train
from reading_pages import make_page
from written_ledgers import hold_out

from kohaku_wrap.cli import program
from kohaku_wrap.training.records.evaluations import (
    Evaluation,
    evaluation_file,
    read_evaluation,
    read_evaluations,
    read_last_evaluation,
    write_evaluation,
)
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.starting.resume import begin_attempt, plan_resume

NewRun = Callable[..., Run]
POSTS = np.array([3, 10, 17], dtype=np.int64)
ABOUT = {"key": "k", "attempt": 1, "processes": 1, "engine": "builtin", "device": "cpu", "dtype": "no", "batch": 4,
         "torch": "2"}  # fmt: skip


def measured(step: int, loss: float) -> Evaluation:
    """Losses of three posts at two time steps around a mean, each post with a difficulty of its own."""
    losses = np.array([[0.1, 0.3], [0.2, 0.4], [1 / 3, 0.5]]) + loss
    return Evaluation(step, POSTS, (250, 750), losses, ABOUT)


def test_an_evaluation_comes_back_to_the_bit(new_run: NewRun) -> None:
    run = new_run()
    before = measured(4, 0.1)
    before.losses[1] = np.nan
    write_evaluation(run, before)
    again = read_evaluation(evaluation_file(run, 4))
    assert again.losses.tobytes() == before.losses.tobytes() and again.timesteps == (250, 750)
    assert again.posts.tolist() == POSTS.tolist() and dict(again.about)["key"] == "k"
    assert again.loss == pytest.approx((0.2 + 0.4 + 1 / 3 + 0.6 + 0.1) / 4), "a post without a number counts at no step"


def test_files_that_are_none_are_left_out(new_run: NewRun) -> None:
    run = new_run()
    for step in (2, 3):
        write_evaluation(run, measured(step, 0.2))
    evaluation_file(run, 4).write_bytes(b"torn")
    pq.write_table(pa.table({"id": [1]}), evaluation_file(run, 6))
    newer = pq.read_table(evaluation_file(run, 2)).replace_schema_metadata({b"kwrap": b'{"format": 2}'})
    pq.write_table(newer, evaluation_file(run, 8))
    evaluation_file(run, 10).write_bytes(evaluation_file(run, 2).read_bytes())
    (run.evaluations / "notes.txt").write_text("mine")
    assert [each.optimizer_step for each in read_evaluations(run)] == [2, 3]
    last = read_last_evaluation(run)
    assert last is not None and last.optimizer_step == 3
    with pytest.raises(ValueError, match="format 2, and this kwrap reads 1"):
        read_evaluation(evaluation_file(run, 8))


def test_a_resume_leaves_later_ones_behind(new_run: NewRun) -> None:
    run = new_run()
    train(run)
    for step in (0, 2, 4, 6, 12):
        write_evaluation(run, measured(step, 0.2))
    begin_attempt(plan_resume(run, step=6))
    assert [each.optimizer_step for each in read_evaluations(run)] == [0, 2, 4, 6]
    assert (run.abandoned / "before-attempt-2" / "validation" / "optimizer-step-00000012.parquet").is_file()


def test_commands_and_page_show_them(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run()
    hold_out(run, *POSTS.tolist())
    train(run)
    asked = ["evaluate", "loss", str(run.folder)]
    nothing = CliRunner().invoke(program, asked)
    assert "nothing was measured yet" in str(nothing.exception)
    for step, loss in ((0, 0.4), (6, 0.3), (12, 0.25)):
        write_evaluation(run, measured(step, loss))
    status = json.loads(CliRunner().invoke(program, ["status", str(run.folder), "--json"]).stdout)
    assert status["held_out_optimizer_step"] == 12 and status["held_out_loss"] == pytest.approx(0.25 + 11 / 36)
    assert "after step 12" in CliRunner().invoke(program, ["status", str(run.folder)]).stdout
    shown = CliRunner().invoke(program, [*asked, "--out", str(tmp_path / "out"), "--json"])
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.stdout)["result"]
    assert result == json.loads((tmp_path / "out" / "loss.json").read_text(encoding="utf-8"))
    assert [each["optimizer_step"] for each in result["models"]] == [0, 6, 12]
    assert result["models"][0]["by_timestep"] == {"250": pytest.approx(0.4 + 19 / 90), "750": pytest.approx(0.8)}
    assert result["models"][0]["by_group"]["year"] == {"newest": {"posts": 3, "loss": pytest.approx(0.4 + 11 / 36)}}
    pairs = [(pair["from"].split()[-1], pair["to"].split()[-1]) for pair in result["pairs"]]
    assert pairs == [("0", "6"), ("6", "12"), ("0", "12")]
    assert [pair["difference"]["high"] for pair in result["pairs"]] == pytest.approx([-0.1, -0.05, -0.15])
    some = json.loads(CliRunner().invoke(program, [*asked, "--checkpoints", "0,12", "--json"]).stdout)["result"]
    assert [each["optimizer_step"] for each in some["models"]] == [0, 12] and len(some["pairs"]) == 1
    for words, what in (
        (["--checkpoints", "5"], "nothing was measured at step 5"),
        (["--checkpoints", "x"], "not optimizer steps"),
        (["--images", "images"], "Add --out FOLDER"),
    ):
        refused = CliRunner().invoke(program, [*asked, *words])
        assert what in f"{refused.exception}\n{getattr(refused.exception, 'next_step', '')}"
    laid_over = CliRunner().invoke(program, [*asked, "--against", str(tmp_path / "out" / "loss.json"), "--json"])
    assert len(json.loads(laid_over.stdout)["result"]["pairs"]) == 15
    page = make_page(run)
    chart = page.data["runs"][0]["charts"]["held_out"]
    assert [piece["label"] for piece in chart] == ["time step 250", "time step 750", "mean"]
    assert chart[0]["x"]["steps"] == [0, 6, 12] and chart[2]["value"][0] == pytest.approx(0.705556)
