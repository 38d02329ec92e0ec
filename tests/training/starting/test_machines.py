"""Several machines: what a site may say about them, what each of them starts, and who may join a run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from plain_runs import misbehave, train

from kohaku_wrap.cli import program
from kohaku_wrap.config.site import check_accelerate, find_contradictions, load_site
from kohaku_wrap.errors import KwrapError, ProblemsFound, UsageError
from kohaku_wrap.formats.caption_writer import DamagedCaptions
from kohaku_wrap.training.records.attempts import Attempt, read_attempt
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.starting.launch import plan_attempt_launch
from kohaku_wrap.training.starting.resume import ResumePlan, begin_attempt, plan_resume
from kohaku_wrap.training.supervising import join
from kohaku_wrap.training.supervising.ends import read_end
from kohaku_wrap.training.supervising.supervise import TrainerFailed

JOINED = {"num_machines": 2, "main_process_ip": "10.0.0.1", "main_process_port": 29500}
MACHINE = {"gpus": 0, "processes": 4, "accelerate": JOINED}

NewRun = Callable[..., Run]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(program, [str(each) for each in arguments], standalone_mode=False)


def test_processes_of_a_site_are_those_of_all_machines(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        "[machine]\ngpus = 4\n"
        'accelerate = { num_machines = 2, main_process_ip = "10.0.0.1", rdzv_conf = "timeout=3600" }\n'
    )
    machine = load_site(site).machine
    assert (machine.gpus, machine.processes, machine.machines, machine.processes_here) == (4, 8, 2, 4)
    site.write_text("[machine]\naccelerate = 2\n")
    with pytest.raises(ProblemsFound, match="must be a table"):
        load_site(site)


@pytest.mark.parametrize(
    ("table", "where", "words"),
    [
        ({"num_machine": 2}, "num_machine", "did you mean num_machines?"),
        ({"num_machines": "two"}, "num_machines", "not a whole number"),
        ({"num_machines": 2}, "main_process_ip", "is not set"),
        ({**JOINED, "main_process_port": 0}, "main_process_port", "free port of machine 0"),
        ({**JOINED, "machine_rank": 1}, "machine_rank", "--machine-rank"),
        ({**JOINED, "num_processes": 8}, "num_processes", "gpus"),
        ({**JOINED, "use_fsdp": True}, "use_fsdp", "kwrap's to decide"),
    ],
)
def test_options_are_checked_against_accelerates_own(table: dict[str, Any], where: str, words: str) -> None:
    problems = check_accelerate(table)
    assert [problem.where for problem in problems] == [f"machine.accelerate.{where}"]
    assert words in problems[0].what


@pytest.mark.parametrize("machines", ["two", "2", 0, 1.5, [2]])
def test_a_number_of_machines_that_is_none_is_named_without_accelerate_too(machines: object) -> None:
    assert [name for name, _ in find_contradictions({"num_machines": machines})] == ["num_machines"]


def test_each_machine_starts_its_share(new_run: NewRun) -> None:
    run = new_run(processes=4, accumulation=1, machine=MACHINE)
    attempt, launch = begin_attempt(plan_resume(run))
    along = plan_attempt_launch(attempt, machine_rank=1)
    assert (attempt.processes, attempt.machines, attempt.processes_here) == (4, 2, 2)
    assert read_attempt(run, 1) == attempt
    for rank, each in enumerate((launch, along)):
        words = list(each.argv)
        assert words[words.index("--machine_rank") + 1] == str(rank)
        assert words[words.index("--num_machines") + 1] == "2"
        assert words[words.index("--num_processes") + 1] == "4"
        assert words[words.index("--main_process_port") + 1] == "29500"
        assert each.environment["KWRAP_MACHINE_RANK"] == str(rank)
        assert each.environment["PET_RDZV_ID"] == "r-1", "another for each attempt"
    assert 'main_process_ip: "10.0.0.1"' in run.accelerate_config.read_text()


def test_machine_0_may_be_at_another_address(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run(processes=4, accumulation=1, machine=MACHINE)
    begin_attempt(plan_resume(run))

    def plan_at(address: str, machines: int = 2) -> ResumePlan:
        site = tmp_path / "other-site.toml"
        joined = f'num_machines = {machines}, main_process_ip = "{address}"'
        site.write_text(f"[machine]\ngpus = 0\nprocesses = 2\naccelerate = {{ {joined} }}\n")
        return plan_resume(run, site_file=site)

    plan = plan_at("10.0.0.7")
    assert any("machine 0: main_process_ip = 10.0.0.7" in note for note in plan.notes)
    attempt, launch = begin_attempt(plan)
    for each in (launch, plan_attempt_launch(read_attempt(run, 2), machine_rank=1)):
        words = list(each.argv)
        assert words[words.index("--main_process_ip") + 1] == "10.0.0.7"
        assert words[words.index("--main_process_port") + 1] == "29500", "the lock's, which the site does not name"
    assert 'main_process_ip: "10.0.0.7"' in run.accelerate_config.read_text()
    assert attempt.address == plan_resume(run).address, "the next one is there, too"
    assert not any("machine 0" in note for note in plan_at("10.0.0.7").notes), "it is known by now"
    assert not plan_at("10.0.0.8", machines=3).notes[-1].startswith("taken"), "a site of other machines says nothing"


def test_a_run_goes_on_with_fewer_machines(new_run: NewRun) -> None:
    run = new_run(processes=4, accumulation=1, machine=MACHINE)
    plan = plan_resume(run, machines=1)
    assert (plan.machines, plan.processes, plan.accumulation) == (1, 2, 2)
    words = plan_attempt_launch(plan).argv
    assert "--num_machines" not in words
    assert "--machine_rank" not in words
    with pytest.raises(UsageError, match="1 processes cannot be shared by 2 machines"):
        plan_resume(run, processes=1)
    with pytest.raises(UsageError, match="made for 1 machine, not for 2"):
        plan_resume(new_run("s"), machines=2)


def test_who_may_join(new_run: NewRun) -> None:
    run, alone = new_run(processes=4, accumulation=1, machine=MACHINE), new_run("alone")
    shown = call("resume", run.folder, "--machine-rank", 1, "--dry-run", "--json")
    argv = json.loads(shown.stdout)["argv"]
    assert argv[argv.index("--machine_rank") + 1] == "1"
    assert "--machine_rank 1" in call("resume", run.folder, "--machine-rank", 1, "--dry-run").stdout
    assert not list(run.attempts.iterdir())
    refused = {
        "no machine of rank 2": (run.folder, "--machine-rank", 2),
        "is of one machine": (alone.folder, "--machine-rank", 1),
        "no such run": (run.folder.with_name("none"), "--machine-rank", 1),
        "--step, --restarts: for machine 0": (run.folder, "--machine-rank", 1, "--step", 4, "--restarts", 2),
    }
    for words, arguments in refused.items():
        error = call("resume", *arguments).exception
        assert isinstance(error, KwrapError)
        assert words in error.message
        assert error.exit_code == 2


def test_a_machine_whose_own_captions_are_damaged_does_not_join(new_run: NewRun) -> None:
    run = new_run(processes=4, accumulation=1, machine=MACHINE)
    join.check_join(run, 1)
    captions = run.folder.parent.parent / "images" / "captions.arrow"
    captions.write_bytes(captions.read_bytes().replace(b"1girl ||| tag 3 |||", b"1girl ||| tug 3 |||"))
    with pytest.raises(DamagedCaptions, match="its rows have the digest"):
        join.check_join(run, 1)


def test_an_attempt_that_another_machine_left_is_ended(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the ranks here would wait for it inside a collective."""
    monkeypatch.setattr("kohaku_wrap.training.supervising.watch.LEFT_SECONDS", 0.1)
    run = new_run(processes=2, accumulation=2, machine={**MACHINE, "processes": 2})
    misbehave(run, every={"hang": "step"})

    def leave() -> None:
        attempt_folder = run.attempts / "1"
        while not (attempt_folder / "supervisor-beat").exists():
            time.sleep(0.01)
        read_attempt(run, 1).leave(1, "the processes of machine 1 were killed")

    machine = threading.Thread(target=leave)
    machine.start()
    with pytest.raises(TrainerFailed, match="the processes of machine 1 were killed"):
        train(run)
    machine.join()


def test_an_attempt_whose_supervisor_is_gone_is_not_joined(new_run: NewRun) -> None:
    """Its last beat stays where it was."""
    run = new_run(processes=2, accumulation=2, machine={**MACHINE, "processes": 2})
    attempt: Attempt
    attempt, _ = begin_attempt(plan_resume(run))
    attempt.watch_beat(5)

    class Stop:
        count = 0

        def wait(self, seconds: float) -> bool:
            self.count += 1
            return False

    assert read_end(attempt) is None
    assert join.await_attempt(run, 1, set(), Stop()) is None  # type: ignore[arg-type]

    class Beating(Stop):
        def wait(self, seconds: float) -> bool:
            attempt.watch_beat(6)
            return False

    assert join.await_attempt(run, 1, set(), Beating()) == attempt  # type: ignore[arg-type]
