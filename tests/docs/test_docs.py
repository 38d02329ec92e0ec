"""The README and docs/ against the program: commands parse and run, links lead somewhere, the reference is current."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kohaku_wrap.cli import program

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<mark><!-- needs: [^>]+ -->\n)?```sh\n(?P<body>.*?)```", re.DOTALL)
ANY_BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(kwrap [^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Line:
    """One `kwrap` command of a page."""

    page: str
    """The file's name."""

    text: str
    """As written."""

    runs_here: bool
    """Whether its block is not marked as needing more than this machine."""

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def commands_in(page: Path) -> list[Line]:
    """The `kwrap` lines of a page's `sh` blocks, in order; a line that ends in a backslash goes on."""
    found = []
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        lines = block["body"].replace("\\\n", " ").splitlines()
        found += [Line(page.name, line, not block["mark"]) for line in lines if line.startswith("kwrap ")]
    return found


COMMANDS = [line for page in PAGES for line in commands_in(page)]
HERE = [line for line in COMMANDS if line.runs_here]
MENTIONED = sorted(
    {
        (page.name, " ".join(words.split()))
        for page in PAGES
        for words in INLINE.findall(ANY_BLOCK.sub("", page.read_text(encoding="utf-8")))
        if not words.startswith("kwrap COMMAND")
    }
)


def find_command(words: list[str]) -> tuple[click.Command, click.Context]:
    """The command that the first words mean; they are taken off the list."""
    command: click.Command = program
    context = click.Context(program, info_name="kwrap", **program.context_settings)
    while isinstance(command, click.Group) and words:
        name = words.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"no command {name}"
        command, context = found, click.Context(found, parent=context, info_name=name)
    return command, context


def words_of(text: str) -> list[str]:
    """The arguments after `kwrap`, without comments, pipes and redirections."""
    words = shlex.split(text, comments=True)[1:]
    ends = [place for place, word in enumerate(words) if word in ("|", ">", ">>", "&&", ";")]
    return words[: ends[0]] if ends else words


def test_there_are_commands_of_both_kinds() -> None:
    assert len([line for line in HERE if line.page == "README.md"]) >= 10
    assert len([line for line in COMMANDS if line.page == "README.md" and not line.runs_here]) >= 8
    assert len({line.page for line in COMMANDS}) >= 6
    assert len(MENTIONED) >= 20


@pytest.mark.parametrize("line", COMMANDS, ids=str)
def test_a_command_parses(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    words = words_of(line.text)
    command, context = find_command(words)
    for parameter in command.params:
        # The files that the command names are the reader's own.
        if isinstance(parameter.type, click.Path):
            monkeypatch.setattr(parameter, "type", click.STRING)
    command.make_context(context.info_name, words, parent=context.parent)


@pytest.mark.parametrize("page,text", MENTIONED)
def test_a_mentioned_command_exists(page: str, text: str) -> None:
    words = words_of(text)
    command, _ = find_command(words)
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    named = {word.split("=")[0] for word in words if word.startswith("--")} - {"--help", "--version"}
    assert named <= known, f"{page}: `{text}`"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_way_through_and_every_page_run(tmp_path: Path) -> None:
    """The README's commands, then those of the pages, in one folder: pages may use the README's world and run."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line in HERE:
        done = subprocess.run(line.text, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert (tmp_path / "world" / "baked.safetensors").is_file()
    page = (tmp_path / "world/runs/first/report.html").read_text(encoding="utf-8")
    assert 'alt="1: 1girl, solo, masterpiece' in page, "the picture that README draws is on the page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(ANY_BLOCK.sub("", text)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, heading = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{page.name}: {target}"
        if heading:
            assert heading in headings_of(found), f"{page.name}: {target}"


def headings_of(page: Path) -> set[str]:
    """The anchors that a page's headings have on the web."""
    lines = ANY_BLOCK.sub("", page.read_text(encoding="utf-8")).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.name)
def test_a_page_can_be_reached_from_the_readme(page: Path) -> None:
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        at = ahead.pop()
        seen.add(at)
        links = [link.partition("#")[0] for link in LINK.findall(at.read_text(encoding="utf-8"))]
        ahead += [
            found
            for link in links
            if link.endswith(".md") and "://" not in link and (found := (at.parent / link).resolve()) not in seen
        ]
    assert page in seen


def test_the_reference_is_current() -> None:
    # In a process of its own: click keeps what other tests have made of the commands.
    done = subprocess.run([sys.executable, ROOT / "docs" / "make_reference.py", "--check"], check=False)
    assert done.returncode == 0, "run `make docs`"


@pytest.mark.parametrize("words", [[], ["template"], ["trainer"]], ids=["kwrap", "template", "trainer"])
def test_no_command_is_cut_short_in_a_list(words: list[str]) -> None:
    shown = CliRunner().invoke(program, [*words, "--help"], terminal_width=80).output
    assert not [line for line in shown.splitlines() if line.endswith("...") and not line.startswith("Usage")]


@pytest.mark.skipif(sys.platform == "win32", reason="completion is shown for POSIX shells")
def test_the_list_of_make_fits_a_terminal() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) > 25 and not [line for line in lines if len(line) > 80]


def test_the_shell_completes_commands() -> None:
    environment = {**os.environ, "COMP_WORDS": "kwrap me", "COMP_CWORD": "1", "_KWRAP_COMPLETE": "bash_complete"}
    done = subprocess.run([Path(sys.executable).with_name("kwrap")], env=environment, capture_output=True, text=True)
    assert "merge" in done.stdout


def test_words_are_plain() -> None:
    """Readers have average English: *fix*, *shown*, *accept*."""
    odd = re.compile(r"\b[Mm]end(?:s|ed|ing)?\b|\bknowingly\b|\bleads? to\b")
    pages = [*PAGES, ROOT / "CHANGELOG.md", *(ROOT / "kohaku_wrap").rglob("*.py")]
    assert not [(page, found) for page in pages if (found := odd.findall(page.read_text(encoding="utf-8")))]
