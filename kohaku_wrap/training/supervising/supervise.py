"""A run watched over: attempts follow each other until it is done, stopped, or not to be saved by another start."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from kohaku_wrap.errors import EXIT_FAILED, EXIT_TRAINER_FAILED, Interrupted, KwrapError, command_line
from kohaku_wrap.locks import holding_lock
from kohaku_wrap.outlets import telling_losses
from kohaku_wrap.processes import start_helper
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.remembered import read_secrets
from kohaku_wrap.training.records.signs import RunLog
from kohaku_wrap.training.records.states import DiskFull, is_disk_full
from kohaku_wrap.training.records.trackers import read_logbook
from kohaku_wrap.training.starting.launch import Launch
from kohaku_wrap.training.supervising.ends import (
    FINISHED,
    KILLED,
    STOPPED,
    AttemptEnd,
    advice_after,
    log_tails,
    tail_of,
    write_end,
)
from kohaku_wrap.training.supervising.hooks import Hook, HookEvent
from kohaku_wrap.training.supervising.pictures import PictureMaker
from kohaku_wrap.training.supervising.processes import end_processes, list_processes
from kohaku_wrap.training.supervising.stop_signals import StopSignals
from kohaku_wrap.training.supervising.watch import AttemptWatch, Event, OnEvent, WatchOptions

FAILURES_AT_ONE_STEP = 3
ORPHAN_PATIENCE_SECONDS = 180.0
SUPERVISOR_LOCK = ".supervisor.lock"


class RunIsBusy(KwrapError):
    """Another kwrap is training this run."""


class TrainerFailed(KwrapError):
    """The run's last attempt failed and none follows."""

    exit_code = EXIT_TRAINER_FAILED

    def __init__(self, attempt: Attempt, end: AttemptEnd, why_last: str) -> None:
        lines = [f"run {attempt.run.name}, attempt {attempt.number}: {end.kind}: {end.message}"]
        if why_last:
            lines.append(why_last)
        for name, tail in log_tails(attempt).items():
            lines.append(f"--- last lines of {attempt.folder / name}")
            lines += tail
        super().__init__("\n".join(lines), advice_after(attempt, end))
        if end.kind == "refused":
            # The trainer did not fail: it was asked for what cannot be.
            self.exit_code = EXIT_FAILED
        self.attempt = attempt
        self.end = end


class RunStopped(Interrupted):
    """A signal stopped the run."""


@dataclass(frozen=True)
class RunReport:
    """What a supervised run came to."""

    run: Run
    """The run."""

    attempts: int
    """Attempts that this supervisor started."""

    optimizer_step: int
    """Optimizer steps done."""


NextAttempt = Callable[[], tuple[Attempt, Launch]]
"""Prepares the next attempt of the run from its newest whole state."""


def supervise_run(
    run: Run,
    first: NextAttempt,
    following: NextAttempt,
    options: WatchOptions,
    on_event: OnEvent,
) -> RunReport:
    """Train a run to its end.

    `first` prepares the first attempt, `following` every restart; both are called while this process holds the run.
    Raises TrainerFailed with the last lines of every log, RunStopped after a signal, RunIsBusy.
    """
    busy = RunIsBusy(f"{run.name}: another kwrap is training it", f"See `{command_line('status', run.folder)}`.")
    log = RunLog(run.folder)
    on_event = log_events(log, on_event)
    failures_at: Counter[int] = Counter()
    pictures = PictureMaker(run, lambda text: on_event(Event("note", text)))
    stop = StopSignals()
    go_on = f"Go on with: {command_line('resume', run.folder)}"
    lock = holding_lock(run.folder / SUPERVISOR_LOCK, busy)
    with lock, stop.caught(), telling_losses(log.note_loss), closing(pictures):
        await_orphans(run, stop, on_event)
        number = 0
        while True:
            number += 1
            attempt, launch = begin(run, first if number == 1 else following)
            watch = AttemptWatch(attempt, launch, options, stop, on_event)
            loggers = Loggers(attempt, lambda text: on_event(Event("note", text)))
            watch.on_look = (pictures.look, loggers.look)
            loggers.start()
            try:
                end = watch.run()
            finally:
                loggers.finish(lambda: stop.count > 1)
            tell_end(attempt, end, watch.hook, on_event)
            if end.kind == FINISHED:
                pictures.finish(lambda: stop.count > 0)
                return RunReport(run, number, end.optimizer_step)
            if end.kind in (STOPPED, KILLED) or stop.count:
                raise RunStopped(f"run {run.name}: {end.message}", go_on)
            failures_at[end.optimizer_step] += 1
            why_last = why_give_up(end, failures_at, number, options)
            if why_last:
                pictures.finish(lambda: stop.count > 0)
                raise give_up(attempt, end, why_last if options.restarts else "")
            pause_seconds = options.pause_before(number)
            on_event(Event("restart", f"restart {number} of {options.restarts} in {pause_seconds:,.0f} s"))
            if stop.wait(pause_seconds):
                raise RunStopped(f"run {run.name}: stopped while waiting for a restart", go_on)


def log_events(log: RunLog, on_event: OnEvent) -> OnEvent:
    """Keep every event but progress in the run's log too."""

    def both(event: Event) -> None:
        if event.kind != "progress":
            log.note(f"{event.kind}: {event.message}")
        on_event(event)

    return both


def begin(run: Run, next_attempt: NextAttempt) -> tuple[Attempt, Launch]:
    """The next attempt; raises DiskFull, with the way on, where its files find no room."""
    try:
        return next_attempt()
    except OSError as error:
        if not is_disk_full(error):
            raise
        go_on = f"Free some space, then: {command_line('resume', run.folder)}"
        raise DiskFull(f"{error.filename or run.folder}: the disk is full", go_on) from error


def await_orphans(run: Run, stop: StopSignals, on_event: OnEvent) -> None:
    """Wait for processes whose supervisor was killed: they save a state and end; then end what is left.

    Raises RunStopped on a signal, which leaves them to their work.
    """
    if not list_processes(run, machine_rank=0):
        return
    on_event(
        Event("note", "an earlier attempt is still running without its supervisor: waiting until it has saved a state")
    )
    waited_seconds = 0.0
    while list_processes(run, machine_rank=0) and waited_seconds < ORPHAN_PATIENCE_SECONDS:
        if stop.wait(0.5):
            go_on = f"Go on with: {command_line('resume', run.folder)}"
            raise RunStopped(f"run {run.name}: stopped while an earlier attempt saves a state and ends", go_on)
        waited_seconds += 0.5
    end_processes(run, machine_rank=0)


def why_give_up(end: AttemptEnd, failures_at: Counter[int], number: int, options: WatchOptions) -> str:
    """Why no attempt follows a failure; empty when one does."""
    if not end.may_restart:
        return "another start would meet the same fault"
    if failures_at[end.optimizer_step] >= FAILURES_AT_ONE_STEP:
        return f"{FAILURES_AT_ONE_STEP} failures after the same optimizer step {end.optimizer_step:,}: giving up"
    if number > options.restarts:
        return f"no restart is left of {options.restarts}"
    return ""


def give_up(attempt: Attempt, end: AttemptEnd, why_last: str) -> TrainerFailed:
    """The failure that ends the run, also recorded with its attempt."""
    if why_last:
        write_end(attempt, replace(end, message=f"{end.message}; {why_last}"))
    return TrainerFailed(attempt, end, why_last)


def tell_end(attempt: Attempt, end: AttemptEnd, hook: Hook, on_event: OnEvent) -> None:
    """Print and hook the end of one attempt."""
    step, total = end.optimizer_step, attempt.lock.total_optimizer_steps
    if end.is_failure:
        message = f"{end.kind}: {end.message}"
        on_event(Event("crash", f"attempt {attempt.number}: {message}", step, total))
        hook.call("crash", message, step)
    else:
        kind: HookEvent = "finish" if end.kind == FINISHED else "stop"
        on_event(Event(kind, end.message, step, total))
        hook.call(kind, end.message, step)


MODULE = "kohaku_wrap.training.supervising.logging_process"
END_SECONDS = 60.0
"""How long the last steps may take to arrive."""


class Loggers:
    """A process for each tool that `log_with` names."""

    def __init__(self, attempt: Attempt, tell: Callable[[str], None]) -> None:
        """`tell` gets a line for people."""
        self.attempt, self.tell = attempt, tell
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start them; what cannot be started is told."""
        run = self.attempt.run
        try:
            book = read_logbook(run)
            key = read_secrets(run).get("wandb_api_key") if "wandb" in book.trackers else None
            for name in book.trackers:
                words, added = (run.folder, self.attempt.number, name), {"WANDB_API_KEY": str(key)} if key else None
                log = self.log_of(name)
                self.children[name] = start_helper(MODULE, *words, log=log, added=added, stdin=subprocess.PIPE)
                self.tell(f"metrics go to {name}: {book.folder}")
        except (KwrapError, OSError, ValueError) as error:
            self.tell(f"metrics are not logged: {error}; the training is not touched")

    def log_of(self, name: str) -> Path:
        """What the process for a tool prints."""
        return self.attempt.folder / f"log-{name}.log"

    def look(self) -> None:
        """Tell of processes that ended too early."""
        for name, child in list(self.children.items()):
            if child.poll() is not None:
                del self.children[name]
                self.tell_end(name, child)

    def tell_end(self, name: str, child: subprocess.Popen[bytes]) -> None:
        """Tell of a failure, and how what is missing is logged."""
        if child.stdin is not None:
            child.stdin.close()
        if child.returncode == 0:
            return
        why = next(iter(tail_of(self.log_of(name), 1)), f"the process ended with code {child.returncode}")
        again = "the next attempt writes what is missing"
        if name == "tensorboard":
            again += f", and so does `{command_line('status', self.attempt.run.folder, '--to', name, 'DIR')}`"
        self.tell(f"metrics are no longer logged to {name}: {why}; the training is not touched; {again}")

    def finish(self, is_hurried: Callable[[], bool]) -> None:
        """Let them write the rest and end, for a while at most, until `is_hurried`."""
        for child in self.children.values():
            if child.stdin is not None:
                child.stdin.close()
        until = time.monotonic() + END_SECONDS
        while any(child.poll() is None for child in self.children.values()):
            if time.monotonic() > until or is_hurried():
                break
            time.sleep(0.1)
        for name, child in self.children.items():
            if child.poll() is None:
                child.kill()
                child.wait()
            self.tell_end(name, child)
        self.children.clear()
