"""An interrupt of a proof ends its trainings, those in groups of their own too."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kohaku_wrap.proving.killing import CHILDREN, ProcessFailed, run_logged, training_threads

LONG = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"], start_new_session=True)
print("started", flush=True)
time.sleep(900)
"""


PROOF = f"""
import sys
from pathlib import Path
from kohaku_wrap.outlets import run_as_work
from kohaku_wrap.proving.killing import run_logged, training_threads

def main():
    with training_threads() as pool:
        return pool.submit(run_logged, [sys.executable, "-c", {LONG!r}], Path(sys.argv[1])).result()

run_as_work(main)
"""


def processes_below() -> set[int]:
    return {each.pid for each in psutil.Process().children(recursive=True)}


def test_an_interrupt_ends_all_trainings_and_what_they_started(tmp_path: Path) -> None:
    before = processes_below()
    command = [sys.executable, "-c", LONG]
    with pytest.raises(KeyboardInterrupt), training_threads() as pool:
        logs = [tmp_path / f"{number}.log" for number in range(64)]
        trainings = [pool.submit(run_logged, command, log) for log in logs]
        while not any(log.exists() and b"started" in log.read_bytes() for log in logs):
            time.sleep(0.02)
        assert len(processes_below() - before) >= 2
        raise KeyboardInterrupt
    assert not processes_below() - before
    assert not CHILDREN.running
    ends = [training.exception() for training in trainings]
    assert any(isinstance(end, ProcessFailed) for end in ends), "those that wait begin no more"
    assert {training.result() for training, end in zip(trainings, ends, strict=True) if end is None} == {-9}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_proof_ends_its_trainings(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    proof = subprocess.Popen([sys.executable, "-c", PROOF, log], stderr=subprocess.PIPE, text=True)
    while not (log.exists() and b"started" in log.read_bytes()):
        assert proof.poll() is None
        time.sleep(0.02)
    below = psutil.Process(proof.pid).children(recursive=True)
    proof.send_signal(number)
    _, errors = proof.communicate(timeout=60)
    assert (proof.returncode, errors) == (130, "interrupted; run the same command again\n")
    assert len(below) == 2 and not psutil.wait_procs(below, 10)[1]


def test_the_next_proof_trains_again(tmp_path: Path) -> None:
    CHILDREN.end()
    with training_threads() as pool:
        assert pool.submit(run_logged, [sys.executable, "-c", "raise SystemExit(7)"], tmp_path / "log").result() == 7
