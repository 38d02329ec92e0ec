"""Metrics in other tools: one line over all attempts of a run, each step once, whichever the engine; no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from engine_world import World, kwrap, train_arguments

from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.records.trackers import TRACKERS, Logbook, pick_numbers, write_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = ("log_with=tensorboard", "states.keep=9")


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """By name the steps and values of all event files of a folder, as they stand there."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        for data in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(data)
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def assert_line_is_whole(run: Run, folder: Path) -> None:
    """Each step that counts stands once in the line, with the numbers of the run's metrics."""
    events = read_events(folder)
    lines = read_metrics(run)
    for name in ("loss", "lr_unet", "lr_text_encoder"):
        assert [step for step, _ in events[name]] == [line["optimizer_step"] for line in lines], name
        assert [value for _, value in events[name]] == pytest.approx([line[name] for line in lines], rel=1e-6)


def check_going_back(world: World, name: str, engine: str) -> None:
    """A run that went back to an earlier state and was renamed goes on in its line."""
    done = kwrap(*train_arguments(world.site, name, *SETTINGS), "--engine", engine)
    assert done.returncode == 0, done.stdout + done.stderr
    run = Run(world.folder / "runs" / name)
    assert f"metrics go to tensorboard: {run.logs}" in done.stderr
    assert_line_is_whole(run, run.logs)
    before = read_events(run.logs)
    back = kwrap("resume", str(run.folder), "--step", "2")
    assert back.returncode == 0, back.stdout + back.stderr
    assert Counter(step for step, _ in read_events(run.logs)["loss"]) == {1: 1, 2: 1, 3: 1, 4: 1}
    moved = Run(run.folder.with_name(f"{name}-moved"))
    assert kwrap("rename", str(run.folder), moved.name).returncode == 0
    longer = kwrap("extend", str(moved.folder), "--epochs", "1")
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert_line_is_whole(moved, moved.logs)
    assert read_events(moved.logs)["loss"][:4] == before["loss"]
    assert [path.name for path in moved.logs.iterdir() if path.is_dir()] == [], "the trainer itself logs nothing"


def test_a_run_goes_on_in_its_line(world: World) -> None:
    pytest.importorskip("tensorboard")
    check_going_back(world, "logged", "builtin")


@pytest.mark.sd_scripts
@pytest.mark.usefixtures("use_trainer")
def test_the_real_trainer_logs_the_same_way(world: World) -> None:
    pytest.importorskip("tensorboard")
    check_going_back(world, "logged-by-the-trainer", "sd-scripts")


def test_a_logger_that_fails_leaves_the_training_alone(world: World, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    in_the_way = tmp_path / "taken"
    in_the_way.write_text("a file")
    site = world.folder / "site-with-logs.toml"
    site.write_text(world.site.read_text() + f'\n[trainer]\nlogging_dir = "{in_the_way}/logs"\n')
    done = kwrap(*train_arguments(site, "unlogged"))
    assert done.returncode == 0, done.stdout + done.stderr
    run = Run(world.folder / "runs" / "unlogged")
    assert "metrics are no longer logged to tensorboard" in (run.folder / "supervisor.log").read_text()
    report = json.loads(kwrap("verify", str(run.folder), "--json").stdout)
    assert report["proved"], report
    written = kwrap("status", str(run.folder), "--to", "tensorboard", str(tmp_path / "later"))
    assert written.returncode == 0, written.stderr
    [folder] = (tmp_path / "later").iterdir()
    assert_line_is_whole(run, folder)
    again = json.loads(kwrap("status", str(run.folder), "--to", "tensorboard", str(folder.parent), "--json").stdout)
    assert [row["written"] for row in again["runs"]] == [0]
    assert_line_is_whole(run, folder)


def test_a_step_that_a_crash_cut_off_is_written_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    book = Logbook(("tensorboard",), tmp_path, "0123456789abcdef", "cut")
    lines = [{"optimizer_step": step, "loss": step / 8, "attempt": 1} for step in range(1, 6)]
    tracker = TRACKERS["tensorboard"](book)
    write_lines(tracker, lines[:3])
    tracker.close()
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    tracker = TRACKERS["tensorboard"](book)
    assert tracker.last_step == 2
    assert write_lines(tracker, lines) == 3
    tracker.close()
    assert sorted(read_events(tmp_path)["loss"]) == [(line["optimizer_step"], line["loss"]) for line in lines]


def test_words_for_numbers_are_numbers() -> None:
    numbers = pick_numbers({"optimizer_step": 3, "attempt": 1, "loss": "inf", "lr_unet": 1e-4, "why": "a word"})
    assert numbers == {"loss": float("inf"), "lr_unet": 1e-4}


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tool_with_lines_of_its_own_goes_on_in_one(package: str, tmp_path: Path) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    book = f"Logbook(({package!r},), Path({str(tmp_path)!r}), '0123456789abcdef', 'mine')"
    script = (
        "import sys; from pathlib import Path; from kohaku_wrap.training.records.trackers import *\n"
        f"tracker = TRACKERS[{package!r}]({book})\n"
        "print('had', tracker.last_step)\n"
        "write_lines(tracker, [{'optimizer_step': step, 'loss': 1 / step} for step in range(1, int(sys.argv[1]))])\n"
        "tracker.close()\n"
    )
    environment = os.environ | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    for end, had in ((4, 0), (3, 3), (6, 3)):
        done = subprocess.run(
            [sys.executable, "-c", script, str(end)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"had {had}" in done.stdout
    assert read_own_lines(package, tmp_path) == [1, 2, 3, 4, 5]


def read_own_lines(package: str, folder: Path) -> list[int]:
    """The steps that a tool has, by its own files."""
    if package == "trackio":
        import sqlite3

        [database] = folder.glob("*.db")
        with sqlite3.connect(database) as connection:
            return [step for (step,) in connection.execute("SELECT step FROM metrics ORDER BY id")]
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    steps = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("history"):
                steps.append(record.history.step.num)
    return steps
