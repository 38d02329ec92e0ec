"""A further machine of a run: its processes start and end with each attempt that machine 0 supervises."""

from __future__ import annotations

import subprocess
import time

from kohaku_wrap.errors import command_line
from kohaku_wrap.locks import holding_lock
from kohaku_wrap.outlets import telling_losses
from kohaku_wrap.trainer.engines import find_engine
from kohaku_wrap.training.comparing.accepting import refuse_changes
from kohaku_wrap.training.comparing.differences import check_captions, list_changes
from kohaku_wrap.training.comparing.site_places import settle_places
from kohaku_wrap.training.records.attempts import Attempt, list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.networks import is_finished
from kohaku_wrap.training.records.signs import RunLog
from kohaku_wrap.training.starting.launch import Launch, plan_attempt_launch
from kohaku_wrap.training.starting.machines import refuse_rank
from kohaku_wrap.training.starting.resume import RunFinished, plan_resume
from kohaku_wrap.training.supervising.ends import FINISHED, KILLED, STOPPED, AttemptEnd, read_end, tail_of
from kohaku_wrap.training.supervising.processes import end_processes, list_processes
from kohaku_wrap.training.supervising.stop_signals import StopSignals
from kohaku_wrap.training.supervising.supervise import RunIsBusy, RunReport, RunStopped, log_events
from kohaku_wrap.training.supervising.watch import Event, EventKind, OnEvent, describe_stop, start_launcher

POLL_SECONDS = 0.3

SILENCE_SECONDS = 180.0
"""Without a sign of life of machine 0's supervisor its attempt is taken for lost. Shared folders show news late."""

LAST_SECONDS = 30.0
"""How long processes may take to end by themselves after an attempt that ended well."""


def check_join(run: Run, machine_rank: int) -> None:
    """Everything that this machine can be refused for, before it waits.

    Raises UsageError for a rank that the run does not have, RunFinished, MissingExtra, MissingRequirements,
    DifferentRun where models, captions or the trainer of this machine are not the run's, DamagedCaptions.
    """
    refuse_rank(run, machine_rank)
    if is_finished(run):
        raise RunFinished(f"run {run.name} is finished", f"Prove it with `{command_line('verify', run.folder)}`.")
    find_engine(run.lock.engine).require_packages()
    attempts = list_attempts(run)
    accepted = attempts[-1].allow if attempts else frozenset()
    places = settle_places(run)
    changes = list_changes(run, places=places)
    refuse_changes(f"run {run.name} on machine {machine_rank}", changes, accepted, run.lock.format)
    check_captions(run.lock.data, places.images, run.lock.dataset_digest)


def describe_join(run: Run, machine_rank: int) -> Launch:
    """This machine's command in the attempt that is under way, else in the next one; nothing is changed."""
    refuse_rank(run, machine_rank)
    attempts = list_attempts(run)
    if attempts and read_end(attempts[-1]) is None:
        return plan_attempt_launch(attempts[-1], machine_rank)
    return plan_attempt_launch(plan_resume(run), machine_rank)


def join_run(run: Run, machine_rank: int, on_event: OnEvent) -> RunReport:
    """Train along until machine 0 says that the run is finished.

    Attempts are machine 0's to make; after one that failed, its next one is awaited. Raises RunStopped after a signal
    here or there, RunIsBusy, and what `check_join` raises.
    """
    check_join(run, machine_rank)
    busy = RunIsBusy(f"{run.name}: another kwrap trains along as machine {machine_rank}", "One is enough.")
    log = RunLog(run.folder)
    on_event = log_events(log, on_event)
    stop = StopSignals()
    go_on = f"Train along again with: {command_line('resume', run.folder, '--machine-rank', machine_rank)}"
    joined = 0
    over = {attempt.number for attempt in list_attempts(run) if read_end(attempt) is not None}
    lock_file = run.folder / f".machine-{machine_rank:03d}.lock"
    with holding_lock(lock_file, busy), stop.caught(), telling_losses(log.note_loss):
        while True:
            on_event(Event("note", f"machine {machine_rank} waits for an attempt of machine 0"))
            attempt = await_attempt(run, machine_rank, over, stop)
            if attempt is None:
                raise RunStopped(f"run {run.name}: machine {machine_rank} was stopped while waiting", go_on)
            over.add(attempt.number)
            joined += 1
            end = MachineWatch(attempt, machine_rank, stop, on_event).run()
            if end.kind == FINISHED:
                on_event(Event("finish", end.message, end.optimizer_step, run.lock.total_optimizer_steps))
                return RunReport(run, joined, end.optimizer_step)
            if end.kind in (STOPPED, KILLED) or stop.count:
                raise RunStopped(f"run {run.name}: {end.message}", go_on)
            on_event(Event("crash", f"attempt {attempt.number}: {end.kind}: {end.message}"))


def await_attempt(run: Run, machine_rank: int, over: set[int], stop: StopSignals) -> Attempt | None:
    """The next attempt that machine 0 is seen to supervise; None after a signal.

    An attempt without an end may be a dead one: only a beat that changes tells that its supervisor lives.
    """
    first_beats: dict[int, str] = {}
    while not stop.count:
        attempts = list_attempts(run)
        newest = attempts[-1] if attempts else None
        if newest is not None and newest.number not in over and newest.machines > machine_rank:
            beat = newest.read_watch_beat()
            if beat and first_beats.setdefault(newest.number, beat) != beat and read_end(newest) is None:
                return newest
        stop.wait(POLL_SECONDS)
    return None


class MachineWatch:
    """This machine's processes in one attempt."""

    def __init__(self, attempt: Attempt, machine_rank: int, stop: StopSignals, on_event: OnEvent) -> None:
        self.attempt = attempt
        self.machine_rank = machine_rank
        self.stop = stop
        self.on_event = on_event
        self.log_file = attempt.folder / f"launcher-machine-{machine_rank:03d}.log"
        self.rank = machine_rank * attempt.processes_here
        self.told_step = -1

    def run(self) -> AttemptEnd:
        """The attempt's end, as machine 0 wrote it or as it looks from here; none of its processes is left here."""
        process = self.start()
        try:
            end = self.follow(process)
            if end.kind in (FINISHED, STOPPED):
                self.await_processes()
        finally:
            end_processes(self.attempt.run, self.attempt.number, self.machine_rank)
            if process is not None:
                process.wait()
        return end

    def start(self) -> subprocess.Popen[bytes] | None:
        """accelerate on this machine; None where it was started before, by a kwrap that was killed."""
        if self.log_file.exists():
            self.tell("note", f"machine {self.machine_rank} was in attempt {self.attempt.number} already")
            return None
        launch = plan_attempt_launch(self.attempt, self.machine_rank)
        self.tell(
            "start", f"machine {self.machine_rank} of {self.attempt.machines} joins attempt {self.attempt.number}"
        )
        return start_launcher(launch, self.log_file)

    def follow(self, process: subprocess.Popen[bytes] | None) -> AttemptEnd:
        """Look at the attempt until machine 0 ends it, or is gone."""
        left = stop_told = False
        beat, beat_at = self.attempt.read_watch_beat(), time.monotonic()
        while True:
            end = read_end(self.attempt)
            if end is not None:
                return end
            if self.stop.count >= 2:
                self.attempt.leave(self.machine_rank, f"machine {self.machine_rank} was ended by a second signal")
                return self.end_here(KILLED, "ended at once by a second signal")
            if self.stop.count and not stop_told:
                stop_told = True
                self.attempt.request_stop()
                self.tell("stop", describe_stop(self.attempt.run))
            if not left and not self.is_training(process):
                left = True
                self.tell_left(process)
            if (now := self.attempt.read_watch_beat()) != beat:
                beat, beat_at = now, time.monotonic()
            if time.monotonic() - beat_at > SILENCE_SECONDS:
                return self.end_here("crash", f"no sign of life of machine 0 for {SILENCE_SECONDS:,.0f} s")
            self.tell_progress()
            time.sleep(POLL_SECONDS)

    def is_training(self, process: subprocess.Popen[bytes] | None) -> bool:
        """Whether a process of the attempt lives on this machine."""
        if process is not None:
            return process.poll() is None
        return bool(list_processes(self.attempt.run, self.attempt.number, self.machine_rank))

    def tell_left(self, process: subprocess.Popen[bytes] | None) -> None:
        """Let machine 0 know that this machine's processes ended otherwise than well."""
        if process is not None and process.returncode == 0:
            return
        code = "were killed" if process is None else f"ended with exit code {process.returncode}"
        why = f"the processes of machine {self.machine_rank} {code}"
        last = tail_of(self.log_file, 1)
        self.attempt.leave(self.machine_rank, why)
        self.tell("note", f"{why}; see {self.log_file}" + (f": {last[0]}" if last else ""))

    def await_processes(self) -> None:
        """Leave the processes the time to end by themselves."""
        deadline = time.monotonic() + LAST_SECONDS
        while time.monotonic() < deadline and list_processes(self.attempt.run, self.attempt.number, self.machine_rank):
            time.sleep(POLL_SECONDS)

    def tell_progress(self) -> None:
        """One line an optimizer step, from the first rank of this machine."""
        step = next((beat.optimizer_step for beat in self.attempt.heartbeats() if beat.rank == self.rank), -1)
        if step != self.told_step:
            self.told_step = step
            phase = f"machine {self.machine_rank} of {self.attempt.machines}, attempt {self.attempt.number}"
            self.on_event(Event("progress", phase, max(step, 0), self.attempt.lock.total_optimizer_steps))

    def end_here(self, kind: str, message: str) -> AttemptEnd:
        """An end that machine 0 did not write."""
        return AttemptEnd(kind, message, max(self.told_step, 0), None, time.time())

    def tell(self, kind: EventKind, message: str) -> None:
        self.on_event(Event(kind, message))
