"""How soon a resume trains its first optimizer step, against a fresh start: medians, whole processes.

    python benchmarks/resume_start.py            # 5 of each with the builtin engine

A fresh run and a resumed one are started in turn and killed after their first optimizer step. The resume's reading
and hashing of the state is told apart: it prints those seconds itself.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from kills import CONFIGURATION, first_command

from kohaku_wrap.proving.killing import Kill, command_of, find_attempt, kill_all, kill_midway
from kohaku_wrap.proving.prove import Bench
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.folder import Run, is_run
from kohaku_wrap.training.records.metrics import iterate_lines
from kohaku_wrap.training.records.states import list_states

POLL_SECONDS = 0.01
BAR = 1.1
"""A resume may take this many times a fresh start; both include the same imports and models."""

HASHED = re.compile(r"of states in ([0-9.]+) s")


def seconds_to_first_step(run: Run, arguments: tuple[str, ...], log: Path) -> float:
    """Seconds from the command to its first line of metrics; then everything is killed."""
    before = sum(1 for _ in iterate_lines(run.metrics))
    number = 1 + max((attempt.number for attempt in list_attempts(run)), default=0) if is_run(run.folder) else 1
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command_of(arguments), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    while process.poll() is None:
        if sum(1 for _ in iterate_lines(run.metrics)) > before:
            seconds = time.monotonic() - started
            attempt = find_attempt(run, number)
            if attempt is not None:
                kill_all(process, attempt)
                return seconds
        time.sleep(POLL_SECONDS)
    raise SystemExit(f"`kwrap {arguments[0]}` ended before its first optimizer step, see {log}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--engine", choices=("builtin", "sd-scripts"), default="builtin")
    parser.add_argument("--folder", type=Path, default=Path(".bench/resume"), help="where to work")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    bench = Bench(chosen.folder.absolute(), chosen.engine)
    bench.make_world()
    shutil.rmtree(bench.runs, ignore_errors=True)
    logs = bench.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    resumed = Run(bench.runs / "resumed")
    kill_midway(resumed, first_command(bench, "resumed"), Kill(0.9), 1, logs / "resumed.log")
    if not list_states(resumed.states):
        raise SystemExit("the run was killed before its first state")
    step = list_states(resumed.states)[-1][0]

    fresh_seconds, resume_seconds, hash_seconds = [], [], []
    for number in range(chosen.times):
        name = f"fresh-{number + 1}"
        fresh_seconds.append(seconds_to_first_step(Run(bench.runs / name), first_command(bench, name), logs / name))
        log = logs / f"resume-{number + 1}.log"
        resume_seconds.append(seconds_to_first_step(resumed, ("resume", str(resumed.folder), "--step", str(step)), log))
        told = HASHED.search(log.read_text(encoding="utf-8"))
        hash_seconds.append(float(told.group(1)) if told else 0.0)
    fresh, resume, hashing = (statistics.median(times) for times in (fresh_seconds, resume_seconds, hash_seconds))
    ratio = (resume - hashing) / fresh
    print(f"first optimizer step, median of {chosen.times}, {CONFIGURATION.name}, {chosen.engine}")
    print(f"  fresh start        {fresh:6.1f} s")
    print(f"  resume, step {step:<5} {resume:6.1f} s, of which the state's hashing {hashing:.1f} s")
    print(f"  ratio without it   {ratio:6.2f}   bar {BAR}   {'ok' if ratio <= BAR else 'MISSED'}")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
