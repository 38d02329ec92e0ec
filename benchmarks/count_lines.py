"""Lines of code by room: no blanks, comments or docstrings; `make lines`, and against another commit with SINCE=COMMIT.

A line counts when a token of code stands on it, so each line of a long call or text counts, and joining lines is seen
as what it is. What is no Python does not count.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
COUNTED = ("kohaku_wrap", "proofs")
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def count_code_lines(source: str) -> int:
    """Lines of one module that hold code; a text that stands alone is a docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def room_of(name: str) -> str:
    """The room of a file: a folder of the package, of `training/` one folder deeper; a ground module is its own."""
    parts = PurePosixPath(name).parts
    return "/".join(parts[: 3 if parts[1:2] == ("training",) else 2])


def read_modules(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each module that counts, as it lies in a folder."""
    for room in COUNTED:
        for path in sorted((folder / room).rglob("*.py")):
            yield path.relative_to(folder).as_posix(), path.read_text(encoding="utf-8")


def read_modules_at(commit: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each module that counts, as a commit has it."""
    packed = subprocess.run(["git", "archive", commit, "--", *COUNTED], cwd=folder, capture_output=True, check=False)
    if packed.returncode:
        sys.exit(packed.stderr.decode().strip())
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        for member in archive:
            if member.name.endswith(".py") and (content := archive.extractfile(member)) is not None:
                yield member.name, content.read().decode()


def count_rooms(modules: Iterator[tuple[str, str]]) -> Counter[str]:
    """Lines of code by room."""
    rooms: Counter[str] = Counter()
    for name, source in modules:
        rooms[room_of(name)] += count_code_lines(source)
    return rooms


def main() -> None:
    """Print a line a room and the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", default="", metavar="COMMIT", help="show what was there then, and the difference")
    since = parser.parse_args().since
    now = count_rooms(read_modules(ROOT))
    before = count_rooms(read_modules_at(since, ROOT)) if since else Counter()
    for room in sorted(now.keys() | before.keys()):
        print_row(room, now[room], before[room], since)
    print_row("total", now.total(), before.total(), since)


def print_row(room: str, now: int, before: int, since: str) -> None:
    """One line of the table."""
    change = f"  {before:7,}  {now - before:+7,}" if since else ""
    percent = f"  {100 * (now - before) / before:+.1f} %" if since and room == "total" and before else ""
    print(f"{now:7,}{change}  {room}{percent}")


if __name__ == "__main__":
    main()
