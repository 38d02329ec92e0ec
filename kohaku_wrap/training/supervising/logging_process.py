"""Logs the metrics of one attempt to one tool, as a process of its own: `python -m … RUN ATTEMPT TRACKER`.

It reads `metrics.jsonl` and ends, with all written, when its stdin does; whatever becomes of it, the training goes on.
"""

from __future__ import annotations

import select
import sys
from pathlib import Path

from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.metrics import MetricsTail, read_metrics
from kohaku_wrap.training.records.remembered import read_secrets
from kohaku_wrap.training.records.trackers import TRACKERS, read_logbook, write_lines

LOOK_SECONDS = 1.0


def follow(run: Run, attempt: int, name: str) -> None:
    """Write what the tool lacks of earlier attempts, then each step as it comes."""
    # Before the lines of now are read, so that none is between the two.
    tail = MetricsTail(run.metrics, attempt)
    tracker = TRACKERS[name](read_logbook(run, read_secrets(run)))
    try:
        write_lines(tracker, read_metrics(run))
        is_over = False
        while not is_over:
            is_over = bool(select.select([sys.stdin], [], [], LOOK_SECONDS)[0])
            write_lines(tracker, tail.new_lines())
    finally:
        tracker.close()


if __name__ == "__main__":
    follow(Run(Path(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
