"""Each thing that can end an attempt, done by a real child: named, recovered from, or stopped as said."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from plain_runs import HELPERS, make_run, misbehave, train

from kohaku_wrap.cli import program
from kohaku_wrap.errors import EXIT_TRAINER_FAILED
from kohaku_wrap.locks import hold_lock
from kohaku_wrap.training.records.attempts import Attempt, list_attempts
from kohaku_wrap.training.records.bad_steps import BadSteps, NonFiniteLoss, TooManyBadSteps
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.states import DiskFull, list_states
from kohaku_wrap.training.starting.launch import Launch
from kohaku_wrap.training.starting.resume import begin_attempt, plan_resume
from kohaku_wrap.training.supervising import watch
from kohaku_wrap.training.supervising.ends import read_end
from kohaku_wrap.training.supervising.hooks import Hook
from kohaku_wrap.training.supervising.processes import list_processes
from kohaku_wrap.training.supervising.status import read_status
from kohaku_wrap.training.supervising.stop_signals import StopSignals
from kohaku_wrap.training.supervising.supervise import Loggers, RunStopped, TrainerFailed, await_orphans, supervise_run
from kohaku_wrap.training.supervising.watch import WatchOptions, start_launcher
from kohaku_wrap.training.verifying.verify import verify_run

NewRun = Callable[..., Run]


def weights(run: Run) -> bytes:
    return (run.checkpoints / f"{run.name}.safetensors").read_bytes()


def ends(run: Run) -> list[str]:
    return [end.kind for attempt in list_attempts(run) if (end := read_end(attempt))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run that nothing happened to."""
    run = make_run(tmp_path_factory.mktemp("whole") / "runs" / "r")
    train(run)
    return weights(run)


def test_trains_to_the_end(new_run: NewRun, whole: bytes) -> None:
    run = new_run()
    report, events = train(run)
    assert report.optimizer_step == run.lock.total_optimizer_steps
    assert events[0].kind == "start" and events[-1].kind == "finish"
    assert ends(run) == ["finished"] and weights(run) == whole
    assert [step for step, _ in list_states(run.states)] == [6, 10, 12]
    assert verify_run(run).is_proved


def test_a_look_whether_the_lock_is_free_stops_nothing(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, looks = new_run(), ["a status that holds it for a moment"]

    def hold(path: Path) -> int | None:
        path.touch()
        return None if looks and looks.pop() else hold_lock(path)

    monkeypatch.setattr(watch, "hold_lock", hold)
    report, _ = train(run)
    assert not looks and report.optimizer_step == run.lock.total_optimizer_steps


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"crash": True, "at": 3}, "crash"),
        ({"die": "step", "at": 3}, "crash"),
        ({"die": "saving"}, "crash"),
        ({"memory": True, "at": 3}, "out-of-memory"),
        ({"exit_0": True, "at": 3}, "exited-early"),
        ({"hang": "start-up"}, "hang"),
        ({"hang": "step", "at": 3}, "hang"),
        ({"hang": "sampling"}, "hang"),
        ({"hang": "saving"}, "hang"),
        ({"nan_loss": 5}, "non-finite-loss"),
        ({"nan_latents": 3}, "nan-latents"),
    ],
    ids=lambda each: json.dumps(each) if isinstance(each, dict) else each,
)
def test_is_named_and_recovered_from(new_run: NewRun, whole: bytes, fault: dict[str, Any], kind: str) -> None:
    run = new_run()
    misbehave(run, attempt_1=fault)
    phase = fault.get("hang", "")
    patience_seconds = 6.0 if phase == "start-up" else 2.0
    _, events = train(run, restarts=1, timeouts_seconds={phase: patience_seconds} if phase else {})
    assert ends(run) == [kind, "finished"]
    assert weights(run) == whole
    crash = next(event for event in events if event.kind == "crash")
    assert kind in crash.message
    if phase:
        assert f"in {phase}" in crash.message
        assert "in hang" in (run.attempts / "1" / "rank-000.log").read_text(), "the stacks of the hang"
    assert not list_processes(run)
    proof = verify_run(run)
    assert proof.is_proved and proof.is_finished and proof.attempts == (1 if phase == "start-up" else 2)
    told = json.loads(CliRunner().invoke(program, ["status", str(run.folder), "--json"]).stdout)
    assert [attempt["end"] for attempt in told["attempts"]] == [kind, "finished"]
    assert told["condition"] == "finished" and kind in told["last_error"]


def test_a_process_that_does_not_end_after_its_last_word_is_ended(new_run: NewRun, whole: bytes) -> None:
    run = new_run()
    misbehave(run, every={"hang": "end"})
    train(run, ending_seconds=1.0)
    assert ends(run) == ["finished"] and weights(run) == whole
    assert not list_processes(run)


def test_a_failure_at_the_same_step_stops_at_the_third(new_run: NewRun) -> None:
    run = new_run()
    misbehave(run, every={"crash": True, "at": 3})
    with pytest.raises(TrainerFailed) as failed:
        train(run, restarts=9)
    assert failed.value.exit_code == EXIT_TRAINER_FAILED
    assert ends(run) == ["crash"] * 3
    assert "3 failures after the same optimizer step 3" in failed.value.message
    assert "a tensor was not what it should be" in failed.value.message
    assert "rank-000.log" in failed.value.message


def test_an_unreadable_image_is_not_tried_again(new_run: NewRun) -> None:
    run = new_run()
    misbehave(run, every={"fail": "bad-image", "at": 3})
    with pytest.raises(TrainerFailed) as failed:
        train(run, restarts=9)
    assert ends(run) == ["bad-image"]
    assert "/images/0003/3.png" in failed.value.message
    assert "--allow bad-images" in failed.value.next_step


def test_no_substitute_is_promised_for_the_trainers_own_dataset(new_run: NewRun) -> None:
    run = new_run(run={"data": "sd-scripts"})
    misbehave(run, every={"fail": "bad-image", "at": 3})
    with pytest.raises(TrainerFailed) as failed:
        train(run)
    assert "--allow" not in failed.value.next_step and "Fix the image" in failed.value.next_step


def test_hooks_tell_the_story(new_run: NewRun) -> None:
    run = new_run()
    misbehave(run, attempt_1={"crash": True, "at": 3})
    train(run, restarts=1, hook='echo "$KWRAP_EVENT $KWRAP_OPTIMIZER_STEP" >> events.txt')
    lines = (run.folder / "events.txt").read_text().splitlines()
    assert lines[:3] == ["start 0", "state 2", "crash 3"]
    assert lines[3] == "start 2" and lines[-1] == "finish 12"


def test_a_hook_that_asks_at_the_start_sees_the_run_running(new_run: NewRun) -> None:
    run = new_run()
    status = f'"{sys.executable}" -P -m kohaku_wrap status "$KWRAP_RUN_FOLDER" --json > status.json'
    train(run, hook=f'if [ "$KWRAP_EVENT" = start ]; then {status}; fi')
    assert json.loads((run.folder / "status.json").read_text())["condition"] == "running"


def test_a_broken_hook_stops_nothing(new_run: NewRun) -> None:
    run = new_run()
    _, events = train(run, hook="echo no route >&2; exit 7")
    assert any(event.kind == "note" and "exit code 7" in event.message for event in events)
    assert ends(run) == ["finished"]


def test_pauses_double_up_to_the_longest_however_many_there_were() -> None:
    assert [WatchOptions().pause_before(restart) for restart in (1, 2, 7, 5000)] == [10.0, 20.0, 600.0, 600.0]


def test_a_hook_that_leaves_a_process_behind_holds_up_nothing(new_run: NewRun) -> None:
    troubles: list[str] = []
    begun = time.monotonic()
    Hook("echo no route >&2; sleep 20 & exit 7", new_run(), troubles.append).call("start", "", 0)
    assert time.monotonic() - begun < 10
    assert troubles == ["the hook command ended with exit code 7 on start: no route"]


def test_no_word_of_a_hook_and_no_loss_of_its_folder_stops_a_run(new_run: NewRun) -> None:
    run, troubles = new_run(), list[str]()
    Hook("printf 'kein Z\\374ri' >&2; exit 7", run, troubles.append).call("start", "", 0)
    Hook("true", Run(run.folder / "gone"), troubles.append).call("crash", "", 3)
    Hook("true", run, troubles.append).call("crash", "the header is \0", 3)
    assert [text.split(":")[0] for text in troubles] == [
        "the hook command ended with exit code 7 on start",
        "the hook command could not be started on crash",
        "the hook command could not be started on crash",
    ]


def start_supervisor(run: Run) -> subprocess.Popen[bytes]:
    """A supervisor in a process of its own, as `kwrap train` is."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from plain_runs import train; from pathlib import Path;"
        "from kohaku_wrap.training.records.folder import Run; from kohaku_wrap.errors import KwrapError\n"
        "try: train(Run(Path(sys.argv[2])))\n"
        "except KwrapError as error: sys.exit(error.exit_code)"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(HELPERS), str(run.folder)])


def wait_for_step(run: Run, step: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if run.metrics.exists() and f'"optimizer_step": {step},' in run.metrics.read_text():
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} never came")


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def log_lines(attempt: Attempt) -> list[str]:
    return [line for path in attempt.folder.glob("*.log") for line in path.read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_state_and_ends(new_run: NewRun, whole: bytes, number: int) -> None:
    run = new_run()
    # A signal to all processes ends the launcher with another code.
    misbehave(run, attempt_1={"seconds_per_step": 0.3, "exit_code": number == signal.SIGTERM})
    supervisor = start_supervisor(run)
    wait_for_step(run, 3)
    supervisor.send_signal(number)
    assert supervisor.wait(30) == 130
    said = (run.folder / "supervisor.log").read_text()
    assert "stop: finishing the optimizer step (a step takes about 1 s) and saving a state" in said
    assert ends(run) == ["stopped"]
    stopped_at = read_end(list_attempts(run)[0]).optimizer_step  # type: ignore[union-attr]
    assert stopped_at in [step for step, _ in list_states(run.states)]
    train(run)
    assert weights(run) == whole
    report = verify_run(run)
    assert report.is_proved and not report.repeats
    assert [step for step, _ in list_states(run.states)] == [6, 10, 12]


def test_a_second_signal_ends_at_once(new_run: NewRun, whole: bytes) -> None:
    run = new_run()
    misbehave(run, attempt_1={"hang": "step", "at": 3})
    supervisor = start_supervisor(run)
    # After its metrics are there the worker still looks for a stop: only a hang never answers the first signal.
    wait_until(lambda: any("hangs" in line for each in list_attempts(run) for line in log_lines(each)))
    supervisor.send_signal(signal.SIGINT)
    wait_until(list_attempts(run)[0].stop_file.exists)
    assert supervisor.poll() is None
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(30) == 130
    assert ends(run) == ["killed"] and not list_processes(run)
    train(run)
    assert weights(run) == whole


def test_workers_of_a_killed_supervisor_save_and_end(new_run: NewRun, whole: bytes) -> None:
    run = new_run()
    misbehave(run, attempt_1={"seconds_per_step": 0.3})
    supervisor = start_supervisor(run)
    wait_for_step(run, 3)
    supervisor.kill()
    supervisor.wait()
    _, events = train(run)
    assert any("without its supervisor" in event.message for event in events)
    assert weights(run) == whole
    report = verify_run(run)
    assert report.is_proved and report.attempts == 2 and not report.repeats


def test_a_signal_leaves_workers_of_a_killed_supervisor_to_their_work(new_run: NewRun, whole: bytes) -> None:
    run = new_run()
    misbehave(run, attempt_1={"seconds_per_step": 0.5})
    supervisor = start_supervisor(run)
    wait_for_step(run, 3)
    supervisor.kill()
    supervisor.wait()
    stop = StopSignals()
    stop.count = 1
    with pytest.raises(RunStopped, match="stopped while an earlier attempt saves a state"):
        await_orphans(run, stop, lambda event: None)
    train(run)
    assert weights(run) == whole
    report = verify_run(run)
    assert report.is_proved and not report.repeats


def test_a_signal_before_the_launch_is_obeyed(new_run: NewRun, whole: bytes) -> None:
    """Such as while a state is verified."""
    run = new_run()

    def begin() -> tuple[Attempt, Launch]:
        signal.raise_signal(signal.SIGINT)
        return begin_attempt(plan_resume(run))

    with pytest.raises(RunStopped, match="stopped before its first step"):
        supervise_run(run, begin, begin, WatchOptions(), lambda event: None)
    assert ends(run) == ["stopped"] and not run.metrics.exists()
    train(run)
    assert weights(run) == whole


def test_two_supervisors_do_not_train_one_run(new_run: NewRun) -> None:
    run = new_run()
    misbehave(run, attempt_1={"seconds_per_step": 0.3})
    supervisor = start_supervisor(run)
    wait_for_step(run, 1)
    result = CliRunner().invoke(program, ["resume", str(run.folder)])
    assert "another kwrap is training it" in str(result.exception)
    told = json.loads(CliRunner().invoke(program, ["status", str(run.folder), "--json"]).stdout)
    assert told["condition"] == "running" and told["phase"] == "step"
    supervisor.send_signal(signal.SIGTERM)
    supervisor.wait(30)


def test_a_full_disk_pauses_and_goes_on(new_run: NewRun, whole: bytes, mount_disk: Callable[[Path, int], None]) -> None:
    run = new_run()
    misbehave(run, attempt_1={"state_blocks": 40_000})
    mount_disk(run.states, 14)
    filler = run.states / "filler"
    filler.write_bytes(bytes(9 << 20))
    supervisor = start_supervisor(run)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        told = json.loads(CliRunner().invoke(program, ["status", str(run.folder), "--json"]).stdout)
        if "the disk is full" in told["phase"]:
            break
        time.sleep(0.1)
    assert "the disk is full" in told["phase"]
    filler.unlink()
    supervisor.wait(60)
    assert weights(run) == whole
    assert not [path for path in run.states.iterdir() if path.name.startswith(".")]


@pytest.fixture
def small_run(tmp_path: Path, mount_disk: Callable[[Path, int], None]) -> Run:
    """A run on a disk of 4 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount_disk(folder, 4)
    return make_run(folder / "runs" / "r")


def test_a_disk_filled_to_the_last_byte_is_waited_out(small_run: Run, whole: bytes) -> None:
    """No room for a record, a metric, a line of a log or a sign of life."""
    misbehave(small_run, attempt_1={"fill_disk": True, "at": 3})
    supervisor = start_supervisor(small_run)
    try:
        wait_for_step(small_run, 3)
        deadline = time.monotonic() + 20
        while not any(beat.phase == "paused" for beat in list_attempts(small_run)[0].heartbeats()):
            assert time.monotonic() < deadline and supervisor.poll() is None
            time.sleep(0.05)
        (small_run.folder / "filler").unlink()
        assert supervisor.wait(30) == 0
    finally:
        supervisor.kill()
        supervisor.wait()
    assert weights(small_run) == whole and ends(small_run) == ["finished"]
    assert verify_run(small_run).is_proved and verify_run(small_run).attempts == 1


def test_a_disk_that_stays_full_ends_a_run_with_the_way_on(small_run: Run, whole: bytes) -> None:
    misbehave(small_run, attempt_1={"fill_disk": True, "at": 3, "patience_seconds": 0.3})
    with pytest.raises(TrainerFailed, match=r"disk-full: .*the disk is full") as failed:
        train(small_run)
    assert failed.value.next_step.startswith("Free some space, then: kwrap resume ")
    with pytest.raises(DiskFull, match=r"(attempts/2|site\.json).*the disk is full") as refused:
        train(small_run)
    assert refused.value.next_step == f"Free some space, then: kwrap resume {small_run.folder}"
    (small_run.folder / "filler").unlink()
    train(small_run)
    assert weights(small_run) == whole and verify_run(small_run).is_proved


def test_steps_skipped_for_ever_end_the_run_and_are_not_begun_anew(new_run: NewRun) -> None:
    """The count lives in the states: a later attempt goes on with it, a restart does not follow."""
    run = new_run(states={"keep": 9})
    misbehave(run, every={"skip": list(range(4, 9))})
    with pytest.raises(TrainerFailed, match="5 optimizer steps in a row, 4 to 8, were skipped") as failed:
        train(run, restarts=5, bad_steps=5)
    assert failed.value.end.kind == "non-finite-loss" and failed.value.exit_code == 3
    assert failed.value.attempt.number == 1
    assert f"kwrap resume {run.folder} --step 2" in failed.value.next_step
    # From the state of step 6, where three had been skipped in a row.
    with pytest.raises(TrainerFailed, match="5 optimizer steps in a row, 4 to 8"):
        train(run, restarts=5, bad_steps=5)
    assert [attempt.number for attempt in list_attempts(run)] == [1, 2]
    status = read_status(run)
    assert (status.skipped_steps, status.non_finite_steps, status.bad_steps_in_a_row) == (5, 5, 5)
    report, _ = train(run, bad_steps=0)
    assert report.optimizer_step == 12


@pytest.mark.parametrize(
    ("step", "in_a_row", "given", "ends"),
    [
        (1000, 49, None, False), (1000, 50, None, True), (1001, 9, None, False), (1001, 10, None, True),
        (60, 59, 0, False), (60, 3, 3, True), (5000, 10, 11, False), (1001, 40, None, True),
    ],
)  # fmt: skip
def test_how_many_bad_steps_end_an_attempt(
    new_run: NewRun, step: int, in_a_row: int, given: int | None, ends: bool
) -> None:
    attempt = Attempt(new_run(), 1, 1, 4, 0, 0, None, bad_steps=given)
    counts = BadSteps(skipped=in_a_row, in_a_row=in_a_row)
    if ends:
        with pytest.raises(TooManyBadSteps):
            counts.check_step(attempt, step, math.nan, is_skipped=True)
    else:
        counts.check_step(attempt, step, math.nan, is_skipped=True)
        with pytest.raises(NonFiniteLoss, match="is nan"):
            counts.check_step(attempt, step, math.nan, is_skipped=False)
        accepted = dataclasses.replace(attempt, allow=frozenset({"non-finite-loss"}))
        counts.check_step(accepted, step, math.nan, is_skipped=False)


def test_variables_of_the_shell_for_accelerate_have_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    monkeypatch.setenv("KEPT", "yes")
    names = ("KEPT", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    program = f"import os; print({{name: os.environ.get(name) for name in {names}}})"
    launch = Launch((sys.executable, "-c", program), {}, tmp_path)
    assert start_launcher(launch, tmp_path / "log").wait() == 0
    assert (tmp_path / "log").read_text() == "{'KEPT': 'yes', 'ACCELERATE_GRADIENT_ACCUMULATION_STEPS': None}\n"


def test_a_logging_process_whose_own_log_is_gone_ends_no_training(new_run: NewRun) -> None:
    told: list[str] = []
    loggers = Loggers(Attempt(new_run(), 1, 1, 1, 0, 0, None), told.append)
    loggers.children["wandb"] = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    loggers.children["wandb"].wait()
    loggers.look()
    assert "no longer logged to wandb: the process ended with code 3" in told[0]
