"""How lines and tables look: wrapped between words on a terminal, as they are elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kohaku_wrap.cli import output
from kohaku_wrap.wording import format_duration


@pytest.mark.parametrize(
    ("line", "width", "shown"),
    [
        ("short", 20, ["short"]),
        ("one two three four", 10, ["one two", "three four"]),
        ("run `kwrap resume first` now", 16, ["run", "`kwrap resume first`", "now"]),
        ("Type: kwrap resume first --step 3. Or not.", 16, ["Type:", "kwrap resume first --step 3.", "Or not."]),
        ("error: kwrap plan: no such option", 20, ["error: kwrap plan:", "no such option"]),
        ("    indented words here", 16, ["    indented", "    words here"]),
        ("  seed    two words of text", 20, ["  seed    two words", "          of text"]),
        ("/a/path/longer/than/the/line is kept", 12, ["/a/path/longer/than/the/line", "is kept"]),
        ("2; 832x1216: 1,024, 96x96: 4", 12, ["2;", "832x1216: 1,024,", "96x96: 4"]),
        ("1girl (25.7 %), 5%: 14, > 262", 13, ["1girl", "(25.7 %),", "5%: 14, > 262"]),
        ("it takes 3.8 GB of disk", 14, ["it takes", "3.8 GB of disk"]),
        (" 6.1 MB  network, gradients and more", 28, [" 6.1 MB  network, gradients", "         and more"]),
    ],
)
def test_a_long_line_breaks_between_words(line: str, width: int, shown: list[str]) -> None:
    assert output.wrap_line(line, width).split("\n") == shown


@pytest.mark.parametrize(
    ("rate", "shown"), [(1234.5, "1,234/s"), (2.345, "2.3/s"), (0.5, "0.5/s"), (0.014, "71 s each"), (0.0, "0/s")]
)
def test_a_rate_below_one_half_is_the_time_of_each(rate: float, shown: str) -> None:
    assert output.show_rate(rate) == shown


def test_a_pipe_gets_lines_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_error("word " * 60, "next " * 60)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_table_shows_paths_as_typed_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    output.print_table("", [("here", tmp_path / "runs" / "a"), ("count", 12345), ("word", "x")], "kwrap status")
    assert capsys.readouterr().out.splitlines() == ["here   runs/a", "count  12,345", "word   x", "Next: kwrap status"]


def test_the_next_command_is_never_broken_and_steers_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    output.print_next("kwrap plan 'a\x1b[31m.toml' --site site.toml")
    assert capsys.readouterr().out == "Next: kwrap plan 'a\\x1b[31m.toml' --site site.toml\n"


def test_a_row_is_one_line_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    output.print_table("Title", [("name", "word " * 40)])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_row_keeps_its_column_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    output.print_table("Title", [("name", "word " * 10), ("hash", "f" * 64), ("", "6.1 MB  " + "word " * 7)])
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        "name  word word word word word word word",
        "      word word word",
        "hash  " + "f" * 64,
        "      6.1 MB  word word word word word",
        "              word word",
    ]


def test_a_name_that_leaves_no_room_stands_on_a_line_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    pair = "epsilon after optimizer step 13,600 → epsilon after optimizer step 14,400"
    rows = [("held out", "none of them is in the dataset"), (pair, ("-0.00012 (-0.00020 to -0.00004) " * 3).strip())]
    output.print_table("", rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["held out  none of them is in the dataset", pair]
    assert all(line.startswith(" " * 10 + "-0.00012") and len(line) <= 80 for line in lines[2:])
    # Where all of it fits, the columns are as in a pipe.
    output.print_table("", [(pair, "1"), ("a", "2")])
    assert capsys.readouterr().out.splitlines() == [f"{pair}  1", f"{'a':<{len(pair)}}  2"]


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.paint("error:", fg="red") == "error:"
    monkeypatch.delenv("NO_COLOR")
    assert output.paint("error:", fg="red") != "error:"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (75, "1 min 15 s"), (7_260, "2 h 1 min"), (1_007_424, "11 d 15 h")]
)
def test_a_duration_has_two_units(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


def test_a_path_is_never_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    path = Path("/data/a long folder", "f" * 40)
    output.print_table("", [("file", path)])
    assert capsys.readouterr().out == f"file  {path}\n"


def test_control_characters_of_a_file_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table("", [("a\x1b[31m", "one\ntwo\x9b2J")])
    assert capsys.readouterr().out == "a\\x1b[31m  one\\ntwo\\x9b2J\n"


def test_no_rate_is_told_before_there_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 20.0, 40.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    report = output.plain_lines("merge", "bytes")
    report(1, 30_000_000)
    report(15_000_000, 30_000_000)
    assert capsys.readouterr().err == "merge: 0 of 30 MB\nmerge: 15 of 30 MB, 0.38/s, 40 s left\n"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "euc-jp"])
def test_json_is_json_on_a_terminal_of_any_encoding(encoding: str) -> None:
    program = (
        "import click; from kohaku_wrap.cli.output import print_json\n"
        "with click.Context(click.Command('a'), info_name='kwrap a b'): print_json({'é→😀': 'ö'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == {"schema_version": 1, "command": "a b", "é→😀": "ö"}


@pytest.mark.parametrize(("count", "last"), [(0, None), (5, "4"), (7, "2 more")])
def test_of_many_rows_the_first_are_shown_and_the_others_counted(count: int, last: str | None) -> None:
    rows = output.list_first("unreadable", [str(number) for number in range(count)])
    assert [value for _, value in rows[-1:]] == ([] if last is None else [last])
    assert len(rows) == min(count, 6)
