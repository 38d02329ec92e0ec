"""A training goes on when nobody sees it: no reader, no terminal, no room in its log."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plain_runs import KWRAP, misbehave

from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.states import list_states
from kohaku_wrap.training.supervising.ends import read_end

NewRun = Callable[..., Run]


@pytest.fixture
def slow_run(new_run: NewRun) -> Run:
    run = new_run()
    misbehave(run, every={"seconds_per_step": 0.15})
    return run


def start(run: Run, *options: str, **settings: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*KWRAP, "resume", str(run.folder), *options], start_new_session=True, **settings)


def wait_until(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def has_step(run: Run, step: int) -> bool:
    return run.metrics.exists() and f'"optimizer_step": {step},' in run.metrics.read_text()


def ends(run: Run) -> list[str]:
    return [end.kind if (end := read_end(attempt)) else "none" for attempt in list_attempts(run)]


def told(run: Run) -> str:
    return (run.folder / "supervisor.log").read_text()


def assert_loss_is_told(run: Run, supervisor: subprocess.Popen[bytes]) -> None:
    assert f"`kwrap status {run.folder}`" in told(run)
    assert f"`kill -INT {supervisor.pid}`" in told(run)


def test_a_reader_that_goes_away_ends_no_training(slow_run: Run) -> None:
    reader, writer = os.pipe()
    supervisor = start(slow_run, stdout=writer, stderr=writer)
    os.close(writer)
    wait_until(lambda: has_step(slow_run, 1))
    os.close(reader)
    assert supervisor.wait(60) == 0
    assert ends(slow_run) == ["finished"]
    assert_loss_is_told(slow_run, supervisor)


def test_an_interrupt_that_ends_the_reader_too_saves_a_state(slow_run: Run) -> None:
    line = f'trap : INT; "$@" 2>&1 | tee {slow_run.folder}/tee.txt; exit ${{PIPESTATUS[0]}}'
    argv = ["bash", "-c", line, "bash", *KWRAP, "resume", str(slow_run.folder)]
    shell = subprocess.Popen(argv, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: has_step(slow_run, 2))
    os.killpg(shell.pid, signal.SIGINT)
    assert shell.wait(60) == 130
    assert ends(slow_run) == ["stopped"]
    assert list_states(slow_run.states)


@pytest.mark.parametrize("is_leader", [True, False], ids=["its own terminal", "disowned"])
def test_a_terminal_that_closes_ends_no_training(slow_run: Run, is_leader: bool) -> None:
    master, slave = pty.openpty()
    # `setsid -c` makes the terminal the one whose end sends SIGHUP.
    argv = [*(["setsid", "-c", "-w"] if is_leader else []), *KWRAP, "resume", str(slow_run.folder)]
    process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=not is_leader)
    os.close(slave)
    wait_until(lambda: has_step(slow_run, 1))
    os.close(master)
    assert process.wait(60) == 0
    assert ends(slow_run) == ["finished"]
    assert "the training goes on" in told(slow_run)


def test_a_hangup_ends_no_training(slow_run: Run) -> None:
    supervisor = start(slow_run, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_until(lambda: has_step(slow_run, 1))
    supervisor.send_signal(signal.SIGHUP)
    assert supervisor.wait(60) == 0
    assert ends(slow_run) == ["finished"]


def test_a_full_log_ends_no_training(slow_run: Run) -> None:
    with Path("/dev/full").open("wb") as full:
        supervisor = start(slow_run, stdout=full, stderr=full)
    assert supervisor.wait(60) == 0
    assert ends(slow_run) == ["finished"]
    assert_loss_is_told(slow_run, supervisor)


def test_a_document_that_a_full_disk_cut_is_a_failure(slow_run: Run) -> None:
    with Path("/dev/full").open("wb") as full:
        supervisor = start(slow_run, "--json", stdout=full, stderr=subprocess.PIPE)
    _, shown = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 1 and b"The work itself is done" in shown
    assert ends(slow_run) == ["finished"]


def test_a_reader_that_reads_nothing_stops_no_training(slow_run: Run) -> None:
    """A stopped terminal or pager: the pipe is full, and still a stop is obeyed."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    while True:
        try:
            os.write(writer, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(writer, True)
    supervisor = start(slow_run, stdout=subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    wait_until(lambda: has_step(slow_run, 2))
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(60) == 130
    os.close(reader)
    assert ends(slow_run) == ["stopped"]


def test_closed_output_is_not_a_file_of_the_run(slow_run: Run) -> None:
    """Without a door the next files opened would be standard output and error, and get what is printed."""
    argv = ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", *KWRAP, "resume", str(slow_run.folder)]
    assert subprocess.run(argv, timeout=60).returncode == 0
    assert ends(slow_run) == ["finished"]
    words = [path for path in slow_run.folder.rglob("*") if path.is_file() and b"step 1/" in path.read_bytes()]
    assert not words
