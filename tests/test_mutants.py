"""The tool that plants faults: it tells a test that notices from one that does not."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray", reason="the extra `mutants` is not installed")

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "benchmarks" / "mutants.py"

SOURCE = '''
def cap(number: int | None) -> int:
    """The number, 10 at most."""
    return min(number, 10)
'''
# A cap of 11 is noticed, one of 9 is not; of the annotation no mutant is made.
TESTS = """
from tiny.caps import cap

def test_cap():
    assert cap(3) == 3
    assert cap(20) <= 10
"""
CONFIGURATION = """
seed = 1
most_a_room = 200
least_share = 0.95
copies = ["tiny", "tests"]
[tests]
"tiny/caps.py" = ["tests/test_caps.py"]
"""
EQUIVALENT = (
    '[[equivalent."tiny/caps.py"]]\nbefore = "return min(number, {})"\nafter = "{}"\nreason = "for this test"\n'
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in (("tiny/caps.py", SOURCE), ("tests/test_caps.py", TESTS), ("mutants.toml", CONFIGURATION)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def run(project: Path, more: str = "") -> tuple[int, str]:
    """Exit code and table of the tool with more lines in its configuration."""
    (project / "mutants.toml").write_text(CONFIGURATION + more)
    command = [sys.executable, str(TOOL), "--configuration", str(project / "mutants.toml"), "--root", str(project)]
    done = subprocess.run([*command, "--processes", "1"], capture_output=True, text=True, cwd=project)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout + done.stderr


def row_of(output: str, file: str) -> list[str]:
    return next(line.split()[1:] for line in output.splitlines() if line.startswith(f"{file} "))


def test_one_is_killed_and_one_survives(project: Path) -> None:
    code, output = run(project)
    # places, drawn, killed, survived, timed out, equivalent, share
    assert row_of(output, "tiny/caps.py") == ["2", "2", "1", "1", "0", "0", "50.0%"]
    assert "survived: tiny/caps.py:4 core/NumberReplacer" in output
    assert "too few are killed: 1 of 2, wanted 95%" in output and code == 1
    assert (project / "tiny/caps.py").read_text() == SOURCE


def test_a_mutant_that_changes_nothing_is_kept_by_its_text(project: Path) -> None:
    code, output = run(project, EQUIVALENT.format(10, "return min(number, 9)"))
    assert row_of(output, "tiny/caps.py") == ["2", "2", "1", "0", "0", "1", "100.0%"] and code == 0
    code, output = run(project, EQUIVALENT.format(12, "return min(number, 9)"))
    assert "mutants.toml names lines that are not there" in output and code == 1


def test_a_file_without_a_mutant_is_a_failure(project: Path) -> None:
    (project / "tiny/none.py").write_text('"""Nothing to mutate."""\n')
    code, output = run(
        project, '"tiny/none.py" = ["tests/test_caps.py"]\n' + EQUIVALENT.format(10, "return min(number, 9)")
    )
    assert "tiny/none.py: no mutant of it was tried" in output and code == 1


def test_tests_that_fail_without_a_fault_say_nothing(project: Path) -> None:
    (project / "tests/test_caps.py").write_text("def test_wrong():\n    assert 0\n")
    code, output = run(project)
    assert "tiny/caps.py: its tests fail as they are" in output and code == 1


def test_the_tables_files_tests_and_lines_are_there() -> None:
    """A line that was rewritten since would end `make mutants`, which few run, with an error."""
    document = tomllib.loads(TOOL.with_suffix(".toml").read_text(encoding="utf-8"))
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in document["tests"]}
    words = [word for tests in document["tests"].values() for word in tests]
    assert [word for word in words if not (ROOT / word.removeprefix("--deselect=").partition("::")[0]).is_file()] == []
    gone = [
        (name, entry["before"])
        for name, entries in document["equivalent"].items()
        for entry in entries
        if entry["before"] not in {line.strip() for line in texts[name].splitlines()} and "\n" not in entry["before"]
    ]
    assert gone == []
