"""Two machines on this one: each with a process of its own, one of them killed, the same to the bit as one machine."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toml
from engine_world import World

from kohaku_wrap.proving.likeness import compare_runs
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.folder import Run, is_run
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.supervising.ends import read_end
from kohaku_wrap.training.supervising.processes import list_processes, send_signal

SETTINGS = (
    "effective_batch=4",
    "max_train_epochs=3",
    "save_every_n_steps=1",
    "save_precision=float",
    "max_token_length=150",
    "dataset_options.resolution=[64, 64]",
    "dataset_options.min_bucket_reso=32",
    "dataset_options.max_bucket_reso=128",
)
SETS = [part for setting in SETTINGS for part in ("--set", setting)]
PATIENCE_SECONDS = 240.0


def start(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        command = [sys.executable, "-m", "kohaku_wrap", *arguments]
        return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)


def write_site(world: World, name: str, **machine: Any) -> str:
    document = toml.loads(world.site.read_text(encoding="utf-8"))
    document["machine"] |= machine
    site = world.site.with_name(f"{name}.toml")
    site.write_text(toml.dumps(document), encoding="utf-8")
    return str(site)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def await_that(what: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not what():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


@pytest.fixture
def site_of_two(world: World) -> str:
    """One process on each of two machines, which are both this one."""
    joined = {"num_machines": 2, "main_process_ip": "127.0.0.1", "main_process_port": free_port()}
    return write_site(world, "machines", accelerate=joined)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_is_killed_and_the_network_is_that_of_one_machine(
    world: World, site_of_two: str, tmp_path: Path
) -> None:
    """Machine 1 is killed with its kwrap; it comes back, and the restart goes on with it."""
    site_of_one = write_site(world, "one", processes=2)
    one = start("train", "demo", "--site", site_of_one, "--run", "one", *SETS, log=tmp_path / "one.log")
    assert one.wait() == 0, (tmp_path / "one.log").read_text()

    run = Run(world.folder / "runs" / "several")
    logs = [tmp_path / f"machine-{rank}.log" for rank in range(2)]
    along = ("resume", str(run.folder), "--machine-rank", "1")
    restarts = ("--restarts", "1", "--restart-pause", "1")
    supervisor = start("train", "demo", "--site", site_of_two, "--run", "several", *SETS, *restarts, log=logs[0])
    await_that(lambda: is_run(run.folder), supervisor)
    machine = start(*along, log=logs[1])
    try:
        await_that(lambda: len(read_metrics(run)) >= 2, supervisor, machine)
        machine.send_signal(signal.SIGKILL)
        for pid in list_processes(run, machine_rank=1):
            send_signal(pid, signal.SIGKILL)
        machine.wait()
        machine = start(*along, log=logs[1])
        assert supervisor.wait(PATIENCE_SECONDS) == 0, logs[0].read_text()
        assert machine.wait(PATIENCE_SECONDS) == 0, logs[1].read_text()
    finally:
        for process in (supervisor, machine):
            process.kill()
            process.wait()
        for pid in list_processes(run):
            send_signal(pid, signal.SIGKILL)

    attempts = list_attempts(run)
    assert [end.kind for attempt in attempts if (end := read_end(attempt))] == ["crash", "finished"]
    assert all(attempt.log_file(rank).exists() for attempt in attempts for rank in range(2))
    assert all(f"machine 1 of 2 joins attempt {number}" in logs[1].read_text() for number in (1, 2))
    likeness = compare_runs(Run(world.folder / "runs" / "one"), run)
    assert likeness.attempts == 2
    assert likeness.tensors > 1000
