"""The first cause is named, with its rank: real ranks under the real launcher, and reports as torchrun wrote them."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from plain_runs import misbehave

from kohaku_wrap.training.records.attempts import Attempt, write_attempt
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.signs import Failure
from kohaku_wrap.training.starting.launch import Launch
from kohaku_wrap.training.starting.resume import begin_attempt, plan_resume
from kohaku_wrap.training.supervising import memory_kills, watch
from kohaku_wrap.training.supervising.causes import LOST_CONNECTION
from kohaku_wrap.training.supervising.ends import AttemptEnd, judge_end, read_end, write_end
from kohaku_wrap.training.supervising.status import advise
from kohaku_wrap.training.supervising.supervise import TrainerFailed, supervise_run
from kohaku_wrap.training.supervising.watch import WatchOptions

NewRun = Callable[..., Run]
WORKER = Path(__file__).parent / "two_ranks.py"


def train_two(run: Run) -> AttemptEnd:
    """How an attempt of two real ranks ended."""

    def begin() -> tuple[Attempt, Launch]:
        attempt, launch = begin_attempt(plan_resume(run))
        argv = [*launch.argv[: launch.argv.index("-m")], str(WORKER)]
        return attempt, dataclasses.replace(launch, argv=tuple(argv))

    with pytest.raises(TrainerFailed):
        supervise_run(run, begin, begin, WatchOptions(poll_seconds=0.05), lambda event: None)
    end = read_end(Attempt(run, 1, 2, 2, 0, 0, None))
    assert end is not None
    return end


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "rank", "kind", "words"),
    [
        ("raise later", "raise", 1, "crash", "rank 1: ValueError: this rank fails, as if"),
        ("wait", "SIGKILL", 1, "crash", "rank 1: killed by SIGKILL after"),
        ("wait", "allocate", 1, "out-of-memory", "rank 1: RuntimeError: "),
        ("wait", "exit 0", 1, "exited-early", "rank 1: ended with exit code 0 after optimizer step 3"),
        ("sleep", "exit 0", 1, "exited-early", "rank 1: ended with exit code 0 after optimizer step 3, rank 0 waits"),
    ],
)
def test_the_first_cause_is_named(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, first: str, second: str, rank: int, kind: str, words: str
) -> None:
    pytest.importorskip("torch", reason="two real ranks need torch")
    monkeypatch.setattr(watch, "GONE_SECONDS", 1.0)
    run = new_run(processes=2, accumulation=2)
    misbehave(run, rank_0=first, rank_1=second)  # type: ignore[arg-type]
    end = train_two(run)
    assert (end.kind, end.rank) == (kind, rank), end.message
    assert end.message.startswith(words)
    if "raise" in (first, second):
        log = (run.attempts / "1" / f"rank-{rank:03d}.log").read_text()
        assert "raise ValueError" in log, "the trace is in the log of the rank, wherever its sys.stderr went"


REPORT = """\
W1125 18:24:40.554000 10279 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 100 closing signal
{killed}torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
kohaku_wrap.training.engines.sd_scripts.worker FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-25_18:25:10
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -9 (pid: 100)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 100
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-25_18:24:40
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 101) {name}
  error_file: <N/A>
============================================================
"""
KILLED = "W1125 18:25:10.555000 10279 api.py:1047] Unable to shutdown process 100 via 15, forcefully exiting via 9\n"
LOST = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:37"


@pytest.fixture
def attempt(new_run: NewRun) -> Attempt:
    attempt = Attempt(new_run(processes=2, accumulation=2), 1, 2, 2, 0, 0, None, machines=1)
    write_attempt(attempt, {})
    for rank in (0, 1):
        attempt.beat(rank, "step", 0)
    return attempt


def write_launcher_log(attempt: Attempt, killed: str = KILLED, code: int = 1, name: str = "") -> None:
    (attempt.folder / "launcher.log").write_text(REPORT.format(killed=killed, code=code, name=name))


def test_a_rank_that_torchrun_killed_is_no_cause(attempt: Attempt) -> None:
    """It sat in a collective, where no signal ends it."""
    write_launcher_log(attempt)
    attempt.fail(Failure(1, "error", "RuntimeError: rank 1 dies here, as if out of memory", 0))
    end = judge_end(attempt, 1)
    assert (end.kind, end.rank, end.message) == (
        "crash",
        1,
        "rank 1: RuntimeError: rank 1 dies here, as if out of memory",
    )
    (attempt.folder / "failure-rank-001.json").unlink()
    assert judge_end(attempt, 1).message == "rank 1: ended with exit code 1 after optimizer step 0"
    write_launcher_log(attempt, code=-9, name="(SIGKILL)")
    assert judge_end(attempt, 1).message.endswith(
        "rank 1: killed by SIGKILL after optimizer step 0, by a person or a program (kill -9), or by the system as "
        "memory ran out (see dmesg)"
    )
    write_launcher_log(attempt, killed="", code=-6, name="(SIGABRT)")
    assert judge_end(attempt, 1).rank == 0, "a process aborts where it lost another one"


def test_memory_is_named_where_the_system_counted_a_kill_for_it(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_kills, "ROOT", tmp_path)
    assert memory_kills.count_memory_kills() is None
    group, machine = tmp_path / "sys/fs/cgroup/user.slice/memory.events", tmp_path / "proc/vmstat"
    for path in (group, machine):
        path.parent.mkdir(parents=True)
    machine.write_text("oom_kill 7\n")
    assert memory_kills.count_memory_kills() == 7
    (tmp_path / "proc" / "self").mkdir()
    (tmp_path / "proc" / "self" / "cgroup").write_text("9:name=systemd:/\n0::/user.slice\n")
    group.write_text("low 0\noom 1\noom_kill 2\noom_group_kill 0\n")
    assert memory_kills.count_memory_kills() == 2
    write_launcher_log(attempt, code=-9, name="(SIGKILL)")
    said = "rank 1: killed by SIGKILL after optimizer step 0, "
    assert judge_end(attempt, 1, 1).message == f"{said}as memory ran out (the system counted 1 such kill)"
    for before in (2, None):
        assert judge_end(attempt, 1, before).message.startswith(f"{said}by a person or a program (kill -9), or")


def test_the_count_of_kills_for_memory_is_found_in_cgroup_v1_and_in_containers(tmp_path: Path) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    groups = tmp_path / "proc" / "self" / "cgroup"
    for line, name in (("4:memory:/job", "memory/job/memory.oom_control"), ("0::/docker/1", "memory.events")):
        groups.write_text(f"{line}\n")
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
        assert memory_kills.count_memory_kills(tmp_path) == 3
        path.unlink()
        assert memory_kills.count_memory_kills(tmp_path) is None


def test_lost_connections_come_after_their_cause(attempt: Attempt) -> None:
    attempt.fail(Failure(0, "error", LOST, 2))
    alone = judge_end(attempt, 1)
    assert alone.rank == 0 and alone.message.endswith("; nothing says why its partner was lost")
    attempt.leave(1, "the processes of machine 1 were killed")
    assert judge_end(attempt, 1).message == "the processes of machine 1 were killed"
    attempt.leave(1, "the processes of machine 1 ended with exit code 1")
    assert "machine 1 ended" in judge_end(attempt, 1).message
    time.sleep(0.01)
    attempt.fail(Failure(1, "bad-image", "0003/3.png cannot be read", 2))
    end = judge_end(attempt, 1)
    assert (end.kind, end.rank, end.message) == ("bad-image", 1, "rank 1: 0003/3.png cannot be read")


def test_what_a_rank_knows_to_do_is_the_advice(attempt: Attempt) -> None:
    attempt.fail(Failure(1, "refused", "the cached latents are not those of the run", 2, "Restore the shards."))
    write_end(attempt, judge_end(attempt, 1))
    assert advise(attempt.run) == f"Restore the shards.\nThen: kwrap resume {attempt.run.folder}"


def test_failures_of_an_older_kwrap_have_no_time(attempt: Attempt) -> None:
    document = {"rank": 1, "kind": "error", "message": "ValueError: x", "optimizer_step": 2, "next_step": ""}
    (attempt.folder / "failure-rank-001.json").write_text(json.dumps(document))
    assert judge_end(attempt, 1).message == "rank 1: ValueError: x"


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [
        (LOST, True),
        ("DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3384, remote process exited or there was a", True),
        ("RuntimeError: NCCL communicator was aborted on rank 0.", True),
        ("RuntimeError: [enforce fail] Timed out waiting 1800000ms for recv operation to complete", True),
        ("DistNetworkError: The client socket has timed out after 600000ms while trying to connect", True),
        ("ValueError: a tensor was not what it should be", False),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB", False),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_what_a_rank_says_that_lost_another(message: str, is_lost: bool) -> None:
    assert bool(LOST_CONNECTION.search(message)) == is_lost
