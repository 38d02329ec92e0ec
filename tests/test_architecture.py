"""docs/architecture.md and CONTRIBUTING.md name rooms, files and functions that are there."""

from __future__ import annotations

import ast
import re
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PAGES = [PAGE, ROOT / "CONTRIBUTING.md"]
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(kohaku_wrap|tests|benchmarks|proofs|templates|datasets|docs|\.ci)/[\w./-]*")
NAME = re.compile(r"[a-z]+(_[a-z]+)+|([A-Z][a-z]+){2,}(\.\w+)?")


def words_in_code(page: Path) -> list[str]:
    """What stands between backticks, blocks left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return CODE.findall(text)


def defined_names() -> set[str]:
    """Functions, classes and methods of the package and its tools, methods with and without their class."""
    found: set[str] = set()
    for path in [*(ROOT / "kohaku_wrap").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(node.name)
    return found


def rooms_of_contract(name: str) -> list[str]:
    """The layers of an import contract in setup.cfg, as names of rooms."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    layers = settings[f"importlinter:contract:{name}"]["layers"]
    return [each.removeprefix("kohaku_wrap.") for each in re.findall(r"[\w.]+", layers)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    named = [word for word in words_in_code(page) if PATH.fullmatch(word) and not re.search(r"NAME|NEW", word)]
    assert len(named) >= 10
    assert [word for word in named if not (ROOT / word).exists()] == []


def test_functions_and_classes_that_are_named_are_there() -> None:
    named = {word for word in words_in_code(PAGE) if NAME.fullmatch(word)} - {
        "schema_version",
        "image_dir",
        "num_repeats",
    }
    assert len(named) >= 10
    assert named - defined_names() == set()


def test_every_room_of_the_import_contracts_is_explained() -> None:
    words = set(words_in_code(PAGE))
    rooms = [f"kohaku_wrap/{room}" for room in rooms_of_contract("rooms")]
    rooms += [f"kohaku_wrap/training/{room}" for room in rooms_of_contract("training")]
    missing = [room for room in rooms if not words & {f"{room}/", f"{room}.py"}]
    assert len(rooms) >= 15 and missing == []


def test_every_folder_of_the_package_is_a_room_of_the_contracts() -> None:
    folders = {path.parent.name for path in (ROOT / "kohaku_wrap").glob("*/__init__.py")}
    assert folders - set(rooms_of_contract("rooms")) == set()


def test_the_table_of_rooms_has_the_order_of_the_contract() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rooms = [room for room in rooms_of_contract("rooms") if (ROOT / "kohaku_wrap" / room).is_dir()]
    places = [text.index(f"| `kohaku_wrap/{room}/` |") for room in rooms]
    assert places == sorted(places)


def test_tests_lie_in_folders_with_the_names_of_the_codes() -> None:
    tests = ROOT / "tests"
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    assert len(folders) >= 30
    assert [
        each for each in folders if not any((above / each).is_dir() for above in (ROOT / "kohaku_wrap", ROOT))
    ] == []
