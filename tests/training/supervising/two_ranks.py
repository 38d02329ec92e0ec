"""A worker of two ranks without models: joined by gloo under the real launcher, each does what the test asks of it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch
from torch import distributed

from kohaku_wrap.training.engines.worker import report_failures
from kohaku_wrap.training.records.attempts import Attempt


def main() -> None:
    attempt, rank = Attempt.load(), int(os.environ["RANK"])
    attempt.open_log(rank)
    attempt.stop_on_signals()
    report_failures(attempt, rank, lambda: 3)
    asked = json.loads((attempt.run.folder / "misbehave.json").read_text())[f"rank_{rank}"]
    distributed.init_process_group("gloo")
    distributed.all_reduce(torch.ones(1))
    attempt.beat(rank, "step", 3)
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115  # as sd-scripts does on all ranks but the first
    if asked == "raise":
        raise ValueError("this rank fails, as if out of memory")
    if asked == "raise later":
        time.sleep(0.5)
        raise ValueError("this rank fails by itself, but later")
    if asked == "allocate":
        torch.empty(1 << 60)
    if asked == "exit 0":
        os._exit(0)
    if asked == "exit 7":
        os._exit(7)
    if asked == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if asked == "sleep":
        time.sleep(600)
    distributed.all_reduce(torch.ones(1))
    distributed.all_reduce(torch.ones(1))


if __name__ == "__main__":
    main()
