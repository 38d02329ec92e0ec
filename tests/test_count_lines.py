"""Lines of code by room are counted so that neither comments nor joining hides anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "benchmarks" / "count_lines.py"
MODULE = '''"""A docstring.

Of three lines.
"""

# a comment
WORDS = """of
two lines"""


def double(number: int) -> int:
    """Another docstring."""
    return (
        number
        * 2
    )
'''


def count(root: Path) -> list[str]:
    """The tool's answer on a checkout of its own."""
    (root / "benchmarks").mkdir()
    tool = root / "benchmarks" / TOOL.name
    tool.write_bytes(TOOL.read_bytes())
    done = subprocess.run([sys.executable, str(tool)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_code_counts_and_words_about_it_do_not(tmp_path: Path) -> None:
    for name in ("kohaku_wrap/files.py", "kohaku_wrap/training/data/order.py", "kohaku_wrap/training/data/odd.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MODULE)
    assert [line.split() for line in count(tmp_path)] == [
        ["7", "kohaku_wrap/files.py"],
        ["14", "kohaku_wrap/training/data"],
        ["21", "total"],
    ]
