"""`kwrap status` before, during and after; what it says of damage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result
from plain_runs import KWRAP, misbehave, train

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
    (second.lock_file).write_text("[run")
    shown = call()
    assert "note: left out" in shown.output and "second/run.lock.toml: not TOML" in shown.output
    assert "optimizer step 12 of 12" in shown.output
    first.metrics.write_bytes(b"[]\n\xff\n")
    assert "finished, optimizer step 12 of 12 (100.0 %)" in call(first.name).output
    monkeypatch.chdir(first.folder)
    assert "no run in" in str(call().exception)


def test_a_stop_that_was_asked_for_says_what_it_waits_for(new_run: NewRun) -> None:
    run = new_run()
    misbehave(run, every={"seconds_per_step": 4})
    command = [*KWRAP, "resume", str(run.folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        await_true(lambda: run.metrics.exists())
        assert "asked for" not in call(run.folder).stdout
        process.send_signal(signal.SIGINT)
        await_true(lambda: (run.attempts / "1" / "stop").exists())
        told = call(run.folder).stdout
        assert "asked for; waits for the optimizer step to end, then a state" in " ".join(told.split())
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    assert "asked for" not in call(run.folder).stdout


def await_true(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_time_beside_the_steps_counts_to_no_rate(new_run: NewRun) -> None:
    run = new_run()
    train(run)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    lines[3] |= {"saving_seconds": 90.0, "sampling_seconds": 30.0}
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = " ".join(call(run.folder).stdout.split())
    assert "rate 0.01 s per optimizer step" in told
    assert "beside the steps sampling 30 s, saving 1 min 30 s" in told


def test_two_runs_are_compared(new_run: NewRun) -> None:
    run, other = new_run("a"), new_run("b", values={"unet_lr": 0.5})
    train(run)
    train(other)
    told = " ".join(call("--compare", run.folder, other.folder).stdout.split())
    assert "unet_lr not set | 0.5" in told and "mean loss by step" in told and "seed" not in told
    document = json.loads(call("--compare", run.folder, other.folder, "--json").stdout)
    assert document["options"] == [{"option": "unet_lr", "a": None, "b": 0.5}]
    assert document["losses"][-1]["optimizer_step"] == run.lock.total_optimizer_steps
    assert document["seconds_per_step"]["a"] > 0 and "time of a step" in told


def test_a_run_without_a_step_has_no_time_of_one(new_run: NewRun) -> None:
    run, other = new_run("a"), new_run("b")
    train(run)
    document = json.loads(call("--compare", run.folder, other.folder, "--json").stdout)
    assert document["seconds_per_step"]["a"] > 0
    assert document["seconds_per_step"]["b"] is None
