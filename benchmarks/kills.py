"""Whole runs killed with SIGKILL at random moments and resumed: is every resume whole, and the result the same?

    python benchmarks/kills.py                # 20 kills with the builtin engine on the embedded world
    python benchmarks/kills.py --kills 5

One run trains undisturbed. Then runs are trained with a kill at a random moment of each attempt, start-up and saving
included, the supervisor with all its children at once, until all kills are spent; each run that comes to its end is
compared with the undisturbed one bit by bit, and proved from its ledger.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from kohaku_wrap.proving.killing import command_of, run_kwrap
from kohaku_wrap.proving.likeness import Difference, compare_runs
from kohaku_wrap.proving.prove import SETTINGS, Bench, Configuration
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.folder import Run, is_run
from kohaku_wrap.training.records.manifest import DamagedState
from kohaku_wrap.training.records.states import list_states, verify_state
from kohaku_wrap.training.starting.resume import is_finished
from kohaku_wrap.training.supervising.processes import end_processes, list_processes, send_signal
from kohaku_wrap.training.verifying.verify import verify_run

CONFIGURATION = Configuration()


def first_command(bench: Bench, name: str) -> tuple[str, ...]:
    """Start the run of that name."""
    site = bench.write_site(name, CONFIGURATION, workers=0)
    effective_batch = CONFIGURATION.processes * CONFIGURATION.accumulation * 2
    settings = [f"effective_batch={effective_batch}", *SETTINGS]
    arguments = ["train", "demo", "--site", str(site), "--run", name]
    return tuple(arguments + [part for setting in settings for part in ("--set", setting)])


def kill_after(seconds: float, arguments: tuple[str, ...], run: Run, log: Path) -> str:
    """Start a command and kill it with all its children after a time; what it was doing, or `finished`."""
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(command_of(arguments), stdout=stream, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
            return "finished" if process.returncode == 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            attempts = list_attempts(run) if is_run(run.folder) else []
            beats = attempts[-1].heartbeats() if attempts else []
            process.kill()
            for pid in list_processes(run):
                send_signal(pid, signal.SIGKILL)
            end_processes(run)
            process.wait()
            return beats[0].phase if beats else "before the first sign of life"


def count_torn(run: Run) -> int:
    """States under a final name that do not verify."""
    torn = 0
    for _, path in list_states(run.states):
        try:
            verify_state(path)
        except DamagedState as damaged:
            print(f"TORN  {damaged.message}")
            torn += 1
    return torn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("builtin", "sd-scripts"), default="builtin")
    parser.add_argument("--folder", type=Path, default=Path(".bench/kills"), help="where to work")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    draw = random.Random(chosen.seed)
    bench = Bench(chosen.folder.absolute(), chosen.engine)
    bench.make_world()
    shutil.rmtree(bench.runs, ignore_errors=True)
    logs = bench.folder / "logs"

    started = time.monotonic()
    run_kwrap(first_command(bench, "whole"), logs / "whole.log")
    whole = Run(bench.runs / "whole")
    whole_seconds = time.monotonic() - started
    print(f"undisturbed: {whole.lock.total_optimizer_steps} optimizer steps in {whole_seconds:.0f} s", flush=True)

    kills = torn = different = runs = 0
    moments: Counter[str] = Counter()
    while kills < chosen.kills or runs == 0:
        runs += 1
        run = Run(bench.runs / f"killed-{runs}")
        log = logs / f"killed-{runs}.log"
        while not (is_run(run.folder) and is_finished(run)):
            arguments = ("resume", str(run.folder)) if is_run(run.folder) else first_command(bench, run.name)
            seconds = draw.uniform(0.1, 0.9) * whole_seconds if kills < chosen.kills else 10 * whole_seconds
            moment = kill_after(seconds, arguments, run, log)
            if moment.startswith("exit code"):
                print(f"FAILED  {run.name}: {moment}, see {log}")
                return 1
            if moment != "finished":
                kills += 1
                moments[moment] += 1
                torn += count_torn(run)
                print(f"  kill {kills} after {seconds:.1f} s of {run.name}: {moment}", flush=True)
        try:
            likeness = compare_runs(whole, run)
        except Difference as found:
            different += 1
            print(f"DIFFERENT  {run.name}: {found.message}", flush=True)
            continue
        proof = verify_run(run)
        different += not proof.is_proved
        print(f"{'identical' if proof.is_proved else 'UNPROVED'}  {run.name}: {likeness.describe()}", flush=True)
    print(f"{kills} kills in {runs} runs: {', '.join(f'{count} in {name}' for name, count in moments.most_common())}")
    print(f"  torn states under a final name: {torn} (bar: 0)")
    print(f"  runs with another result: {different} of {runs} (bar: 0)")
    print(f"  {time.monotonic() - started:.0f} s")
    return 1 if torn or different else 0


if __name__ == "__main__":
    sys.exit(main())
