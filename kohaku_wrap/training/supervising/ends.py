"""How an attempt ended, told from its exit code, what its ranks left behind and their logs; and what to do then."""

from __future__ import annotations

import re
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import command_line
from kohaku_wrap.files import read_tail, write_json
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.bad_steps import KEY_IN_STATE
from kohaku_wrap.training.records.documents import read_record
from kohaku_wrap.training.records.metrics import iterate_lines
from kohaku_wrap.training.records.states import read_manifests
from kohaku_wrap.training.supervising.causes import find_first_cause
from kohaku_wrap.training.supervising.memory_kills import describe_sigkill

TAIL_LINES = 12
REPORT_LINES = 200
TAIL_BYTES = 1 << 16
TIGHT_BYTES = 1 << 16
"""A disk with less room is taken for full."""

LAUNCHER_LOG = "launcher.log"
END_FILE = "end.json"

OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|out of memory|can't allocate memory|Cannot allocate memory|MemoryError|"
    r"CUBLAS_STATUS_ALLOC_FAILED"
)

KILLED_BY_SYSTEM = re.compile(r"Signals\.SIGKILL|Signal 9 \(SIGKILL\)|exitcode\s*:\s*-9\b|killed by signal: Killed")
"""What accelerate, torchrun and a loader say of a process that was killed."""

FINISHED = "finished"
STOPPED = "stopped"
KILLED = "killed"
LASTING = frozenset({"bad-image", "bad-state", "refused", "mostly-skipped"})
"""Failures that the next attempt would only repeat."""


@dataclass(frozen=True)
class AttemptEnd:
    """The last word about an attempt, kept as `attempts/N/end.json`."""

    kind: str
    """`finished`, `stopped`, `killed` (by a second signal), `crash`, `hang`, `non-finite-loss`, `mostly-skipped`,
    `nan-latents`, `out-of-memory`, `exited-early`, `bad-image`, `disk-full`, `bad-state` or `refused`."""

    message: str
    """One line for people."""

    optimizer_step: int
    """Optimizer steps done, as far as it got."""

    exit_code: int | None
    """Of the launcher; negative for a signal; None when it was ended by kwrap."""

    unix_seconds: float
    """When it ended."""

    phase: str = ""
    """What it was doing."""

    rank: int | None = None
    """Of the process that failed first, where that is known."""

    is_lasting: bool = False
    """Whether the next attempt would only meet the same fault, whatever the kind."""

    next_step: str = ""
    """What to do about it, where a rank knew."""

    @property
    def is_failure(self) -> bool:
        return self.kind not in (FINISHED, STOPPED, KILLED)

    @property
    def may_restart(self) -> bool:
        return self.is_failure and self.kind not in LASTING and not self.is_lasting


def judge_end(attempt: Attempt, exit_code: int, memory_kills: int | None = None) -> AttemptEnd:
    """What an attempt that ended by itself came to.

    `memory_kills`: as `count_memory_kills` was when it began.
    """
    done = steps_done(attempt)
    total = attempt.lock.total_optimizer_steps
    result = attempt.result()

    def end(kind: str, message: str, rank: int | None = None) -> AttemptEnd:
        beats = attempt.heartbeats()
        phase = next((beat.phase for beat in beats if rank in (None, beat.rank)), "start-up")
        return AttemptEnd(kind, message, done, exit_code, time.time(), phase, rank)

    # Whatever the exit code: a signal to all processes ends the launcher too, after everything is on disk.
    if result and result["outcome"] == FINISHED and result["optimizer_step"] >= total:
        return end(FINISHED, f"all {total:,} optimizer steps are done")
    if result and result["outcome"] == STOPPED:
        return end(STOPPED, f"stopped after optimizer step {result['optimizer_step']:,}, its state is saved")
    cause = find_first_cause(attempt, done, memory_kills)
    if cause is not None and cause.is_explained:
        found = end(cause.kind, cause.message, cause.rank)
        return replace(found, is_lasting=cause.is_lasting, next_step=cause.next_step)
    if exit_code == 0:
        return end(
            "exited-early",
            f"the trainer ended with exit code 0 after {done:,} of {total:,} optimizer steps",
        )
    if shutil.disk_usage(attempt.folder).free < TIGHT_BYTES:
        return end("disk-full", f"the disk is full, {attempt.folder} could not be written")
    rank = cause.rank if cause is not None else None
    who = "" if rank is None else f"rank {rank}: "
    # The launcher's log tells of the ranks that torchrun killed, too.
    tails = log_tails(attempt, REPORT_LINES) if rank is None else {"": tail_of(attempt.log_file(rank), REPORT_LINES)}
    text = "\n".join(line for lines in tails.values() for line in lines)
    if OUT_OF_MEMORY.search(text):
        return end("out-of-memory", f"{who}out of memory after optimizer step {done:,}", rank)
    if exit_code == -signal.SIGKILL or KILLED_BY_SYSTEM.search(text):
        why = "killed by SIGKILL after optimizer step"
        return end("crash", f"{who}{why} {done:,}, {describe_sigkill(memory_kills)}", rank)
    if cause is not None:
        return end(cause.kind, cause.message, rank)
    return end("crash", f"the trainer ended with exit code {exit_code} after optimizer step {done:,}")


def steps_done(attempt: Attempt) -> int:
    """Optimizer steps that the attempt got to, by its metrics and heartbeats."""
    steps = [attempt.start_optimizer_step]
    steps += [beat.optimizer_step for beat in attempt.heartbeats()]
    steps += [
        int(line["optimizer_step"]) for line in last_lines(attempt.run.metrics) if line["attempt"] == attempt.number
    ]
    return max(steps)


def last_lines(metrics: Path) -> list[dict[str, Any]]:
    """The last few hundred lines of the metrics; the rest of a long run need not be read for its end."""
    try:
        size_bytes = metrics.stat().st_size
    except FileNotFoundError:
        return []
    return [line for line in iterate_lines(metrics, start=max(0, size_bytes - TAIL_BYTES)) if "attempt" in line]


def write_end(attempt: Attempt, end: AttemptEnd) -> None:
    """Keep an end beside its logs; the person is told of it even where the disk has no room for it."""
    with suppress(OSError):
        write_json(attempt.folder / END_FILE, asdict(end))


def read_end(attempt: Attempt) -> AttemptEnd | None:
    """How the attempt ended; None while it runs, when its supervisor was killed with it, or the disk was full."""
    return read_record(attempt.folder, END_FILE, AttemptEnd)


def log_tails(attempt: Attempt, lines: int = TAIL_LINES) -> dict[str, list[str]]:
    """The last lines of each rank's log, and of the launcher's where no rank told why it failed, by file name."""
    paths = sorted(attempt.folder.glob("rank-*.log"))
    if not attempt.failures():
        paths = [attempt.folder / LAUNCHER_LOG, *sorted(attempt.folder.glob("launcher-machine-*.log")), *paths]
    tails = {path.name: tail_of(path, lines) for path in paths}
    return {name: tail for name, tail in tails.items() if tail}


def tail_of(path: Path, lines: int) -> list[str]:
    try:
        text = read_tail(path, TAIL_BYTES)
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def go_back(attempt: Attempt) -> str:
    """How to go on from before the steps that were skipped or had no number as loss."""
    for step, manifest in reversed(list(read_manifests(attempt.run.states))):
        if not manifest.extra.get(KEY_IN_STATE, {}).get("in_a_row"):
            resume = command_line("resume", attempt.run.folder, "--step", step)
            return f"the newest state from before they went wrong: {resume}"
    return "no state is from before they went wrong: start a new run, with lower rates or bf16"


def advice_after(attempt: Attempt, end: AttemptEnd) -> str:
    """What to do after a failure: by its kind, else as a rank said."""
    resume = command_line("resume", attempt.run.folder)
    advice = {
        "bad-image": "Remove the image and run `kwrap extract` again, which makes it anew, or put one that "
        f"`kwrap import` linked back where it lay; then: {resume}. "
        f"Or train a substitute in its place: {resume} --allow bad-images",
        "out-of-memory": f"Lower [machine] batch_per_gpu for a new run, or free memory; then: {resume}",
        "disk-full": f"Free some space, then: {resume}",
        "mostly-skipped": "Start a new run with lower rates, or with bf16 in place of fp16. The last network is there.",
        "non-finite-loss": f"Look at the last losses with `{command_line('status', attempt.run.folder)}`; "
        + go_back(attempt),
        "nan-latents": f"Fix the VAE's precision for a new run, or accept it: {resume} --allow nan-latents",
        "bad-state": f"Choose another state: {resume} --step N",
        "hang": f"The stacks of the hang are in the logs under {attempt.folder}. Go on with: {resume}",
        "exited-early": f"The logs under {attempt.folder} may say why. Go on with: {resume}",
    }
    if end.kind == "bad-image" and attempt.lock.data != "kwrap":
        return f'Fix the image, then: {resume}. Only kwrap\'s dataset (data = "kwrap") can train a substitute.'
    known = f"{end.next_step}\nThen: {resume}" if end.next_step else ""
    return advice.get(end.kind) or known or f"The whole logs are in {attempt.folder}. Go on with: {resume}"
