"""Plain words: phrases that readers with average English stumble over stay out of what people read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PHRASES = re.compile(
    r"""\b(
        mend(s|ed|ing)? | (is|are|was|were|be|been|being)\ told | leads?\ to | knowingly | names\ of\ then |
        cannot\ be\ meant | albeit | forthwith | hitherto | whence | thereof | therein | hereby | notwithstanding |
        in\ lieu | for\ want\ of | amiss | awry | perforce | lest | nigh | forgo | bygone | heed
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""What was found in messages and pages, and its kind."""

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "templates").rglob("*.toml")),
    *sorted((ROOT / "datasets").rglob("*.toml")),
    *sorted((ROOT / "kohaku_wrap").rglob("*.html")),
]
MODULES = sorted((ROOT / "kohaku_wrap").rglob("*.py"))


def texts_of(module: Path) -> Iterator[tuple[int, str]]:
    """Every text that a module may print, with its line; the docstrings of commands stand in the reference."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.lineno, node.value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_in_plain_words(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    found = [f"{number}: {line}" for number, line in enumerate(lines, 1) if PHRASES.search(line) and line[:1] != ">"]
    assert not found


def test_messages_are_in_plain_words() -> None:
    found = [
        f"{module.relative_to(ROOT)}:{line}: {text}"
        for module in MODULES
        for line, text in texts_of(module)
        if PHRASES.search(text)
    ]
    assert not found


def test_a_phrase_is_found_in_any_form() -> None:
    for text in ("Mend the file.", "the trainer is told so", "what this leads to", "are TOLD"):
        assert PHRASES.search(text), text
    assert not PHRASES.search("recommended, amended, he told, leaders together")
