"""Runs renamed and removed as a whole: never while a process holds them, nor what another run needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toml
from click.testing import CliRunner
from plain_runs import make_placed_run, misbehave, train

from kohaku_wrap.cli import program
from kohaku_wrap.errors import UsageError
from kohaku_wrap.file_hashes import kept_sha256
from kohaku_wrap.locks import hold_lock
from kohaku_wrap.training.comparing.places import read_places
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.lock import BadRunFolder
from kohaku_wrap.training.records.networks import is_finished
from kohaku_wrap.training.starting.create import RunExists
from kohaku_wrap.training.supervising.housekeeping import NeededByOthers, plan_removal, remove_run, rename_run
from kohaku_wrap.training.supervising.processes import list_processes
from kohaku_wrap.training.supervising.supervise import RunIsBusy, TrainerFailed
from kohaku_wrap.training.verifying.verify import verify_run

NewRun = Callable[..., Run]


@pytest.fixture
def holder(new_run: NewRun) -> Iterator[tuple[Run, subprocess.Popen[bytes]]]:
    """A run with a process that works in its folder as a worker does."""
    run = make_placed_run(new_run)
    settings = {**os.environ, "KWRAP_RUN": str(run.folder), "KWRAP_ATTEMPT": "1"}
    process = subprocess.Popen([sys.executable, "-c", "input()"], cwd=run.folder, env=settings, stdin=subprocess.PIPE)
    yield run, process
    process.kill()
    process.wait()


def test_a_run_that_a_process_holds_is_neither_renamed_nor_removed(
    holder: tuple[Run, subprocess.Popen[bytes]],
) -> None:
    run, process = holder
    for act in (lambda: rename_run(run, "other"), lambda: remove_run(plan_removal(run, False))):
        with pytest.raises(RunIsBusy, match="a process holds it"):
            act()
    moved = Run(run.folder.rename(run.folder.with_name("by-hand")))
    assert list_processes(moved) == [process.pid], "found where the folder went"
    process.kill()
    process.wait()
    lock = hold_lock(moved.folder / ".supervisor.lock")
    with pytest.raises(RunIsBusy):
        rename_run(moved, "other")
    assert lock is not None
    os.close(lock)
    assert rename_run(moved, "other").folder.name == "other"


def test_a_network_is_kept_for_a_run_that_knows_it_by_an_earlier_name(new_run: NewRun) -> None:
    run = make_placed_run(new_run)
    train(run)
    network = run.networks[0]
    inputs = {"network": str(network), "network_sha256": kept_sha256(network)}
    make_placed_run(new_run, "child", trainer={"network_weights": str(network)}, inputs=inputs)
    with pytest.raises(NeededByOthers, match="child"):
        plan_removal(rename_run(run, "renamed"), with_checkpoints=True)


def test_a_renamed_run_that_is_moved_by_hand_before_it_trains_goes_on(new_run: NewRun, tmp_path: Path) -> None:
    run = make_placed_run(new_run)
    misbehave(run, attempt_1={"die": "step", "at": 5})
    with pytest.raises(TrainerFailed):
        train(run)
    moved = Run(rename_run(run, "renamed").folder.rename(tmp_path / "elsewhere"))
    train(moved)
    assert is_finished(moved) and verify_run(moved).is_proved


def test_rename_keeps_checkpoints_and_refuses_names_that_are_taken(new_run: NewRun) -> None:
    run, other = make_placed_run(new_run), make_placed_run(new_run, "taken")
    train(run)
    with pytest.raises(RunExists):
        rename_run(run, "taken")
    for name in ("", "a/b", "..", ".hidden", " ", "end ", "two\nlines", "\x1b[2J", "n" * 300, "é" * 100):
        with pytest.raises(UsageError, match="is not a run's name"):
            rename_run(run, name)
    moved = rename_run(run, "new")
    assert is_finished(moved) and read_places(moved).options["output_dir"] == str(moved.checkpoints)
    assert [path.name for path in moved.networks] == ["first.safetensors"] and other.folder.is_dir()


def test_a_run_alone_in_its_folder_keeps_its_networks_or_is_not_touched(new_run: NewRun) -> None:
    """Nothing else has read its lock by then."""
    run = new_run("epsilon")
    network = run.checkpoints / "epsilon.safetensors"
    network.write_bytes(b"weights")
    text = run.lock_file.read_text()
    run.lock_file.write_text("run = [")
    with pytest.raises(BadRunFolder, match="not TOML"):
        remove_run(plan_removal(Run(run.folder), with_checkpoints=False))
    assert network.is_file() and run.attempts.is_dir()
    run.lock_file.write_text(text)
    (run.checkpoints / "sample").mkdir()
    done = CliRunner().invoke(program, ["remove", str(run.folder), "--yes"])
    assert "1 network in" in done.output, "what other tools put beside it stays, and is none"
    left = ["epsilon.lock.toml", "epsilon.safetensors", "sample"]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == left
    assert not list(run.folder.parent.glob(".*"))


def test_a_signal_in_the_middle_of_a_removal_leaves_nothing(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, real, calls = new_run("epsilon"), shutil.rmtree, []

    def cut_short(path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        remove_run(plan_removal(run, with_checkpoints=True))
    assert not run.folder.exists()
    assert not list(run.folder.parent.glob(".*.removed"))


def test_a_network_that_another_run_names_by_a_link_is_not_removed(new_run: NewRun, tmp_path: Path) -> None:
    run = make_placed_run(new_run)
    train(run)
    link = tmp_path / "linked"
    link.symlink_to(run.folder.parent)
    network = link / "first" / "checkpoints" / run.networks[0].name
    make_placed_run(new_run, "child", trainer={"base_weights": ["elsewhere.safetensors", str(network)]})
    with pytest.raises(NeededByOthers, match="child"):
        plan_removal(run, with_checkpoints=True)


def test_remove_keeps_networks_and_what_others_came_from(new_run: NewRun) -> None:
    run = make_placed_run(new_run)
    train(run)
    network = run.networks[0]
    lock = toml.loads(run.lock_file.read_text())
    lock |= {"format": 2, "run": {**lock["run"], "id": "1d" * 16}}
    run.lock_file.write_text(toml.dumps(lock))
    run = Run(run.folder)
    child = make_placed_run(new_run, "child", trainer={"network_weights": str(network)})
    with pytest.raises(NeededByOthers, match="child"):
        plan_removal(run, with_checkpoints=True)
    copy = Run(shutil.copytree(run.folder, run.folder.with_name("copy")))
    with pytest.raises(NeededByOthers, match=r"came from it: child\n"):
        plan_removal(run, with_checkpoints=True)
    remove_run(plan_removal(copy, with_checkpoints=True))
    assert not copy.folder.exists() and network.is_file(), "a copy is no descendant, and has none"
    before = plan_removal(run, with_checkpoints=False).size_bytes
    (run.checkpoints / "sample").mkdir()
    (run.checkpoints / "sample" / "a.png").write_bytes(bytes(7))
    assert plan_removal(run, with_checkpoints=False).size_bytes == before, "what stays makes no room"
    remove_run(plan_removal(run, with_checkpoints=False))
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoints"]
    assert network.is_file() and (run.checkpoints / "first.lock.toml").is_file()
    remove_run(plan_removal(child, with_checkpoints=True))
    assert not child.folder.exists() and not list(child.folder.parent.glob(".*"))
