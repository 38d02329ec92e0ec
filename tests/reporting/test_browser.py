"""Pages in a real browser, opened as files: Debian's Chromium, driven by playwright."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from plain_runs import misbehave, train
from reading_pages import HOSTILE

from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.reporting import page as page_of
from kohaku_wrap.reporting import pictures
from kohaku_wrap.reporting.page import write_index, write_page
from kohaku_wrap.training.records.folder import Run, list_runs

from .test_sections import add_pictures

NewRun = Callable[..., Run]
NAMES = ("chromium", "chromium-browser", "google-chrome")
NEEDED = "KWRAP_NEEDS_BROWSER"
"""Set where the browser must be there, as `.ci/run` does: then these tests are not skipped."""

WIDTHS = (1280, 400)
SECTIONS = ("verdict", "charts", "story", "pictures", "data-at-a-glance", "way", "options")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, started once; skipped with one line where it or playwright is missing."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None and not os.environ.get(NEEDED):
        pytest.skip("no Chromium here: apt install chromium")
    if not os.environ.get(NEEDED):
        pytest.importorskip("playwright", reason="playwright is not installed")
    from playwright.sync_api import sync_playwright

    assert path, "Chromium is needed here, and is not there"
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


class Tab:
    """A page that was opened as a file, and all that it said and asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("requestfailed", lambda request: self.said.append(f"failed: {request.url[:200]}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def look(self, script: str) -> Any:
        return self.page.evaluate(script)

    def wait_for(self, script: str) -> None:
        """Wait until the script is true; playwright's own way needs eval, which the page's policy forbids."""
        from playwright.sync_api import Error

        for _ in range(600):
            # The page may be reloading just now.
            with suppress(Error):
                if self.look(script):
                    return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never true: {script}")

    def check(self, folder: Path) -> None:
        """Nothing was said, and nothing asked for but files of the run."""
        assert self.said == []
        others = [url for url in self.asked if not url.startswith(("data:", folder.as_uri()))]
        assert others == []
        self.context.close()


def shown(tab: Tab, chart: str) -> Any:
    return tab.page.locator(f'[data-chart="{chart}"] > svg.plot:not([hidden])')


@pytest.fixture
def hostile_run(new_run: NewRun) -> Run:
    """A crash, a resume, pictures, and scripts in every name."""
    run = new_run(HOSTILE)
    tables = dict(run.lock.tables)
    tables["run"] = {**tables["run"], "template": "</script><script>alert(1)</script>", "dataset": HOSTILE}
    tables["values"] = {**tables["values"], HOSTILE: HOSTILE}
    run.lock_file.write_text(toml_text(tables), encoding="utf-8")
    run.forget_lock()
    misbehave(run, attempt_1={"crash": True, "at": 7})
    train(run, restarts=1)
    add_pictures(run)
    (run.folder / "evaluation").mkdir()
    (run.folder / "evaluation" / "loss.json").write_text(json.dumps({"command": HOSTILE, "mean": 0.5}))
    return run


@pytest.mark.parametrize("inline_bytes", [6_000_000, 0], ids=["pictures inside", "pictures beside"])
def test_a_page_as_a_file(browser: Any, hostile_run: Run, inline_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "INLINE_BYTES", inline_bytes)
    run = hostile_run
    path = run.folder / "report.html"
    write_page([run], path)
    for width, scheme in zip(WIDTHS, ("light", "dark"), strict=True):
        tab = Tab(browser, path, width, scheme)
        assert tab.look("document.documentElement.scrollWidth") <= width
        for section in SECTIONS:
            box = tab.page.locator(f"#{section}").bounding_box()
            assert box and box["height"] > 20 and box["width"] > width / 2, section
        check_charts(tab)
        check_pictures(tab)
        background = tab.look("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) > 384) == (scheme == "light")
        tab.check(run.folder)


def check_charts(tab: Tab) -> None:
    """Curves are there, the axis switches, pointer and keys tell values."""
    for chart in ("loss", "rates", "seconds"):
        curves = [curve.bounding_box() for curve in shown(tab, chart).locator("path.curve").all()]
        assert len(curves) >= 2 and max(box["width"] for box in curves if box) > 30, chart
    assert shown(tab, "loss").get_attribute("data-axis") == "steps"
    for axis in ("images", "hours", "steps"):
        tab.page.locator(f'input[value="{axis}"]').check(force=True)
        assert {shown(tab, chart).get_attribute("data-axis") for chart in ("loss", "seconds")} == {axis}
    chart = tab.page.locator('[data-chart="loss"]')
    chart.scroll_into_view_if_needed()
    box = shown(tab, "loss").bounding_box()
    assert box
    tab.page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + 50)
    told = chart.locator(".readout").inner_text()
    assert "attempt 1" in told and "step 1" in told
    chart.focus()
    tab.page.keyboard.press("End")
    assert chart.locator(".readout").inner_text() != told


def check_pictures(tab: Tab) -> None:
    """The slider changes what is shown, and a picture opens large and closes again."""
    gallery = tab.page.locator(".gallery")
    images = gallery.locator("img")
    gallery.scroll_into_view_if_needed()
    slider = gallery.locator('input[type="range"]')
    slider.focus()
    tab.page.keyboard.press("Home")
    first = images.first.get_attribute("src")
    assert gallery.locator("output").inner_text() == "2"
    tab.page.keyboard.press("ArrowRight")
    assert gallery.locator("output").inner_text() == "4" and images.first.get_attribute("src") != first
    tab.wait_for("document.querySelector('.gallery img').naturalWidth === 32")
    gallery.locator("button").first.click()
    assert tab.page.locator("dialog").is_visible()
    tab.page.keyboard.press("ArrowLeft")
    assert "optimizer step 2" in tab.page.locator("dialog p").inner_text()
    tab.wait_for("document.querySelector('dialog img').naturalWidth === 32")
    tab.page.keyboard.press("Escape")
    assert not tab.page.locator("dialog").is_visible()


def test_a_live_page_reloads_and_stays_where_it_was(
    browser: Any, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_of, "RELOAD_SECONDS", 1)
    run = new_run("live")
    path = run.folder / "report.html"
    write_page([run], path, is_live=True)
    tab = Tab(browser, path, 400)
    assert "not begun" in tab.page.locator("#verdict").inner_text()
    train(run)
    write_page([run], path, is_live=True)
    tab.wait_for("document.querySelector('#verdict').innerText.includes('finished: all')")
    assert tab.look("document.body.dataset.reload") == "0"
    tab.check(run.folder)


def test_the_place_and_the_axis_stay_over_a_reload(
    browser: Any, hostile_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_of, "RELOAD_SECONDS", 1)
    path = hostile_run.folder / "report.html"
    write_page([hostile_run], path)
    path.write_text(path.read_text(encoding="utf-8").replace('data-reload="0"', 'data-reload="1"'), encoding="utf-8")
    tab = Tab(browser, path, 400)
    tab.page.locator('input[value="images"]').check(force=True)
    tab.look("scrollTo(0, 1500)")
    tab.look("window.before = true")
    tab.wait_for("window.before === undefined")
    tab.wait_for("Math.abs(scrollY - 1500) < 3")
    assert shown(tab, "loss").get_attribute("data-axis") == "images"
    tab.check(hostile_run.folder)


def test_runs_over_each_other_and_paper(browser: Any, new_run: NewRun, tmp_path: Path) -> None:
    runs = [new_run("one"), new_run("two", values={"unet_lr": 3e-4})]
    for run in runs:
        train(run)
    path = tmp_path / "both.html"
    write_page(runs, path)
    tab = Tab(browser, path)
    assert (
        len(
            set(
                shown(tab, "loss").locator("path.curve").evaluate_all("all => all.map(p => getComputedStyle(p).stroke)")
            )
        )
        == 2
    )
    assert tab.page.get_by_text("Options that differ").is_visible()
    tab.page.emulate_media(media="print")
    assert not tab.page.locator("header").is_visible() and shown(tab, "loss").is_visible()
    assert tab.page.pdf().startswith(b"%PDF")
    tab.check(tmp_path)


def test_the_page_over_all_runs_is_sorted_by_a_press(browser: Any, new_run: NewRun, tmp_path: Path) -> None:
    train(new_run("b"))
    new_run("a")
    new_run(HOSTILE)
    path = tmp_path / "runs" / "index.html"
    write_index(list(list_runs(tmp_path / "runs")), path)
    tab = Tab(browser, path, 400)
    names, steps = tab.page.locator("tbody td:first-child"), tab.page.locator("thead button", has_text="steps").first
    steps.click()
    assert names.last.inner_text() == "b"
    steps.click()
    assert names.first.inner_text() == "b" and names.count() == 3
    tab.check(tmp_path)
