"""The page that `kwrap train --report` keeps: whole after the training, and never in its way."""

from __future__ import annotations

from collections.abc import Callable

from plain_runs import train
from reading_pages import Page

from kohaku_wrap.cli.train import keeping_page
from kohaku_wrap.training.records.folder import Run


def test_the_page_is_whole_after_the_training(new_run: Callable[..., Run]) -> None:
    run = new_run("live")
    with keeping_page(run, True):
        train(run)
    page = Page(run.folder / "report.html")
    assert page.data["runs"][0]["status"]["condition"] == "finished"
    assert not list(run.folder.glob(".report*"))


def test_a_page_that_cannot_be_written_changes_nothing(new_run: Callable[..., Run]) -> None:
    run = new_run("blocked")
    (run.folder / "report.html").mkdir()
    with keeping_page(run, True):
        report, _ = train(run)
    assert report.optimizer_step == run.lock.total_optimizer_steps
