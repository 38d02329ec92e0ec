"""`kwrap status` before, during and after; what it says of damage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result
from plain_runs import misbehave, train

from kohaku_wrap.cli import program
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.states import state_folder
from kohaku_wrap.training.supervising.supervise import TrainerFailed

NewRun = Callable[..., Run]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(program, ["status", *(str(each) for each in arguments)], standalone_mode=False)


def test_a_new_run(new_run: NewRun) -> None:
    told = json.loads(call(new_run().folder, "--json").stdout)
    assert (told["condition"], told["optimizer_step"], told["total_optimizer_steps"]) == ("new", 0, 12)
    assert told["attempts"] == told["states"] == [] and told["loss"] is None


def test_a_failed_run_tells_its_story(new_run: NewRun) -> None:
    run = new_run()
    misbehave(run, every={"crash": True, "at": 5})
    with pytest.raises(TrainerFailed):
        train(run, restarts=1)
    (state_folder(run.states, 4) / "manifest.json").write_text("{}")
    os.truncate(state_folder(run.states, 2) / "weights.bin", 1)
    told = json.loads(call(run.folder, "--json").stdout)
    assert told["condition"] == "failed" and told["optimizer_step"] == 5 and told["epoch"] == 0
    assert told["loss"] == 0.2 and told["learning_rates"] == {"lr_unet": 1e-4}
    assert told["seconds_per_step"] == pytest.approx(0.01) and told["eta_seconds"] is None
    assert [(state["optimizer_step"], state["is_sealed"]) for state in told["states"]] == [(2, True), (4, False)]
    assert [(each["start_optimizer_step"], each["end"]) for each in told["attempts"]] == [(0, "crash"), (4, "crash")]
    assert told["last_error"].startswith("attempt 2: crash") and "no restart is left of 1" in told["last_error"]
    assert told["disk_free_bytes"] > 0 and told["disk_used_bytes"] > 0
    text = call(run.folder).output
    assert "4 (damaged)" in text and "failed" in text and f"kwrap resume {run.folder}" in text.replace("\n", "")


def test_a_run_that_skipped_most_steps_is_not_sent_to_a_resume(new_run: NewRun) -> None:
    """Another attempt from its last state would end the same way."""
    run = new_run()
    misbehave(run, every={"skip": [2, 3, 4, 5, 6, 8, 9, 10]})
    with pytest.raises(TrainerFailed, match="mostly-skipped"):
        train(run)
    advice = "Start a new run with lower rates, or with bf16 in place of fp16."
    told = call(run.folder)
    assert f"Next: {advice}" in told.output and "kwrap resume" not in told.output
    assert json.loads(call(run.folder, "--json").stdout)["advice"].startswith(advice)
    proof = CliRunner().invoke(program, ["verify", str(run.folder)], standalone_mode=False)
    assert proof.return_value == 1 and advice in proof.stderr and "kwrap resume" not in proof.output, proof.output


def test_several_runs_take_a_line_each(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = new_run("first"), new_run("second")
    train(first)
    monkeypatch.chdir(first.folder.parent.parent)
    text = call().output
    assert "finished, optimizer step 12 of 12 (100.0 %)" in text and "new, optimizer step 0 of 12" in text
    told = json.loads(call("--json").stdout)
    assert [each["run"] for each in told["runs"]] == ["first", "second"]
    assert json.loads(call(second.name, "--json").stdout)["folder"] == str(second.folder)
    assert "do not go together" in str(call("--watch", "--json").exception)
    monkeypatch.chdir(first.folder)
    assert "no run in" in str(call().exception)
