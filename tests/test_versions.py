"""The tested versions stand in one place; every other file that names one says the same."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

import kohaku_wrap
from kohaku_wrap.planning.doctor import WRONG_BITSANDBYTES
from kohaku_wrap.trainer.installed import plain_name
from kohaku_wrap.trainer.requirements import TESTED

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([\w.-]+)==([\w.]+)$", re.MULTILINE)
NAMED = re.compile(rf"(?<![\w-])({'|'.join(TESTED)})(?:==|\s)(\d+(?:\.\d+)+)")
"""As texts write it: `torch 2.13.0`, `torch==2.13.0`."""

TEXTS = ("Makefile", "README.md", "CONTRIBUTING.md", "docs/guide.md", "kohaku_wrap/**/*.py", "benchmarks/*.py")


def test_what_setup_pins_is_what_was_tested() -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    pins = dict(PIN.findall("\n".join(setup["options.extras_require"].values())))
    assert len(pins) >= 6
    assert pins == {name: TESTED[name].version for name in pins}


def test_every_tested_package_is_installed_by_setup_in_that_version() -> None:
    pins = {plain_name(name): version for name, version in PIN.findall((ROOT / "constraints.txt").read_text())}
    assert {name: pins.get(name) for name in TESTED} == {name: each.version for name, each in TESTED.items()}


@pytest.mark.parametrize("pattern", TEXTS)
def test_no_text_names_another_version(pattern: str) -> None:
    named = [
        (path.relative_to(ROOT).as_posix(), name, version)
        for path in ROOT.glob(pattern)
        for name, version in NAMED.findall(path.read_text(encoding="utf-8"))
    ]
    others = [each for each in named if each[2] not in (TESTED[each[1]].version, *WRONG_BITSANDBYTES)]
    assert not others
    if pattern in ("Makefile", "docs/guide.md"):
        assert named, "nothing was looked at"


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest
    assert newest[1] == re.sub(r"\.dev\d+$", "", kohaku_wrap.__version__)
    assert (ROOT / "setup.cfg").read_text(encoding="utf-8").count("version = attr: kohaku_wrap.__version__\n") == 1
