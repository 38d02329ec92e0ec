"""Train through `kwrap`, and end it with SIGKILL at a planned moment: the whole tree of processes, without warning."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.processes import count_cores, python_command, safe_environment
from kohaku_wrap.training.records.attempts import ATTEMPT_FILE, Attempt, list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.supervising.processes import end_processes, send_signal

POLL_SECONDS = 0.02
SLICE_SECONDS = 0.005
"""A state of the tiny model is written in some tenths of a second."""

LINES_SHOWN = 6

PLAIN_WORKER = "kohaku_wrap.training.engines.sd_scripts.plain"
"""What runs sd-scripts' own script."""

ON_THE_CPU = {
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "LYCORIS_KERNEL_BACKEND": "torch",
    "LYCORIS_KERNEL_TUNE": "off",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""The variables of a training on the CPU that is not started by `kwrap`."""


class ProcessFailed(KwrapError):
    """A command of the proof ended otherwise than planned."""


class Children:
    """The commands that run now, so that an interrupt of the proof ends them, be they in groups of their own."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.ended = False

    @contextmanager
    def start(
        self, command: Sequence[str], stream: IO[bytes], environment: Mapping[str, str] | None, **how: Any
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A command that prints to `stream`. Raises ProcessFailed where the proof was interrupted before."""
        environment = safe_environment(environment)
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT, **how)
        self.running.add(process)
        try:
            if self.ended:
                end_tree(process)
                raise ProcessFailed("the proof was interrupted", "Start it again.")
            yield process
        except BaseException:
            end_tree(process)
            raise
        finally:
            self.running.discard(process)

    def end(self) -> None:
        self.ended = True
        for process in list(self.running):
            end_tree(process)


CHILDREN = Children()


@contextmanager
def training_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that start trainings, one a core; what ends the block early ends these trainings too."""
    CHILDREN.ended = False
    with ThreadPoolExecutor(max_workers=count_cores()) as pool:
        try:
            yield pool
        except BaseException:
            CHILDREN.end()
            raise


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all that it started."""
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for each in psutil.Process(process.pid).children(recursive=True):
                send_signal(each.pid, signal.SIGKILL)
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Kill:
    """When to kill an attempt."""

    epochs: float = 0.0
    """Not before this share of the run's first epoch is trained; beyond 1 in later epochs."""

    in_state: bool = False
    """Wait from then for the next state, and kill while it is being written."""

    to_end: bool = False
    """Let the attempt reach the end of the run instead; the next one makes it longer."""


def command_of(arguments: tuple[str, ...]) -> list[str]:
    return python_command("-m", "kohaku_wrap", *arguments)


def run_kwrap(arguments: tuple[str, ...], log: Path, environment: Mapping[str, str] | None = None) -> None:
    """One `kwrap` command to its end, with `environment` added. Raises ProcessFailed with its last lines."""
    if exit_code := run_logged(command_of(arguments), log, environment):
        raise failed(arguments, exit_code, log)


def run_logged(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout_seconds: float | None = None,
) -> int:
    """The exit code of a command that runs in `folder`; what it prints goes to the end of `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream, CHILDREN.start(command, stream, environment, cwd=folder) as process:
        return process.wait(timeout_seconds)


def failed(arguments: tuple[str, ...], exit_code: int, log: Path) -> ProcessFailed:
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LINES_SHOWN:]
    return ProcessFailed(
        f"`kwrap {arguments[0]}` ended with exit code {exit_code}; its last lines: {' | '.join(last)}", f"See {log}."
    )


def train_with_kills(
    run: Run,
    arguments: tuple[str, ...],
    kills: tuple[Kill, ...],
    workers: tuple[int, ...],
    logs: Path,
    environment: Mapping[str, str] | None = None,
    longer: Mapping[int, Sequence[str]] | None = None,
    branched: int = 0,
    moved: int = 0,
) -> Run:
    """Train to the end: `arguments` starts the run, each kill ends an attempt, `kwrap resume` starts the next one.

    `workers`: loader workers of each attempt. `longer`: attempts that `kwrap extend` starts instead, with its options.
    `branched`: the attempt that `kwrap branch` starts instead, as the first one of a new run; `moved`: the attempt
    before which the run's folder is moved and renamed. Returns the run as it is then. Raises ProcessFailed when a
    process ends by itself before its kill, or the last one does not finish.
    """
    logs.mkdir(parents=True, exist_ok=True)
    before = 0
    for number in range(len(kills) + 1):
        if number and number + 1 == moved:
            run = move_run(run)
        if number and number + 1 == branched:
            new = Run(run.folder.with_name(f"{run.name}-branch"))
            arguments = ("branch", str(run.folder), "--run", new.name)
            run, before = new, number
        elif number:
            loaders = workers[min(number, len(workers) - 1)]
            options = (longer or {}).get(number + 1)
            verb = ("resume",) if options is None else ("extend", *options)
            arguments = (*verb, str(run.folder), "--workers", str(loaders))
        log = logs / f"{run.name}-{number + 1}.log"
        if number == len(kills) or kills[number].to_end:
            run_kwrap(arguments, log, environment)
            continue
        kill_midway(run, arguments, kills[number], number + 1 - before, log, environment)
    return run


def cache_with_kill(arguments: tuple[str, ...], latents: Path, log: Path) -> None:
    """Let `kwrap cache` make its first shard, kill it, and let it go on to its end. Raises ProcessFailed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = command_of(arguments)
    with log.open("wb") as stream, CHILDREN.start(command, stream, None, start_new_session=True) as process:
        while process.poll() is None and not any(latents.glob("*/0*.json")):
            time.sleep(POLL_SECONDS)
        end_tree(process)
    if not any(latents.glob("*/0*.json")):
        raise failed(arguments, process.returncode, log)
    run_kwrap(arguments, log)


def move_run(run: Run) -> Run:
    """The run in another folder, under another name, as a person moves it."""
    target = run.folder.parent / "elsewhere" / f"{run.name}-renamed"
    target.parent.mkdir(exist_ok=True)
    shutil.move(run.folder, target)
    return Run(target)


def kill_midway(
    run: Run,
    arguments: tuple[str, ...],
    kill: Kill,
    attempt_number: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Start a command and kill it, with every process below it, at the planned moment."""
    command = command_of(arguments)
    with log.open("wb") as stream, CHILDREN.start(command, stream, environment, start_new_session=True) as process:
        while process.poll() is None:
            attempt = find_attempt(run, attempt_number)
            if attempt is not None and is_moment(attempt, kill):
                if kill.in_state and not stop_in_state(process, attempt):
                    break
                kill_all(process, attempt)
                return
            time.sleep(POLL_SECONDS)
        if process.wait() == 0:
            raise ProcessFailed(f"`kwrap {arguments[0]}` trained to the end before the planned kill", f"See {log}.")
        raise failed(arguments, process.returncode, log)


def find_attempt(run: Run, number: int) -> Attempt | None:
    """The attempt of that number, once it is there."""
    if not (run.attempts / str(number) / ATTEMPT_FILE).exists():
        return None
    return next((attempt for attempt in list_attempts(run) if attempt.number == number), None)


def is_moment(attempt: Attempt, kill: Kill) -> bool:
    """Whether every process of the attempt has come far enough."""
    count = attempt.lock.count
    accumulation = count.accumulation(attempt.processes)
    wanted = int(kill.epochs * count.micro_batches_per_process(attempt.processes))
    beats = attempt.heartbeats()
    if len(beats) < attempt.processes:
        return False
    done = min(beat.micro_batch for beat in beats) + attempt.start_optimizer_step * accumulation
    if not kill.in_state and accumulation > 1 and done % accumulation == 0:
        # Only part of an accumulation: its gradients are lost with the process.
        return False
    return done >= wanted


def stop_in_state(process: subprocess.Popen[bytes], attempt: Attempt) -> bool:
    """Stop the ranks while the next state is being written; False when the attempt ended first.

    They run in short slices, so that the moment is not missed on a machine that is busy with other things.
    """
    ranks = [beat.pid for beat in attempt.heartbeats()]
    while process.poll() is None:
        for pid in ranks:
            send_signal(pid, signal.SIGSTOP)
        if is_writing_state(attempt.run):
            return True
        for pid in ranks:
            send_signal(pid, signal.SIGCONT)
        time.sleep(SLICE_SECONDS)
    return False


def is_writing_state(run: Run) -> bool:
    """Whether a state lies there under its temporary name."""
    try:
        return any(path.name.startswith(".") for path in run.states.iterdir())
    except FileNotFoundError:
        return False


def kill_all(process: subprocess.Popen[bytes], attempt: Attempt) -> None:
    """SIGKILL to the ranks, the supervisor and every other process of the attempt, and wait until all are gone."""
    for beat in attempt.heartbeats():
        send_signal(beat.pid, signal.SIGKILL)
    process.kill()
    end_processes(attempt.run)
    process.wait()
