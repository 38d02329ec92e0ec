"""Whether the networks among a run's checkpoints are those that it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from plain_runs import misbehave, train

from kohaku_wrap.cli import program
from kohaku_wrap.file_hashes import sha256_of_file
from kohaku_wrap.training.records.attempts import Attempt, Outcome, list_attempts, write_attempt
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.lock import Lock
from kohaku_wrap.training.records.networks import (
    NETWORKS_FILE,
    bytes_of_networks,
    compare_networks,
    is_finished,
    list_written,
    note_network,
    note_new_name,
    read_written,
    shorter_end,
    step_of_network,
    without_idle,
)
from kohaku_wrap.training.starting.resume import begin_attempt, plan_resume
from kohaku_wrap.training.verifying.verify import verify_run
from kohaku_wrap.training.verifying.verify_report import VerifyReport

NewRun = Callable[..., Run]


def finished(new_run: NewRun, name: str = "r") -> tuple[Run, Path]:
    run = new_run(name)
    train(run)
    return run, run.checkpoints / f"{name}.safetensors"


def told(report: VerifyReport) -> tuple[bool, str]:
    check = next(check for check in report.checks if check.name == "networks")
    return check.is_looked_at, check.detail


def begin(run: Run, number: int) -> Attempt:
    attempt = Attempt(run, number, 1, run.lock.group, 0, 0, None)
    write_attempt(attempt, {})
    return attempt


def test_metadata_tell_nothing_of_what_did_nothing(tmp_path: Path) -> None:
    told = {
        "ss_learning_rate": "2e-06",
        "ss_unet_lr": "0.001",
        "ss_huber_c": "0.1",
        "ss_prior_loss_weight": "1.0",
        "ss_lr_warmup_steps": "0",
        "ss_caption_tag_dropout_rate": "0.0",
        "ss_seed": "42",
    }
    rates = {"unet_lr": 0.001, "text_encoder_lr": [0.0002], "lr_scheduler": "constant", "loss_type": "l2"}
    tables = {
        "run": {"data": "kwrap"},
        "values": rates,
        "dataset": {"caption_tag_dropout_rate": 0.0},
        "files": {"dataset.toml": "[[datasets]]\n[[datasets.subsets]]\ncaption_tag_dropout_rate = 0.15\n"},
    }
    kept = without_idle(told, Lock(tables, tmp_path))
    assert kept == {"ss_unet_lr": "0.001", "ss_caption_tag_dropout_rate": "0.15", "ss_seed": "42"}
    used = {**tables, "values": {**rates, "text_encoder_lr": None, "loss_type": "huber", "lr_scheduler": "cosine"}}
    assert without_idle(told, Lock(used, tmp_path)).keys() == told.keys() - {"ss_prior_loss_weight"}


@pytest.mark.parametrize(("resolution", "said"), [([64, 96], "64x96"), (512, "512x512"), (None, "1024x1024")])
def test_the_resolution_in_metadata_is_that_of_the_dataset(tmp_path: Path, resolution: object, said: str) -> None:
    """The trainer writes what its own options say, and where they say nothing SDXL's."""
    dataset = {} if resolution is None else {"resolution": resolution}
    told = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "modelspec.resolution": "1024x1024"}
    tables = {"run": {"data": "kwrap"}, "values": {}, "dataset": dataset, "files": {"dataset.toml": "[[datasets]]\n"}}
    assert without_idle(told, Lock(tables, tmp_path)) == {**told, "modelspec.resolution": said}


def test_a_run_is_finished_by_its_newest_attempt_at_its_last_step(new_run: NewRun) -> None:
    run = new_run("long", epochs=60)
    total = run.lock.total_optimizer_steps
    assert not is_finished(run) and shorter_end(run) == 0 and total > 300
    first = begin(run, 1)
    assert not is_finished(run) and shorter_end(run) == 0
    first.finish("finished", total)
    (run.checkpoints / "long.png").touch()
    assert not is_finished(run) and run.networks == [], "the network is not there, only a picture of its name"
    (run.checkpoints / "long.safetensors").write_bytes(b"network")
    assert is_finished(run) and shorter_end(run) == 0
    second = begin(run, 2)
    assert not is_finished(run) and shorter_end(run) == 0
    ends: list[tuple[Outcome, int, int]] = [
        ("stopped", total - 1, 0), ("finished", total - 1, total - 1), ("finished", total, 0)
    ]  # fmt: skip
    for outcome, step, end in ends:
        second.finish(outcome, step)
        assert shorter_end(run) == end and is_finished(run) == (outcome == "finished" and not end)
    third = begin(run, 3)
    third.finish("stopped", total)
    assert not is_finished(run)


def test_a_network_is_of_the_step_or_epoch_in_its_name(new_run: NewRun) -> None:
    run = new_run("long")
    a_epoch = run.lock.count.optimizer_steps_per_epoch
    steps = {
        "long-step00000004.safetensors": 4,
        "long-step123456789.ckpt": 123456789,
        "long-000002.safetensors": 2 * a_epoch,
        "long.safetensors": 77,
        "long.ckpt": 77,
        "long-step0000004.safetensors": None,
        "long-00002.safetensors": None,
        "other.safetensors": None,
    }
    assert {name: step_of_network(run, run.checkpoints / name, 77) for name in steps} == steps


@pytest.mark.parametrize("name", ["style-241126", "style-step20241126", "v1.5-000001"])
def test_the_last_network_of_a_run_whose_name_ends_in_digits_is_of_the_end(new_run: NewRun, name: str) -> None:
    run = new_run(name)
    steps = {name: 77, f"{name}-step00000004": 4, f"{name}-000002": 2 * run.lock.count.optimizer_steps_per_epoch}
    assert {each: step_of_network(run, run.checkpoints / f"{each}.safetensors", 77) for each in steps} == steps


def test_a_network_that_gets_another_name_keeps_its_sha256(new_run: NewRun) -> None:
    run = new_run()
    attempt = begin(run, 1)
    for name in ("r.safetensors", "r-step00000002.safetensors"):
        (run.checkpoints / name).write_bytes(name.encode())
        note_network(attempt, run.checkpoints / name)
    before = read_written(attempt.folder)
    assert before == {path.name: sha256_of_file(path) for path in run.checkpoints.iterdir()} and len(before) == 2
    note_new_name(attempt, "of-nobody.safetensors", "new.safetensors")
    assert read_written(attempt.folder) == before
    note_new_name(attempt, "r.safetensors", "r-step00000004.safetensors")
    before["r-step00000004.safetensors"] = before.pop("r.safetensors")
    assert read_written(attempt.folder) == before


def test_the_final_network_is_missed_where_the_newest_attempt_finished(new_run: NewRun) -> None:
    run = new_run()
    outcomes: list[Outcome] = ["stopped", "finished"]
    for number, outcome in enumerate(outcomes, 1):
        attempt = begin(run, number)
        (run.checkpoints / "r.safetensors").write_bytes(b"network")
        note_network(attempt, run.checkpoints / "r.safetensors")
        (run.checkpoints / "r.safetensors").unlink()
        attempt.finish(outcome, 12)
        found = [(each.path, each.now, each.is_changed) for each in compare_networks(run)]
        assert found == ([(run.checkpoints / "r.safetensors", "", True)] if outcome == "finished" else [])
    begin(run, 3)
    assert not list(compare_networks(run)), "the attempt that trains now writes it again"


def test_a_run_without_checkpoints_has_no_network(new_run: NewRun) -> None:
    run = new_run()
    begin(run, 1).finish("finished", run.lock.total_optimizer_steps)
    run.checkpoints.rmdir()
    assert not is_finished(run) and not list(compare_networks(run)) and bytes_of_networks(run) == 0


def test_networks_as_written_are_said_to_be(new_run: NewRun) -> None:
    run, _ = finished(new_run)
    read: list[int] = []
    report = verify_run(run, on_bytes=read.append)
    assert told(report) == (True, "1 as the run wrote them") and not report.changed_after
    assert sum(read) == bytes_of_networks(run) == 0, "the run has hashed it already"


def test_an_exchanged_network_is_named_and_the_ledger_stays_proved(new_run: NewRun) -> None:
    run, network = finished(new_run)
    written = list_written(run)["r.safetensors"]
    network.write_bytes(bytes(reversed(network.read_bytes())))
    assert bytes_of_networks(run) == network.stat().st_size
    report = verify_run(run)
    assert told(report) == (True, "not what the run wrote: r.safetensors")
    [said], now = report.changed_after, sha256_of_file(network)
    assert said.endswith(f"r.safetensors: the sha256 was {written[:12]}… when the run wrote it, is now {now[:12]}…")
    result = CliRunner().invoke(program, ["verify", str(run.folder)], standalone_mode=False)
    assert result.return_value == 0 and "note: changed after the run: " in result.stderr


def test_a_finished_network_that_is_gone_is_missed(new_run: NewRun) -> None:
    run, network = finished(new_run, "first")
    network.unlink()
    report = verify_run(run)
    assert told(report) == (True, "not what the run wrote: first.safetensors")
    assert "the file is gone" in report.changed_after[0]


def test_networks_that_the_run_removed_itself_are_not_missed(new_run: NewRun) -> None:
    run, network = finished(new_run)
    path = list_attempts(run)[0].folder / NETWORKS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "r-step00000002.safetensors": "0" * 64}))
    (run.checkpoints / "notes.txt").write_text("mine")
    (run.checkpoints / ".r.77.part.safetensors").write_bytes(b"torn")
    (run.checkpoints / "samples.safetensors").mkdir()
    assert told(verify_run(run)) == (True, "1 as the run wrote them")
    for name in ("merged.safetensors", "old.ckpt", "older.pt"):
        (run.checkpoints / name).write_bytes(network.read_bytes())
    unknown = "merged.safetensors, old.ckpt, older.pt: the run has no sha256 of what it wrote"
    assert told(verify_run(run)) == (False, f"1 as the run wrote them; {unknown}")
    assert bytes_of_networks(run) == 0, "what cannot be compared is not read"


def test_a_network_that_a_resume_moved_away_is_not_missed(new_run: NewRun) -> None:
    run, network = finished(new_run)
    begin_attempt(plan_resume(run, step=10))
    assert not network.exists() and told(verify_run(run)) == (True, "none is there")


def test_of_an_old_run_nobody_can_tell(new_run: NewRun) -> None:
    run, network = finished(new_run)
    for odd in (None, "[", "[]", '{"r.safetensors": 5}'):
        path = list_attempts(run)[0].folder / NETWORKS_FILE
        path.unlink(missing_ok=True) if odd is None else path.write_text(odd)
        report = verify_run(run)
        assert told(report) == (False, "r.safetensors: the run has no sha256 of what it wrote")
        assert report.is_proved and not report.changed_after
    network.unlink()
    assert told(verify_run(run)) == (True, "none is there")


def test_the_network_of_the_last_attempt_that_wrote_it_counts(new_run: NewRun) -> None:
    run = new_run()
    misbehave(run, attempt_1={"crash": True, "at": 7})
    train(run, restarts=1)
    first, second = list_attempts(run)
    assert not (first.folder / NETWORKS_FILE).exists() and (second.folder / NETWORKS_FILE).exists()
    (first.folder / NETWORKS_FILE).write_text(json.dumps({"r.safetensors": "0" * 64}))
    assert told(verify_run(run)) == (True, "1 as the run wrote them")
