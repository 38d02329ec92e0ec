"""metrics.jsonl across attempts, crashes and numbers that JSON does not have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd

from kohaku_wrap.training.records.attempts import Attempt, write_attempt
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.metrics import (
    RATE_WINDOW_STEPS,
    MetricsTail,
    MetricsWriter,
    compare_losses,
    mean_of,
    read_metrics,
    write_metrics_table,
)

NewRun = Callable[..., Run]


def begin(run: Run, number: int, start: int) -> Attempt:
    attempt = Attempt(run, number, 1, 4, 0, start, None)
    write_attempt(attempt, {})
    return attempt


def write(attempt: Attempt, first: int, last: int, loss: float) -> None:
    with closing(MetricsWriter(attempt)) as metrics:
        for step in range(first, last + 1):
            metrics.append({"optimizer_step": step, "loss": loss})


def test_what_was_trained_again_counts_once(new_run: NewRun) -> None:
    run = new_run()
    write(begin(run, 1, 0), 1, 7, 0.1)
    write(begin(run, 2, 4), 5, 6, 0.2)
    write(begin(run, 3, 4), 5, 9, 0.3)
    lines = read_metrics(run)
    assert [line["optimizer_step"] for line in lines] == list(range(1, 10))
    assert [line["attempt"] for line in lines] == [1] * 4 + [3] * 5


def test_a_line_torn_by_a_crash_is_left_out(new_run: NewRun) -> None:
    run = new_run()
    write(begin(run, 1, 0), 1, 2, 0.1)
    with run.metrics.open("a") as stream:
        stream.write('{"optimizer_step": 3, "lo')
    write(begin(run, 2, 2), 3, 3, 0.2)
    assert [(line["optimizer_step"], line["loss"]) for line in read_metrics(run)] == [(1, 0.1), (2, 0.1), (3, 0.2)]


def test_numbers_that_json_lacks_are_words(new_run: NewRun) -> None:
    run = new_run()
    write(begin(run, 1, 0), 1, 1, math.inf)
    write(begin(run, 2, 0), 1, 1, math.nan)
    strict = [json.loads(text, parse_constant=lambda word: 1 / 0) for text in run.metrics.read_text().splitlines()]
    assert [line["loss"] for line in strict] == ["inf", "nan"]


def test_the_tail_gives_whole_new_lines_of_its_attempt(new_run: NewRun) -> None:
    run = new_run()
    write(begin(run, 1, 0), 1, 2, 0.1)
    tail = MetricsTail(run.metrics, 2)
    assert tail.new_lines() == []
    with run.metrics.open("a") as stream:
        stream.write('{"optimizer_step": 3, "attempt": 2}\n{"optimizer_step": 4, "att')
        stream.flush()
        assert [line["optimizer_step"] for line in tail.new_lines()] == [3]
        stream.write('empt": 2}\n{"optimizer_step": 9, "attempt": 1}\n')
        stream.flush()
        assert [line["optimizer_step"] for line in tail.new_lines()] == [4]


def test_the_tail_begins_at_the_end_of_what_is_there(new_run: NewRun) -> None:
    run = new_run()
    tail, attempt = MetricsTail(run.metrics, 1), begin(run, 1, 0)
    write(attempt, 1, 2, 0.1)
    later = MetricsTail(run.metrics, 1)
    write(attempt, 3, 3, 0.1)
    assert [[line["optimizer_step"] for line in each.new_lines()] for each in (tail, later)] == [[1, 2, 3], [3]]


def test_a_mean_is_of_numbers_alone() -> None:
    lines: list[dict[str, Any]] = [{"loss": 1.0}, {"loss": "nan"}, {}, {"loss": "inf"}, {"loss": 4}]
    assert mean_of(lines, "loss") == 2.5 and mean_of(lines, "lr_unet") is None


def test_losses_are_compared_at_steps_that_both_runs_have(new_run: NewRun) -> None:
    rising, level, wild = new_run("rising"), new_run("level"), new_run("wild")
    for step in range(1, 31):
        write(begin(rising, step, step - 1), step, step, step / 10)
    write(begin(level, 1, 0), 1, 25, 0.5)
    write(begin(wild, 1, 0), 1, 25, math.nan)
    found = compare_losses(rising, level)
    assert [step for step, _, _ in found] == [3, 6, 9, 12, 15, 18, 21, 25]
    assert {loss for _, _, loss in found} == {0.5}
    for step, loss, _ in found:
        within = range(max(1, step - RATE_WINDOW_STEPS + 1), step + 1)
        assert math.isclose(loss, sum(within) / len(within) / 10)
    assert compare_losses(rising, wild) == [] == compare_losses(new_run("none"), level)


def test_the_table_for_plots_holds_what_counts(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run()
    write(begin(run, 1, 0), 1, 7, 0.1)
    write(begin(run, 2, 4), 5, 9, 0.25)
    write_metrics_table(run, tmp_path / "metrics.csv")
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["optimizer_step"].tolist() == list(range(1, 10))
    assert table["loss"].tolist() == [0.1] * 4 + [0.25] * 5
