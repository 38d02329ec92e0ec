"""One process life within a run: what its workers are told, and what they tell the supervisor."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from kohaku_wrap.errors import KwrapError, command_line, refusing
from kohaku_wrap.files import match_names, parse_json, read_json, read_regular, write_json
from kohaku_wrap.locks import is_lock_free
from kohaku_wrap.steps import Position
from kohaku_wrap.training.records.documents import is_whole, read_json_files, read_records
from kohaku_wrap.training.records.folder import Place, Run
from kohaku_wrap.training.records.lock import Lock
from kohaku_wrap.training.records.signs import Failure, Heartbeat, Phase, leave_sign, read_boot_id, send_output_to

Outcome = Literal["finished", "stopped"]

SUPERVISOR_BEAT = "supervisor-beat"
MESSAGE_LENGTH = 300
"""Of a heartbeat's message, so that a sign of life holds it in any alphabet: JSON takes up to 12 bytes for a character.
"""

RUN_VARIABLE = "KWRAP_RUN"
ATTEMPT_VARIABLE = "KWRAP_ATTEMPT"
MACHINE_VARIABLE = "KWRAP_MACHINE_RANK"
"""Only where several machines train together."""


ATTEMPT_FILE = "attempt.json"
RESULT_FILE = "result.json"

NUMBER = re.compile("[0-9]+")

FORMAT = 2
"""Of `attempt.json`; 1, which has no number, is that of kwrap 0.1."""

KEPT_OTHERWISE = ("run", "differences", "threads")
"""What `attempt.json` does not have under the field's own name: its place, `accepted_differences`, `environment`."""


class BadAttempt(KwrapError):
    """A worker was started without its run, or the attempt's file cannot be read."""


@dataclass(frozen=True)
class Attempt:
    """What a worker needs to know, all of it read from the run's folder."""

    run: Run
    """The run it belongs to."""

    number: int
    """Counted from 1."""

    processes: int
    """W."""

    accumulation: int
    """A; W times A is the same in every attempt of a run."""

    workers: int
    """Loader workers of each process."""

    start_optimizer_step: int
    """Optimizer steps done before this attempt."""

    state: Path | None
    """The state to load, absolute; None for a fresh start."""

    allow: frozenset[str] = field(default_factory=frozenset)
    """Differences and faults that the person accepted, such as `bad-images`."""

    foreign: bool = False
    """Whether `state` was made by plain sd-scripts and has no manifest."""

    machines: int = 1
    """Machines that share the processes evenly; each holds the ranks after those of the one before it."""

    bad_steps: int | None = None
    """Optimizer steps in a row, skipped or without a number as loss, that end it; 0 for never, None for the default."""

    differences: Mapping[str, str] = field(default_factory=dict)
    """The differences that were there and accepted, by key."""

    lineage: Mapping[str, Any] | None = None
    """Of a state that another run wrote: that run's id, options digest, attempt and optimizer step."""

    position: Position | None = None
    """Where its first optimizer step starts, as the plan of the resume computed it; None in attempts of kwrap 0.1."""

    address: Mapping[str, Any] = field(default_factory=dict)
    """Options of `accelerate launch` that say where machine 0 is, where the lock's are of another place."""

    threads: int | None = field(default=None, compare=False)
    """OMP_NUM_THREADS of each process, or of the attempt before while it is only planned; None for the default."""

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> Attempt:
        """The attempt that this process belongs to, from KWRAP_RUN and KWRAP_ATTEMPT."""
        environ = os.environ if environ is None else environ
        try:
            run, number = Run(Path(environ[RUN_VARIABLE]).resolve()), int(environ[ATTEMPT_VARIABLE])
        except (KeyError, ValueError):
            raise BadAttempt(
                f"{RUN_VARIABLE} and {ATTEMPT_VARIABLE} do not name an attempt",
                "Workers are started by `kwrap train` and `kwrap resume`.",
            ) from None
        return read_attempt(run, number)

    @property
    def lock(self) -> Lock:
        return self.run.lock

    @property
    def start(self) -> Position:
        """Where its first optimizer step starts, for its workers. Raises BadAttempt where its file does not tell."""
        if self.position is None:
            raise BadAttempt(
                f"{self.folder}: the attempt has no position", f"Go on with: {command_line('resume', self.run.folder)}"
            )
        return self.position

    @property
    def begins_branch(self) -> bool:
        """Whether it starts from the state of another run that its run is a branch of."""
        return self.state is not None and self.state == self.run.origin_state

    @property
    def group(self) -> int:
        return self.processes * self.accumulation

    @property
    def folder(self) -> Path:
        return self.run.attempts / str(self.number)

    stop_file = Place("stop")
    supervisor_lock = Place("supervisor.lock")

    @property
    def processes_here(self) -> int:
        """Processes of one machine."""
        return self.processes // self.machines

    def watch_beat(self, beat: int) -> None:
        """Let other machines see that the supervisor is at work."""
        leave_sign(self.folder / SUPERVISOR_BEAT, str(beat))

    def read_watch_beat(self) -> str:
        """The supervisor's last sign of life; clocks of machines differ, so only its change means something."""
        try:
            return read_regular(self.folder / SUPERVISOR_BEAT)
        except (OSError, ValueError):
            return ""

    def leave(self, machine_rank: int, why: str) -> None:
        """Tell machine 0 that this machine trains no longer in the attempt; it then ends it."""
        document = {"machine_rank": machine_rank, "why": why, "unix_seconds": time.time()}
        write_json(self.folder / f"machine-{machine_rank:03d}-left.json", document)

    def machines_left(self) -> list[tuple[str, float]]:
        """What machines said when they left, and when, by rank."""
        documents = read_json_files(self.folder, "machine-*-left.json")
        return [(str(document["why"]), float(document["unix_seconds"])) for document in documents]

    def log_file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:03d}.log"

    def request_stop(self) -> None:
        """Ask the workers to finish their optimizer step, save a state and end."""
        self.stop_file.touch()

    def stop_requested(self) -> bool:
        """Whether to stop: on request, or because the supervisor is gone.

        Ranks can see it at different moments: let rank 0 read it once an optimizer step and tell the others.
        """
        return self.stop_file.exists() or is_lock_free(self.supervisor_lock)

    def stop_on_signals(self) -> None:
        """Turn SIGINT and SIGTERM into a stop request; torchrun forwards them to every rank."""

        def request(_signal: int, _frame: object) -> None:
            self.request_stop()

        signal.signal(signal.SIGINT, request)
        signal.signal(signal.SIGTERM, request)

    def open_log(self, rank: int) -> None:
        """Send this process's output, Python's and that of libraries, to the rank's log.

        SIGUSR1 then writes the stacks of all threads there, which the supervisor asks for before it ends a hang.
        """
        send_output_to(self.log_file(rank))
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)

    def beat(self, rank: int, phase: Phase, optimizer_step: int, micro_batch: int = 0, message: str = "") -> None:
        """Leave a sign of life; about 20 microseconds, so once a micro-batch is cheap enough."""
        beat = Heartbeat(
            rank,
            os.getpid(),
            phase,
            optimizer_step,
            micro_batch,
            time.time(),
            message[:MESSAGE_LENGTH],
            time.monotonic(),
            read_boot_id(),
        )
        leave_sign(self.folder / f"heartbeat-rank-{rank:03d}.json", json.dumps(asdict(beat)))

    def heartbeats(self) -> list[Heartbeat]:
        """The last sign of life of each rank, by rank."""
        return read_records(self.folder, "heartbeat-rank-*.json", Heartbeat)

    def fail(self, failure: Failure) -> None:
        """Leave the reason of a failure for the supervisor; the worker then exits with a code other than 0."""
        document = asdict(replace(failure, unix_seconds=time.time()))
        write_json(self.folder / f"failure-rank-{failure.rank:03d}.json", document)

    def failures(self) -> list[Failure]:
        """What the ranks said about their failures, by rank."""
        return read_records(self.folder, "failure-rank-*.json", Failure)

    def finish(self, outcome: Outcome, optimizer_step: int) -> None:
        """Rank 0's last word: all steps are done, or a stop was asked for and its state is saved."""
        result = {"outcome": outcome, "optimizer_step": optimizer_step, "unix_seconds": time.time()}
        write_json(self.folder / RESULT_FILE, result)

    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None."""
        found = read_json(self.folder / RESULT_FILE)
        return found if is_whole(found.get("optimizer_step")) and "outcome" in found else None


def write_attempt(attempt: Attempt, environment: Mapping[str, str]) -> None:
    """Make the attempt's folder and `attempt.json`, with its environment."""
    state = attempt.state
    if state is not None and state.is_relative_to(attempt.run.folder):
        state = state.relative_to(attempt.run.folder)
    document: dict[str, Any] = {"format": FORMAT}
    document |= {each.name: getattr(attempt, each.name) for each in fields(Attempt) if each.name not in KEPT_OTHERWISE}
    document |= {
        "state": None if state is None else str(state),
        "allow": sorted(attempt.allow),
        "accepted_differences": dict(attempt.differences),
        "position": None if attempt.position is None else asdict(attempt.position),
        "started_unix_seconds": time.time(),
        "environment": dict(environment),
    }
    attempt.folder.mkdir(parents=True)
    write_json(attempt.folder / ATTEMPT_FILE, document)


def read_attempt(run: Run, number: int) -> Attempt:
    """One attempt of a run; raises BadAttempt when its file is missing, not what it should be, or of a later kwrap."""
    path = run.attempts / str(number) / ATTEMPT_FILE
    with refusing(BadAttempt, f"{path}: cannot be read", "Restore the run's folder, or start a new run."):
        document = parse_json(read_regular(path))
        if document.get("format", 1) not in range(1, FORMAT + 1):
            raise BadAttempt(
                f"{path}: has format {document['format']}; this kwrap reads 1 to {FORMAT}",
                "Go on with the kwrap that made the attempt, or a newer one.",
            )
        state = document["state"]
        threads = document.get("environment", {}).get("OMP_NUM_THREADS", "")
        return Attempt(
            run=run,
            number=number,
            processes=int(document["processes"]),
            accumulation=int(document["accumulation"]),
            workers=int(document["workers"]),
            start_optimizer_step=int(document["start_optimizer_step"]),
            state=None if state is None else run.folder / state,
            allow=frozenset(document["allow"]),
            foreign=bool(document.get("foreign", False)),
            machines=int(document.get("machines", 1)),
            bad_steps=None if document.get("bad_steps") is None else int(document["bad_steps"]),
            differences=dict(document.get("accepted_differences", {})),
            lineage=document.get("lineage"),
            position=Position(**document["position"]) if document.get("position") else None,
            address=dict(document.get("address", {})),
            threads=int(threads) if threads.isascii() and threads.isdecimal() else None,
        )


def attempt_numbers(run: Run) -> list[int]:
    """The numbers of all attempts, whole or not, ascending; other folders are none."""
    return sorted(int(name[0]) for name, _ in match_names(run.attempts, NUMBER))


def list_attempts(run: Run) -> list[Attempt]:
    """All attempts of a run, by number."""
    numbers = attempt_numbers(run)
    return [read_attempt(run, number) for number in numbers if (run.attempts / str(number) / ATTEMPT_FILE).exists()]


def last_kept_steps(attempts: list[Attempt]) -> dict[int, float]:
    """For each attempt the last optimizer step that still counts: later ones were trained again by a later attempt."""
    kept: dict[int, float] = {}
    limit = float("inf")
    for attempt in sorted(attempts, key=lambda each: each.number, reverse=True):
        kept[attempt.number] = limit
        limit = min(limit, attempt.start_optimizer_step)
    return kept
