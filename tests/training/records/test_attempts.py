"""What supervisor and workers tell each other through an attempt's folder."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from kohaku_wrap.locks import hold_lock, is_lock_free
from kohaku_wrap.training.records import saving
from kohaku_wrap.training.records.attempts import (
    FORMAT,
    Attempt,
    BadAttempt,
    last_kept_steps,
    list_attempts,
    read_attempt,
    write_attempt,
)
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.saving import wait_for_room
from kohaku_wrap.training.records.signs import Failure
from kohaku_wrap.training.records.states import DiskFull
from kohaku_wrap.training.supervising.processes import end_processes, list_processes

NewRun = Callable[..., Run]


@pytest.fixture
def attempt(new_run: NewRun) -> Attempt:
    run = new_run()
    attempt = Attempt(run, 1, 2, 2, 3, 6, run.states / "optimizer-step-00000006", frozenset({"bad-images"}))
    write_attempt(attempt, {"OMP_NUM_THREADS": "1"})
    return attempt


def test_a_worker_reads_what_was_written(attempt: Attempt) -> None:
    environ = {"KWRAP_RUN": str(attempt.run.folder), "KWRAP_ATTEMPT": "1"}
    assert Attempt.load(environ) == attempt == list_attempts(attempt.run)[0]
    with pytest.raises(BadAttempt, match="do not name an attempt"):
        Attempt.load({})
    (attempt.folder / "attempt.json").write_text("{}")
    with pytest.raises(BadAttempt, match="cannot be read"):
        read_attempt(attempt.run, 1)


def test_signs_of_life_failures_and_results(attempt: Attempt) -> None:
    assert attempt.heartbeats() == [] and attempt.failures() == [] and attempt.result() is None
    attempt.beat(1, "saving", 8, 5)
    attempt.beat(0, "paused", 8, message="the disk is full")
    beats = attempt.heartbeats()
    assert [(beat.rank, beat.phase, beat.optimizer_step, beat.pid) for beat in beats] == [
        (0, "paused", 8, os.getpid()),
        (1, "saving", 8, os.getpid()),
    ]
    attempt.fail(Failure(1, "bad-image", "3.png", 8))
    assert attempt.failures()[0].message == "3.png"
    attempt.finish("stopped", 8)
    assert (attempt.result() or {})["outcome"] == "stopped"
    attempt.beat(0, "paused", 8, message="\N{GRINNING FACE}" * 1000)
    attempt.beat(0, "saving", 9)
    assert attempt.heartbeats()[0].optimizer_step == 9, "a long one is covered in any alphabet"
    (attempt.folder / "heartbeat-rank-000.json").write_text("{")
    assert [beat.rank for beat in attempt.heartbeats()] == [1], "one that is being written is left out"


def test_a_stop_is_asked_for_or_follows_the_supervisors_death(attempt: Attempt) -> None:
    lock = hold_lock(attempt.supervisor_lock)
    assert lock is not None and hold_lock(attempt.supervisor_lock) is None
    assert not attempt.stop_requested()
    attempt.request_stop()
    assert attempt.stop_requested()
    attempt.stop_file.unlink()
    os.close(lock)
    assert is_lock_free(attempt.supervisor_lock) and attempt.stop_requested()
    assert not is_lock_free(attempt.folder / "none")


def test_steps_that_still_count(new_run: NewRun) -> None:
    run = new_run()
    attempts = [Attempt(run, number, 1, 4, 0, start, None) for number, start in ((1, 0), (2, 8), (3, 4), (4, 6))]
    assert last_kept_steps(attempts) == {1: 4, 2: 4, 3: 6, 4: float("inf")}


def test_processes_are_found_by_their_run_and_ended(attempt: Attempt, tmp_path: Path) -> None:
    sleeper = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    environments = [
        {"KWRAP_RUN": str(attempt.run.folder), "KWRAP_ATTEMPT": "1"},
        {"KWRAP_RUN": str(attempt.run.folder), "KWRAP_ATTEMPT": "2"},
        {"KWRAP_RUN": str(tmp_path), "KWRAP_ATTEMPT": "1"},
    ]
    children = [
        subprocess.Popen(sleeper, env={**os.environ, **each}, stdout=subprocess.PIPE, start_new_session=True)
        for each in environments
    ]
    try:
        for child in children:
            assert child.stdout is not None and child.stdout.readline()
        assert list_processes(attempt.run, 1) == [children[0].pid]
        assert sorted(list_processes(attempt.run)) == sorted(child.pid for child in children[:2])
        end_processes(attempt.run)
        assert [child.wait(5) for child in children[:2]] == [-9, -9] and children[2].poll() is None
    finally:
        for child in children:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


def test_what_finds_no_room_is_written_later(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PAUSE_SECONDS", 0.01)
    refusals: list[Exception] = [OSError(errno.ENOSPC, "full"), DiskFull("states: the disk is full, 1 B free", "Free.")]
    told: list[str] = []

    def write() -> str:
        told.extend(beat.phase for beat in attempt.heartbeats())
        if refusals:
            raise refusals.pop()
        return "written"

    assert wait_for_room(attempt, write, 4, 8) == "written"
    assert told == ["saving"] * 2 and attempt.heartbeats()[0].micro_batch == 8
    refusals.append(OSError(errno.ENOSPC, "full"))
    with pytest.raises(DiskFull, match="the disk is full"), monkeypatch.context() as hurried:
        hurried.setattr(saving, "PATIENCE_SECONDS", 0.005)
        wait_for_room(attempt, write, 4)
    refusals += [OSError(errno.EIO, "broken")]
    with pytest.raises(OSError, match="broken"):
        wait_for_room(attempt, write, 4)


@pytest.mark.parametrize("number", [0, FORMAT + 1, "two", None, [2]])
def test_an_attempt_of_a_later_kwrap_is_refused(attempt: Attempt, number: object) -> None:
    path = attempt.folder / "attempt.json"
    document = json.loads(path.read_text())
    assert document["format"] == FORMAT
    path.write_text(json.dumps({**document, "format": number}))
    with pytest.raises(BadAttempt, match=f"this kwrap reads 1 to {FORMAT}"):
        read_attempt(attempt.run, 1)


def test_an_attempt_of_the_first_kwrap_has_what_held_then(attempt: Attempt) -> None:
    path = attempt.folder / "attempt.json"
    document = json.loads(path.read_text())
    later = ("format", "machines", "foreign", "bad_steps", "accepted_differences", "lineage")
    path.write_text(json.dumps({key: value for key, value in document.items() if key not in later}))
    assert read_attempt(attempt.run, 1) == attempt


def test_who_may_only_read_a_run_sees_that_its_lock_is_free() -> None:
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        lock = Path(name) / "supervisor.lock"
        lock.touch(0o444)
        user = os.geteuid()
        try:
            # Root may write everywhere.
            os.seteuid(user or 65534)
            assert is_lock_free(lock)
        finally:
            os.seteuid(user)
