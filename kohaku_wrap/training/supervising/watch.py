"""One attempt from start to end: progress told, hangs and bad numbers found, a stop passed on."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kohaku_wrap.locks import hold_lock, is_alive
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.metrics import (
    APART,
    RATE_WINDOW_STEPS,
    MetricsTail,
    NoMeasurement,
    number_of,
    read_step_seconds,
)
from kohaku_wrap.training.records.signs import Heartbeat, Phase
from kohaku_wrap.training.records.states import list_states
from kohaku_wrap.training.starting.launch import Launch
from kohaku_wrap.training.supervising.ends import (
    KILLED,
    LAUNCHER_LOG,
    STOPPED,
    AttemptEnd,
    judge_end,
    steps_done,
    write_end,
)
from kohaku_wrap.training.supervising.hooks import Hook
from kohaku_wrap.training.supervising.memory_kills import count_memory_kills
from kohaku_wrap.training.supervising.processes import ask_for_stacks, end_processes
from kohaku_wrap.training.supervising.stop_signals import StopSignals
from kohaku_wrap.wording import format_duration

TIMEOUT_SECONDS = 3600.0
"""How long a phase may go without a sign of life. 5.2 million images start in minutes."""

STEP_TIMEOUT_SECONDS = 1800.0
"""The same within an optimizer step. Epsilon's take 50 s."""

NAN_WINDOW_STEPS = 50
NAN_LATENTS_AT_LEAST = 4
LOOKS_PER_BEAT = 5
GONE_SECONDS = 60.0
"""How long the other ranks may be silent after one has ended."""

LEFT_SECONDS = 10.0
"""How long the ranks here may take to end by themselves after another machine's processes did."""


@dataclass(frozen=True)
class WatchOptions:
    """What the supervisor waits for and how often it starts again."""

    restarts: int = 0
    """Further attempts after failures."""

    first_pause_seconds: float = 10.0
    """Before the first restart; doubles with each."""

    longest_pause_seconds: float = 600.0
    """The pauses grow no further."""

    timeouts_seconds: Mapping[Phase, float] = field(default_factory=dict)
    """By phase, in place of STEP_TIMEOUT_SECONDS and TIMEOUT_SECONDS."""

    nan_latents_share: float = 0.05
    """Share of images with NaN latents, over the last NAN_WINDOW_STEPS optimizer steps, that ends an attempt."""

    bad_steps: int | None = None
    """Optimizer steps in a row, skipped or without a number as loss, that end an attempt; 0 for never."""

    ending_seconds: float = 60.0
    """How long processes may take to end once all is written: drivers and libraries may wait there for ever."""

    poll_seconds: float = 0.2
    """Between two looks."""

    hook: str = ""
    """A shell command for start, state, crash, stop and finish."""

    def pause_before(self, restart: int) -> float:
        """Seconds before that restart, counted from 1."""
        # No float holds all powers of two of the thousandth restart.
        return min(self.first_pause_seconds * 2.0 ** min(restart - 1, 60), self.longest_pause_seconds)

    def timeout_of(self, phase: Phase) -> float:
        return self.timeouts_seconds.get(phase, STEP_TIMEOUT_SECONDS if phase == "step" else TIMEOUT_SECONDS)


EventKind = Literal["start", "progress", "state", "pause", "stop", "crash", "restart", "finish", "note"]


@dataclass(frozen=True)
class Event:
    """Something worth a line on the screen."""

    kind: EventKind
    """What happened."""

    message: str
    """One line for people."""

    optimizer_step: int = 0
    """Optimizer steps done."""

    total_optimizer_steps: int = 0
    """Of the whole run."""

    eta_seconds: float | None = None
    """Until the last step, at the present rate."""


OnEvent = Callable[[Event], None]


class AttemptWatch:
    """Starts one attempt and stays with it."""

    def __init__(
        self, attempt: Attempt, launch: Launch, options: WatchOptions, stop: StopSignals, on_event: OnEvent
    ) -> None:
        self.attempt = attempt
        self.launch = launch
        self.options = options
        self.stop = stop
        self.on_event = on_event
        self.on_look: tuple[Callable[[], None], ...] = ()
        self.hook = Hook(options.hook, attempt.run, lambda trouble: self.tell("note", trouble))
        self.total = attempt.lock.total_optimizer_steps
        self.done = attempt.start_optimizer_step
        self.seconds: deque[float] = deque(maxlen=RATE_WINDOW_STEPS)
        self.images: deque[tuple[int, int]] = deque(maxlen=NAN_WINDOW_STEPS)
        self.states_seen = {step for step, _ in list_states(attempt.run.states)}
        self.pause_told = ""
        self.beats_seen: list[Heartbeat] = []
        self.changed_at = time.monotonic()
        self.memory_kills = count_memory_kills()

    def run(self) -> AttemptEnd:
        """The attempt's end, also written beside its logs; no process of it is left."""
        if self.stop.count:
            # A signal came while its state was verified.
            end = AttemptEnd(STOPPED, "stopped before its first step", self.done, None, time.time())
            write_end(self.attempt, end)
            return end
        while (lock := hold_lock(self.attempt.supervisor_lock)) is None:
            # Whoever looks whether it is free holds it for a moment; without it the workers would take us for gone.
            time.sleep(self.options.poll_seconds)
        metrics = MetricsTail(self.attempt.run.metrics, self.attempt.number)
        self.tell("start", f"attempt {self.attempt.number} starts after optimizer step {self.done:,}")
        self.hook.call("start", f"attempt {self.attempt.number}", self.done)
        self.changed_at = time.monotonic()
        process = start_launcher(self.launch, self.attempt.folder / LAUNCHER_LOG)
        try:
            end = self.follow(process, metrics)
        finally:
            end_processes(self.attempt.run, self.attempt.number, 0)
            process.wait()
            os.close(lock)
        self.look_for_states()
        write_end(self.attempt, end)
        return end

    def follow(self, process: subprocess.Popen[bytes], metrics: MetricsTail) -> AttemptEnd:
        """Look at the attempt until it ends or has to be ended."""
        stop_told = False
        looks, left_at = 0, math.inf
        while True:
            looks += 1
            if self.attempt.machines > 1 and looks % LOOKS_PER_BEAT == 0:
                self.attempt.watch_beat(looks)
            exit_code = process.poll()
            for line in metrics.new_lines():
                fault = self.take_line(line)
                if fault is not None:
                    return fault
            self.look_for_states()
            self.look_for_pause()
            for look in self.on_look:
                look()
            if exit_code in (-signal.SIGTERM, -signal.SIGINT) and self.has_ranks():
                # The launcher of a single process dies of a signal to all; the rank saves its state and ends by itself.
                self.attempt.request_stop()
            elif exit_code is not None:
                return judge_end(self.attempt, exit_code, self.memory_kills)
            if self.stop.count >= 2:
                return self.end_now(KILLED, "ended at once by a second signal; the newest state is the last one saved")
            if self.stop.count and not stop_told:
                stop_told = True
                self.attempt.request_stop()
                self.tell("stop", describe_stop(self.attempt.run))
            is_over = self.attempt.result() is not None
            if is_over or (self.attempt.machines > 1 and self.attempt.machines_left()):
                left_at = min(left_at, time.monotonic())
                if time.monotonic() - left_at > (self.options.ending_seconds if is_over else LEFT_SECONDS):
                    end_processes(self.attempt.run, self.attempt.number, 0)
                    return judge_end(self.attempt, 1, self.memory_kills)
            fault = self.find_hang()
            if fault is not None:
                return fault
            time.sleep(self.options.poll_seconds)

    def has_ranks(self) -> bool:
        """Whether a rank of this machine is alive."""
        beats = self.attempt.heartbeats()
        return any(is_alive(beat.pid) for beat in beats if beat.rank < self.attempt.processes_here)

    def take_line(self, line: Mapping[str, Any]) -> AttemptEnd | None:
        """Tell the progress of one optimizer step; an end if its numbers are bad."""
        self.done = int(line["optimizer_step"])
        loss = number_of(line.get("loss"))
        # Under fp16 the GradScaler skips such a step and lowers its scale: nothing is lost.
        skipped = bool(line.get("optimizer_step_skipped", False))
        if not math.isfinite(loss) and not skipped and "non-finite-loss" not in self.attempt.allow:
            return self.end_now("non-finite-loss", f"the loss of optimizer step {self.done:,} is {loss}")
        self.images.append((int(line.get("nan_latents", 0)), int(line.get("images", 0))))
        nan_latents = sum(nan for nan, _ in self.images)
        images = sum(count for _, count in self.images)
        if (
            nan_latents >= NAN_LATENTS_AT_LEAST
            and nan_latents > images * self.options.nan_latents_share
            and "nan-latents" not in self.attempt.allow
        ):
            return self.end_now(
                "nan-latents",
                f"{nan_latents} of the last {images} images had NaN latents by optimizer step {self.done:,}; "
                "a VAE in fp16 does that: set no_half_vae, or use a VAE that is fixed for fp16",
            )
        self.seconds.append(number_of(line.get("seconds")))
        rate = sum(self.seconds) / len(self.seconds)
        eta_seconds = (self.total - self.done) * rate
        text = f"loss {loss:.4f}  lr {number_of(line.get('lr_unet')):.3g}  {rate:.2f} s/step"
        apart = [f"{kind} {line[f'{kind}_seconds']:.1f} s" for kind in APART if line.get(f"{kind}_seconds")]
        text += f"  (besides: {', '.join(apart)})" if apart else ""
        if in_a_row := int(line.get("bad_steps_in_a_row", 0)):
            text += f"  (skipped or no number: {in_a_row} in a row)"
        self.tell("progress", text, eta_seconds)
        return None

    def look_for_states(self) -> None:
        """Tell of states that came since the last look."""
        steps = {step for step, _ in list_states(self.attempt.run.states)}
        for step in sorted(steps - self.states_seen):
            self.states_seen.add(step)
            self.tell("state", f"state of optimizer step {step:,} saved")
            self.hook.call("state", f"state of optimizer step {step}", step)

    def look_for_pause(self) -> None:
        """Tell once why the trainer waits."""
        message = next((beat.message for beat in self.attempt.heartbeats() if beat.phase == "paused"), "")
        if message != self.pause_told:
            self.pause_told = message
            self.tell("pause", message or "the pause is over")

    def find_hang(self) -> AttemptEnd | None:
        """An end if no rank gave a sign of life for the time of its phase.

        Ranks wait for each other, so a rank's silence counts only when all are silent, and the most patient phase
        among them sets the time. Silence is counted by our own clock since a sign of life was last seen to change:
        neither a jump of the time of day nor another machine's clock is taken for a hang.
        """
        beats = self.attempt.heartbeats()
        phases: list[Phase] = [beat.phase for beat in beats] or ["start-up"]
        if len(beats) < self.attempt.processes:
            phases.append("start-up")
        timeout_seconds = max(self.options.timeout_of(phase) for phase in phases)
        if beats != self.beats_seen:
            self.beats_seen, self.changed_at = beats, time.monotonic()
        silent_seconds = time.monotonic() - self.changed_at
        if silent_seconds > min(GONE_SECONDS, timeout_seconds) and (fault := self.find_gone(beats)) is not None:
            return fault
        if silent_seconds <= timeout_seconds:
            return None
        slowest = find_slowest(beats, self.attempt.processes)
        phase = "start-up" if slowest is None else slowest.phase
        rank = "" if slowest is None or self.attempt.processes == 1 else f" of rank {slowest.rank}"
        ask_for_stacks(self.attempt)
        return self.end_now(
            "hang",
            f"no sign of life for {timeout_seconds:,.0f} s in {phase}{rank} after optimizer step {self.done:,}",
            phase,
        )

    def find_gone(self, beats: list[Heartbeat]) -> AttemptEnd | None:
        """An end if a rank here ended well before the others, which then wait for it without an end.

        After any exit code but 0 torchrun ends the others itself. Who saves, samples or waits for room needs no other.
        """
        here = [beat for beat in beats if beat.rank < self.attempt.processes_here]
        gone = [beat for beat in here if not is_alive(beat.pid)]
        waiting = [beat for beat in here if beat not in gone]
        if not gone or not waiting or any(beat.phase not in ("start-up", "step") for beat in waiting):
            return None
        first = min(gone, key=lambda beat: beat.unix_seconds)
        ask_for_stacks(self.attempt)
        return self.end_now(
            "exited-early",
            f"rank {first.rank}: ended with exit code 0 after optimizer step {first.optimizer_step:,}, "
            f"rank {waiting[0].rank} waits for it",
            first.phase,
            first.rank,
        )

    def end_now(self, kind: str, message: str, phase: str = "", rank: int | None = None) -> AttemptEnd:
        """End all processes; the attempt's end, for a reason that kwrap found."""
        end_processes(self.attempt.run, self.attempt.number, 0)
        beats = self.attempt.heartbeats()
        phase = phase or (beats[0].phase if beats else "start-up")
        return AttemptEnd(kind, message, steps_done(self.attempt), None, time.time(), phase, rank)

    def tell(self, kind: EventKind, message: str, eta_seconds: float | None = None) -> None:
        self.on_event(Event(kind, message, self.done, self.total, eta_seconds))


def describe_stop(run: Run) -> str:
    """What a first signal does, with how long a step takes as far as one was measured."""
    try:
        takes = f" (a step takes about {format_duration(max(1.0, read_step_seconds(run)))})"
    except NoMeasurement:
        takes = ""
    return f"finishing the optimizer step{takes} and saving a state; once more to stop at once"


def start_launcher(launch: Launch, log_file: Path) -> subprocess.Popen[bytes]:
    """accelerate in a session of its own, its output in a log."""
    with log_file.open("ab") as log:
        return subprocess.Popen(
            launch.argv,
            cwd=launch.folder,
            env=launch.full_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def find_slowest(beats: list[Heartbeat], processes: int) -> Heartbeat | None:
    """The rank that is furthest behind; None when one has not begun."""
    if len(beats) < processes:
        return None
    return min(beats, key=lambda beat: (beat.optimizer_step, beat.micro_batch, beat.phase == "step", beat.unix_seconds))
