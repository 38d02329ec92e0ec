"""Tries kwrap under the conditions that a file names, each try in a real process forked from this one.

Python and the command's modules are loaded once and not for each of some hundred and sixty tries. Training has the
plain worker. Reads batches of tries as JSON, one batch after the other, and prints their exit codes.
"""

from __future__ import annotations

import importlib
import json
import os
import pty
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from plain_kwrap import begin_plain_attempt

import kohaku_wrap.__main__
from kohaku_wrap.cli import SECTIONS
from kohaku_wrap.training.starting import resume

AT_ONCE = 2
LOADED = (
    "kohaku_wrap.planning.step_plan",
    "kohaku_wrap.dataset.images.extract",
    "kohaku_wrap.demo.world",
    "kohaku_wrap.planning.doctor",
    "kohaku_wrap.training.verifying.verify",
    "kohaku_wrap.training.starting.create",
    "kohaku_wrap.training.supervising.status",
    "kohaku_wrap.training.supervising.supervise",
)


def load() -> None:
    for module in (*(f"kohaku_wrap.cli.{verb}" for verbs in SECTIONS.values() for verb in verbs), *LOADED):
        importlib.import_module(module)
    resume.begin_attempt = begin_plain_attempt


def enter(one: dict[str, Any]) -> None:
    """Be in the condition, as a shell would have started the command in it."""
    os.setsid()
    os.chdir(one["folder"])
    os.environ.update(one["environment"])
    condition = one["condition"]
    nothing = os.open(os.devnull, os.O_RDWR)
    outputs = [nothing, os.open("stderr.txt", os.O_WRONLY | os.O_CREAT)]
    if condition == "reader gone":
        reader, writer = os.pipe()
        os.close(reader)
        outputs = [writer, writer]
    elif condition == "terminal gone":
        master, slave = pty.openpty()
        os.close(master)
        outputs = [slave, slave]
    elif condition == "full log":
        full = os.open("/dev/full", os.O_WRONLY)
        outputs = [full, full]
    for number, descriptor in enumerate([nothing, *outputs]):
        os.dup2(descriptor, number)
    for descriptor in {nothing, *outputs}:
        os.close(descriptor)
    # Where a descriptor is closed Python has no stream.
    if condition == "closed stdout":
        os.close(1)
        sys.stdout = sys.__stdout__ = None  # type: ignore[misc]
    elif condition == "closed stderr":
        os.close(2)
        sys.stderr = sys.__stderr__ = None  # type: ignore[misc]


def has_begun(process: int, one: dict[str, Any]) -> bool:
    """Whether SIGTERM meets the command at its work: it takes signals, and has written what the try names."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    takes_signal = bool(caught >> (signal.SIGTERM - 1) & 1)
    return takes_signal and (not one["sign"] or any(Path(one["folder"]).glob(one["sign"])))


def try_all(tries: list[dict[str, Any]]) -> list[int]:
    """Exit codes in the order of the tries; only in a forked process it does not return."""
    codes: dict[int, int] = {}
    running: dict[int, int] = {}
    waiting = list(enumerate(tries))
    to_end: set[int] = set()
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number, one = waiting.pop(0)
            process = os.fork()
            if process == 0:
                enter(one)
                sys.argv = ["kwrap", *one["words"]]
                kohaku_wrap.__main__.main()
            running[process] = number
            if one["condition"] == "SIGTERM":
                to_end.add(process)
        for process in [each for each in to_end if has_begun(each, tries[running[each]])]:
            os.kill(process, signal.SIGTERM)
            to_end.remove(process)
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
                to_end.discard(process)
        time.sleep(0.005)
    return [codes[number] for number in range(len(tries))]


if __name__ == "__main__":
    load()
    print(json.dumps([try_all(batch) for batch in json.loads(Path(sys.argv[1]).read_text())]))
