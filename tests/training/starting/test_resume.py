"""Where a resume starts, what it leaves behind, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from plain_runs import misbehave, plain_launch, train, write_captions

from kohaku_wrap.cli import program
from kohaku_wrap.errors import KwrapError, UsageError
from kohaku_wrap.formats.caption_writer import DamagedCaptions
from kohaku_wrap.steps import BadOrder
from kohaku_wrap.trainer import commits as trainer_commits
from kohaku_wrap.trainer.commits import SupportedCommit, digest_sources
from kohaku_wrap.training.comparing.differences import list_changes
from kohaku_wrap.training.comparing.places import DifferentRun
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.manifest import DamagedState
from kohaku_wrap.training.records.metrics import read_metrics
from kohaku_wrap.training.records.states import list_states, state_folder
from kohaku_wrap.training.starting.branch import plan_branch
from kohaku_wrap.training.starting.choose_state import NoSuchState, NoWholeState
from kohaku_wrap.training.starting.create import RunExists
from kohaku_wrap.training.starting.resume import RunFinished, begin_attempt, plan_resume
from kohaku_wrap.training.supervising.supervise import TrainerFailed, supervise_run
from kohaku_wrap.training.supervising.watch import WatchOptions
from kohaku_wrap.training.verifying.verify import verify_run

NewRun = Callable[..., Run]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(program, [str(each) for each in arguments], standalone_mode=False)


def crash_at(run: Run, step: int) -> None:
    """Train until it crashes after `step` optimizer steps."""
    misbehave(run, attempt_1={"crash": True, "at": step})
    with pytest.raises(TrainerFailed):
        train(run)


def resume(run: Run, **options: Any) -> None:
    """One attempt from what `plan_resume` chooses, and fresh ones after failures."""

    def begin() -> Any:
        attempt, launch = begin_attempt(plan_resume(run, **options))
        return attempt, plain_launch(attempt, launch)

    supervise_run(run, begin, begin, WatchOptions(poll_seconds=0.02), lambda event: None)


def steps(run: Run) -> list[int]:
    return [step for step, _ in list_states(run.states)]


def test_takes_the_newest_whole_state_and_names_damaged_ones(new_run: NewRun) -> None:
    run = new_run()
    crash_at(run, 7)
    assert steps(run) == [4, 6]
    os.truncate(state_folder(run.states, 6) / "weights.bin", 3)
    plan = plan_resume(run)
    assert (plan.start_optimizer_step, plan.number) == (4, 2)
    assert "weights.bin is damaged" in plan.damaged[0].message
    assert plan.abandons == (state_folder(run.states, 6),)
    with pytest.raises(DamagedState, match=r"weights\.bin"):
        plan_resume(run, step=6)
    told = call("resume", run.folder, "--dry-run")
    assert "damaged, passed over" in told.output and told.return_value is None
    assert not (run.folder / "abandoned").exists(), "a dry run changes nothing"
    resume(run)
    assert (run.abandoned / "before-attempt-2" / "states" / "optimizer-step-00000006").is_dir()
    assert verify_run(run).is_proved


def damage_states(run: Run) -> None:
    for _, state in list_states(run.states):
        os.truncate(state / "weights.bin", 3)


def test_a_run_whose_states_are_all_damaged_starts_again_only_when_asked(new_run: NewRun) -> None:
    run = new_run()
    crash_at(run, 7)
    damage_states(run)
    with pytest.raises(NoWholeState) as refused:
        plan_resume(run)
    assert refused.value.exit_code == 1
    told = refused.value.message
    assert told.index("00000006: weights.bin is damaged (3 bytes") < told.index("00000004: weights.bin is damaged")
    assert "--step 0" in refused.value.next_step
    assert "from the beginning\n" in call("resume", run.folder, "--step", 0, "--dry-run").output
    resume(run, step=0)
    assert len(list((run.abandoned / "before-attempt-2" / "states").iterdir())) == 2
    assert verify_run(run).is_proved
    damage_states(run)
    with pytest.raises(RunFinished):
        plan_resume(run)


def test_states_that_went_away_are_missed(new_run: NewRun) -> None:
    run = new_run()
    misbehave(run, attempt_1={"crash": True, "at": 7}, attempt_2={"crash": True, "at": 7})
    with pytest.raises(TrainerFailed):
        train(run, restarts=1)
    for _, state in list_states(run.states):
        shutil.rmtree(state)
    with pytest.raises(NoWholeState, match="the state of optimizer step 6, from which it went on, is gone"):
        plan_resume(run)
    assert plan_resume(run, step=0).state is None


def test_a_restart_does_not_start_again_over_damaged_states(new_run: NewRun) -> None:
    run = new_run()
    misbehave(run, attempt_1={"crash": True, "at": 7})

    def begin() -> Any:
        damage_states(run)
        attempt, launch = begin_attempt(plan_resume(run))
        return attempt, plain_launch(attempt, launch)

    with pytest.raises(NoWholeState):
        supervise_run(
            run, begin, begin, WatchOptions(restarts=3, first_pause_seconds=0.01), on_event=lambda event: None
        )
    assert len(list_attempts(run)) == 1 and steps(run) == [4, 6]


def test_a_step_without_a_state_lists_those_there_are(new_run: NewRun) -> None:
    run = new_run()
    crash_at(run, 7)
    with pytest.raises(NoSuchState) as missing:
        plan_resume(run, step=5)
    assert "no state at optimizer step 5" in missing.value.message and "4, 6" in missing.value.next_step


def test_a_branch_from_before_the_first_step_lists_the_states_there_are(new_run: NewRun) -> None:
    run = new_run(format=2)
    for advice in ("Train it to its first state.", "States there are: 12."):
        with pytest.raises(NoSuchState) as missing:
            plan_branch(run, "other", step=0)
        assert missing.value.next_step == advice
        state_folder(run.states, 12).mkdir(exist_ok=True)


def test_a_branch_asks_first_whether_its_name_is_taken(new_run: NewRun) -> None:
    """Before a state is looked for and models are hashed, which takes minutes."""
    run = new_run(format=2)
    with pytest.raises(NoSuchState):
        plan_branch(run, "other")
    for name, error in ((run.name, RunExists), ("a/b", UsageError)):
        with pytest.raises(error):
            plan_branch(run, name)


def test_without_a_state_it_starts_again(new_run: NewRun) -> None:
    run = new_run()
    crash_at(run, 1)
    plan = plan_resume(run)
    assert plan.state is None and plan.start_optimizer_step == 0
    assert "from the beginning, as no state is there" in call("resume", run.folder, "--dry-run").stdout
    resume(run)
    report = verify_run(run)
    assert report.is_proved and report.is_finished


def test_going_back_moves_what_came_later(new_run: NewRun) -> None:
    run = new_run()
    train(run)
    final = (run.checkpoints / "r.safetensors").read_bytes()
    for name in ("r-step00000004.safetensors", "r-step00000010.safetensors", "r-000001.safetensors", "other.txt"):
        (run.checkpoints / name).write_bytes(b"")
    with pytest.raises(RunFinished):
        plan_resume(run)
    resume(run, step=6)
    away = run.abandoned / "before-attempt-2"
    moved = sorted(path.name for path in away.rglob("*") if path.parent.name in ("states", "checkpoints"))
    assert moved == [
        "optimizer-step-00000010",
        "optimizer-step-00000012",
        "r-step00000010.safetensors",
        "r.safetensors",
    ]
    assert (away / "checkpoints" / "r.safetensors").read_bytes() == final
    assert (run.checkpoints / "r.safetensors").read_bytes() == final
    report = verify_run(run)
    assert report.is_proved and report.compared == 6 * 4
    assert [line["attempt"] for line in read_metrics(run)] == [1] * 6 + [2] * 6


def test_a_line_left_behind_is_not_taken_up_again(new_run: NewRun) -> None:
    """A crash between the new attempt's record and the moves must not bring the old line back."""
    run = new_run()
    train(run)
    plan = plan_resume(run, step=6)
    begin_attempt(plan)
    for path in (run.abandoned / "before-attempt-2" / "states").iterdir():
        path.rename(run.states / path.name)
    assert steps(run) == [6, 10, 12]
    assert plan_resume(run).start_optimizer_step == 6


def test_the_position_of_epsilon(new_run: NewRun) -> None:
    run = new_run(accumulation=16, processes=4)
    text = run.lock_file.read_text()
    batches = run.lock.batches
    text = text.replace(f"\nbatches = {batches}\n", "\nbatches = 1302597\n")
    text = text.replace(f"total_optimizer_steps = {run.lock.total_optimizer_steps}", "total_optimizer_steps = 20354")
    run.lock_file.write_text(text)
    run = Run(run.folder)
    from kohaku_wrap.training.records.saving import fingerprint_of
    from kohaku_wrap.training.records.states import write_state

    def fill(folder: Path) -> None:
        (folder / "network.bin").write_bytes(b"n")

    write_state(run.states, 13600, fill, fingerprint_of(run, 13600, 4))
    told = json.loads(call("resume", run.folder, "--step", 13600, "--dry-run", "--json").stdout)
    assert (told["epoch"], told["micro_batch"]) == (0, 217_600)
    assert [rank["micro_batch"] for rank in told["ranks"]] == [217_600] * 4
    assert [rank["global_position"] for rank in told["ranks"]] == [870_400, 870_401, 870_402, 870_403]
    assert "217,600" in call("resume", run.folder, "--step", 13600, "--dry-run").output


def test_another_number_of_processes_keeps_the_group(new_run: NewRun) -> None:
    run = new_run(accumulation=2, processes=4)
    plan = plan_resume(run, processes=2)
    assert (plan.processes, plan.accumulation) == (2, 4)
    attempt, launch = begin_attempt(plan)
    assert attempt.group == 8
    assert "--num_processes" in launch.argv and launch.argv[launch.argv.index("--num_processes") + 1] == "2"
    assert launch.argv[-1] == "4"
    assert '"MULTI_' in run.accelerate_config.read_text()
    assert plan_resume(run).processes == 2, "the next attempt keeps it"
    with pytest.raises(BadOrder, match="3 processes do not divide"):
        plan_resume(run, processes=3)


def change_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("seed", lambda run: change_text(run.trainer_config, "seed = 31337", "seed = 1")),
        ("train_batch_size", lambda run: change_text(run.trainer_config, "batch_size = 2", "batch_size = 3")),
        ("batch_size", lambda run: change_text(run.dataset_config, "batch_size = 2", "batch_size = 3")),
        ("dataset", lambda run: write_captions(run.folder.parent.parent / "images", 45, "0ther")),
        ("effective_batch", lambda run: change_text(run.lock_file, "effective_batch = 8", "effective_batch = 16")),
        ("learning_rate", lambda run: change_text(run.trainer_config, "seed =", "learning_rate = 1.0\nseed =")),
    ],
)  # fmt: skip
def test_another_run_is_refused(new_run: NewRun, key: str, change: Callable[[Run], None]) -> None:
    run = new_run()
    crash_at(run, 3)
    change(run)
    run = Run(run.folder)
    with pytest.raises(DifferentRun) as refused:
        plan_resume(run)
    assert [problem.where for problem in refused.value.problems] == [key]
    if key != "dataset":
        assert f"--allow {key}" not in refused.value.next_step
        with pytest.raises(UsageError, match=f"--allow {key}: cannot change within a run"):
            plan_resume(run, allow=[key])
        return
    assert f"--allow {key}" in refused.value.next_step
    attempt, _ = begin_attempt(plan_resume(run, allow=[key]))
    record = json.loads((attempt.folder / "attempt.json").read_text())
    assert record["allow"] == [key] and list(record["accepted_differences"]) == [key]
    assert plan_resume(run).allow == {key}, "accepted once, recorded, and so for later attempts too"


def test_what_is_not_as_it_looks_is_said(new_run: NewRun) -> None:
    run = new_run()
    crash_at(run, 3)
    change_text(run.trainer_config, "seed = 31337", "seed = 1")
    change_text(run.lock_file, "effective_batch = 8", "effective_batch = 16")
    with pytest.raises(DifferentRun) as refused:
        plan_resume(Run(run.folder))
    assert "was 31337, is now 1; the lock decides, 31337 is trained" in refused.value.message
    assert "the state was made with 4 batches an optimizer step, the run has 8" in refused.value.message
    with pytest.raises(UsageError, match=r"--allow bad-image: there is no such fault or option; did you mean bad-imag"):
        plan_resume(run, allow=["dataset", "bad-image"])


def test_captions_that_were_damaged_since_are_not_trained(new_run: NewRun) -> None:
    run = new_run()
    crash_at(run, 3)
    captions = run.folder.parent.parent / "images" / "captions.arrow"
    captions.write_bytes(captions.read_bytes().replace(b"1girl ||| tag 3 |||", b"1girl ||| tug 3 |||"))
    with pytest.raises(DamagedCaptions, match=r"captions\.arrow: damaged: its rows have the digest"):
        plan_resume(run)  # Told by a dry run, too.
    assert len(list_attempts(run)) == 1


def test_another_base_model_is_refused_and_can_be_accepted(new_run: NewRun, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"weights")
    inputs = {"base_model": str(model), "base_model_sha256": hashlib.sha256(b"weights").hexdigest()}
    run = new_run(inputs=inputs, values={"pretrained_model_name_or_path": str(model)})
    change_text(run.trainer_config, "seed =", f'pretrained_model_name_or_path = "{model}"\nseed =')
    crash_at(run, 3)
    model.write_bytes(b"others!")
    with pytest.raises(DifferentRun) as refused:
        plan_resume(run)
    was, now = inputs["base_model_sha256"][:12], hashlib.sha256(b"others!").hexdigest()[:12]
    assert f"{model}: the sha256 was {was}…, is now {now}…" in refused.value.message
    assert "--allow base_model" in refused.value.next_step
    assert list(plan_resume(run, allow=["base_model"]).differences) == ["base_model"]
    model.unlink()
    with pytest.raises(DifferentRun, match="no such file"):
        plan_resume(run)


def test_all_differences_are_told_at_once(new_run: NewRun) -> None:
    run = new_run()
    crash_at(run, 3)
    change_text(run.trainer_config, "seed = 31337", "seed = 1")
    write_captions(run.folder.parent.parent / "images", 45, "0ther")
    with pytest.raises(DifferentRun, match="2 problems"):
        plan_resume(run)


def test_loader_workers_may_change(new_run: NewRun) -> None:
    run = new_run()
    assert plan_resume(run, workers=3).workers == 3


def test_without_a_name_the_only_unfinished_run_is_meant(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    done, first, second = new_run("done"), new_run("first"), new_run("second")
    train(done)
    monkeypatch.chdir(done.folder.parent.parent)
    result = call("resume", "--dry-run")
    assert isinstance(result.exception, KwrapError) and result.exception.exit_code == 2
    assert str(first.folder) in str(result.exception) and str(second.folder) in str(result.exception)
    assert str(done.folder) not in str(result.exception)
    train(second)
    told = json.loads(call("resume", "--dry-run", "--json").stdout)
    assert told["run"] == str(first.folder)
    train(first)
    assert "no unfinished run" in str(call("resume").exception)
    assert "no such run" in str(call("resume", "third").exception)
    (first.folder / "run.lock.toml").unlink()
    assert "run.lock.toml: missing from this run" in str(call("resume", first.folder).exception)


def test_a_state_of_plain_sd_scripts(new_run: NewRun) -> None:
    run = new_run()
    for name in ("r-step00000002-state", "r-step00000004-state", "r-000001-state"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "r-000001-state" / "train_state.json").write_text('{"current_epoch": 1, "current_step": 3}')
    (run.checkpoints / "another-state").mkdir()
    plan = plan_resume(run, foreign=True)
    assert plan.foreign and plan.state == run.checkpoints / "r-step00000004-state" and plan.start_optimizer_step == 4
    assert plan_resume(run, step=3, foreign=True).state == run.checkpoints / "r-000001-state"
    with pytest.raises(NoSuchState, match="at optimizer step 9"):
        plan_resume(run, step=9, foreign=True)
    given = plan_resume(run, foreign=True, foreign_state=run.checkpoints / "r-step00000002-state")
    assert given.start_optimizer_step == 2
    assert "not provably the same" in call("resume", run.folder, "--foreign", "--dry-run").output
    attempt, _ = begin_attempt(given)
    assert attempt.foreign and list_attempts(run)[0].state == given.state


def test_a_trainer_without_git_is_known_by_its_files(
    new_run: NewRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from an archive; where it lies in another repository, that one's commit means nothing."""
    checkouts = [tmp_path / name for name in ("one", "other")]
    for checkout in checkouts:
        checkout.mkdir()
        (checkout / "sdxl_train_network.py").write_text(f"# {checkout.name}\n")
    known = tuple(SupportedCommit(each.name, each.name * 10, digest_sources(each)) for each in checkouts)
    monkeypatch.setattr(trainer_commits, "SUPPORTED", known)
    run = new_run(run={"engine": "sd-scripts"})
    run.lock_file.write_text(run.lock_file.read_text() + f'[trainer]\ncommit = "{known[0].commit}"\n')
    run = Run(run.folder)
    monkeypatch.setenv("KWRAP_SD_SCRIPTS", str(checkouts[0]))
    assert not list_changes(run)
    monkeypatch.setenv("KWRAP_SD_SCRIPTS", str(checkouts[1]))
    assert [problem.where for problem in list_changes(run)] == ["trainer_commit"]
