"""The tested versions stand in one place; every other file that names one says the same."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

import kohaku_wrap
from kohaku_wrap.planning.doctor import WRONG_BITSANDBYTES
from kohaku_wrap.trainer.installed import plain_name
from kohaku_wrap.trainer.requirements import SETS, TESTED, packages_of

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([\w.-]+)==([\w.]+)$", re.MULTILINE)
NAMED = re.compile(rf"(?<![\w-])({'|'.join(TESTED)})(?:==|\s)(\d+(?:\.\d+)+)")
"""As texts write it: `torch 2.13.0`, `torch==2.13.0`."""

TEXTS = ("Makefile", "README.md", "CONTRIBUTING.md", "docs/guide.md", "kohaku_wrap/**/*.py", "benchmarks/*.py")


def read_pins(set_name: str) -> dict[str, str]:
    """What the constraints file of a set pins."""
    text = (ROOT / f"constraints{set_name and f'-{set_name}'}.txt").read_text(encoding="utf-8")
    return {plain_name(name): version for name, version in PIN.findall(text)}


@pytest.mark.parametrize("set_name", SETS)
def test_what_setup_pins_is_what_was_tested(set_name: str) -> None:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    texts = [extras["merge"], extras["engines"], extras[f"train{set_name and f'-{set_name}'}"]]
    pins = dict(PIN.findall("\n".join(texts)))
    assert len(pins) >= 6
    assert pins == {name: packages_of(set_name)[name].version for name in pins}
    assert not PIN.findall(
        "".join(text for name, text in extras.items() if not name.startswith(("train", "merge", "eng")))
    )


@pytest.mark.parametrize("set_name", SETS)
def test_every_tested_package_is_installed_by_setup_in_that_version(set_name: str) -> None:
    pins = read_pins(set_name)
    assert {name: pins.get(name) for name in TESTED} == {
        name: each.version for name, each in packages_of(set_name).items()
    }


def test_a_set_differs_in_nothing_but_its_own_packages() -> None:
    default, newer = read_pins(""), read_pins("transformers-5")
    differ = {name for name in default.keys() & newer.keys() if default[name] != newer[name]}
    assert differ == {*SETS["transformers-5"]}
    assert default.keys() <= newer.keys()


@pytest.mark.parametrize("pattern", TEXTS)
def test_no_text_names_another_version(pattern: str) -> None:
    named = [
        (path.relative_to(ROOT).as_posix(), name, version)
        for path in ROOT.glob(pattern)
        for name, version in NAMED.findall(path.read_text(encoding="utf-8"))
    ]
    tested = {each.version for name in SETS for each in packages_of(name).values()}
    others = [each for each in named if each[2] not in tested.union(WRONG_BITSANDBYTES)]
    assert not others
    if pattern in ("Makefile", "docs/guide.md"):
        assert named, "nothing was looked at"


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest
    assert newest[1] == re.sub(r"\.dev\d+$", "", kohaku_wrap.__version__)
    assert (ROOT / "setup.cfg").read_text(encoding="utf-8").count("version = attr: kohaku_wrap.__version__\n") == 1
