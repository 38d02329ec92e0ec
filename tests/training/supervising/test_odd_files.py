"""Whatever a run's folder holds: one message, or the odd file is left out; nothing hangs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import toml
from plain_runs import misbehave, train

from kohaku_wrap.training.records.attempts import Attempt, list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.lock import BadRunFolder
from kohaku_wrap.training.records.manifest import MANIFEST, DamagedState, document_digest, read_manifest
from kohaku_wrap.training.records.signs import read_boot_id
from kohaku_wrap.training.records.states import list_states
from kohaku_wrap.training.starting.resume import plan_resume
from kohaku_wrap.training.supervising.status import count_silence, read_status

NewRun = Callable[..., Run]
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    from plain_runs import make_run

    run = make_run(tmp_path_factory.mktemp("odd") / "runs" / "r")
    train(run)
    return run


ODD = ["[]", "{}", "null", "1e999", '{"rank": "x"}', '{"unknown": 1}', DEEP, "\x00", '"\\ud800"', "fifo", "folder"]


def put(path: Path, content: str) -> None:
    if content == "fifo":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    else:
        path.write_text(content)


@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize(
    "name",
    [
        "attempts/1/heartbeat-rank-000.json",
        "attempts/1/end.json",
        "attempts/1/result.json",
        "attempts/1/failure-rank-000.json",
        "attempts/1/attempt.json",
        "metrics.jsonl",
        "run.lock.toml",
        "states/*/manifest.json",
    ],
)
def test_an_odd_file_is_one_message_or_none(trained: Run, name: str, content: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from kohaku_wrap.cli import program
    from kohaku_wrap.errors import KwrapError

    path = next(iter(sorted(trained.folder.glob(name))), trained.folder / name)
    away = tmp_path / "away"
    is_there = path.exists()
    if is_there:
        path.rename(away)
    put(path, content)
    try:
        for verb in ("status", "verify"):
            error = CliRunner().invoke(program, [verb, str(trained.folder)]).exception
            assert error is None or isinstance(error, KwrapError | OSError | SystemExit), repr(error)
    finally:
        path.rmdir() if path.is_dir() else path.unlink()
        if is_there:
            away.rename(path)


@pytest.mark.parametrize("name", ["²", "٣", "1.5", "-1", "0x1", "1"])
def test_only_plain_numbers_are_attempts(new_run: NewRun, name: str) -> None:
    run = new_run()
    (run.attempts / name).mkdir()
    assert list_attempts(run) == []
    assert read_status(run).condition == "new"


@pytest.mark.parametrize("change", [{"later": 1}, {"wider": {}}])
def test_a_manifest_with_an_unknown_key_is_named(trained: Run, change: dict[str, object], tmp_path: Path) -> None:
    state = list_states(trained.states)[-1][1]
    body = json.loads((state / MANIFEST).read_text())
    del body["digest"]
    body["fingerprint"] |= change
    copied = tmp_path / state.name
    copied.mkdir()
    (copied / MANIFEST).write_text(json.dumps({**body, "digest": document_digest(body)}))
    with pytest.raises(DamagedState, match="not as this kwrap writes it"):
        read_manifest(copied)


@pytest.mark.parametrize(
    "line", ["effective_batch = 0", "effective_batch = 9000000000000000000", "batch_per_gpu = 0", "seed = 1.5"]
)
def test_a_number_out_of_bounds_in_a_lock_is_named(new_run: NewRun, line: str) -> None:

    run = new_run()
    key = line.split()[0]
    lines = run.lock_file.read_text().splitlines()
    run.lock_file.write_text("\n".join(line if each.startswith(f"{key} ") else each for each in lines))
    with pytest.raises(BadRunFolder, match=rf"\[run\] {key} is "):
        _ = (run.lock.count, run.lock.seed)


@pytest.mark.parametrize("table", ["inputs", "values", "samples", "machine", "states"])
@pytest.mark.parametrize("value", ["5", '"x"', "[1]"])
def test_a_table_of_a_lock_that_is_none_is_named(new_run: NewRun, table: str, value: str) -> None:
    run = new_run()
    lock = toml.loads(run.lock_file.read_text()) | {table: toml.loads(f"value = {value}")["value"]}
    run.lock_file.write_text(toml.dumps(lock))
    with pytest.raises(BadRunFolder, match=rf"\[{table}\] is .*, not a table\n.*restore it"):
        _ = (plan_resume(run), read_status(run), run.lock.states_kept)


@pytest.mark.parametrize("format_number", ["3", '"2"', "0", "[2]"])
def test_a_lock_of_another_format_is_refused_with_advice(new_run: NewRun, format_number: str) -> None:
    from kohaku_wrap.training.comparing.other_lock import template_of_lock

    run = new_run()
    lines = [line for line in run.lock_file.read_text().splitlines() if not line.startswith("format ")]
    run.lock_file.write_text("\n".join([f"format = {format_number}", *lines]))
    for read in (lambda: run.lock, lambda: template_of_lock(run.lock_file)):
        with pytest.raises(BadRunFolder, match="this kwrap reads 1 to 2") as refused:
            read()
        assert "a newer one" in refused.value.next_step


@pytest.mark.parametrize("jump_seconds", [-1e6, 1e6])
def test_a_jump_of_the_clock_is_no_hang(new_run: NewRun, monkeypatch: pytest.MonkeyPatch, jump_seconds: float) -> None:
    """The supervisor's time of day is days off the workers': neither a hang nor a blind eye."""
    run = new_run()
    misbehave(run, every={"seconds_per_step": 0.05})
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump_seconds)
    report, _ = train(run, timeouts_seconds={"step": 20.0, "start-up": 60.0})
    assert report.optimizer_step == run.lock.total_optimizer_steps


def test_a_hang_is_seen_though_the_clock_went_back(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from kohaku_wrap.training.supervising.supervise import TrainerFailed

    run = new_run()
    misbehave(run, every={"hang": "step", "at": 1})
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 1e6)
    with pytest.raises(TrainerFailed) as failed:
        train(run, timeouts_seconds={"step": 2.0})
    assert failed.value.end.kind == "hang"


def test_silence_on_another_boot_is_unknown(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt: Attempt = list_attempts(trained)[0]
    attempt.beat(0, "step", 3)
    silent = count_silence(attempt.heartbeats())
    assert silent is not None and silent >= 0
    read_boot_id.cache_clear()
    monkeypatch.setattr("kohaku_wrap.training.records.signs.BOOT_ID", trained.lock_file)
    assert count_silence(attempt.heartbeats()) is None
    read_boot_id.cache_clear()
