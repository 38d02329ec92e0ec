"""TOML that a stranger may have written ends in tables or in one message, soon."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohaku_wrap.errors import UsageError
from kohaku_wrap.files import expand_user
from kohaku_wrap.toml_files import UnreadableToml, load_toml, parse_toml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a = {'[' * 100_000}", "deep"),
        (f"a = {'[' * 40}{']' * 40}", "deep"),
        ("a = " + "{b = " * 40 + "1" + "}" * 40, "deep"),
        (".".join(["a"] * 20_000) + " = 1", "more than 32 parts"),
        ("[" + " . ".join(['"a"'] * 20_000) + "]", "more than 32 parts"),
        ("[[" + ".".join(["'a'"] * 20_000) + "]]", "more than 32 parts"),
        (f"a = {'9' * 5000}", "too many digits"),
        (f"a.b = [{'9' * 20}]", "64 bits"),
        ("a = \nb = 1", "line 1"),
    ],
)
def test_odd_files_end_in_one_message(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(text)
    with pytest.raises(UnreadableToml, match=message):
        load_toml(path)


def test_the_mark_that_windows_puts_before_a_text_is_no_statement(tmp_path: Path) -> None:
    path = tmp_path / "marked.toml"
    path.write_bytes('title = "é"\r\n'.encode("utf-8-sig"))
    assert load_toml(path) == {"title": "é"}


def test_the_mark_is_named_where_a_trainer_would_stop_at_it() -> None:
    """In files of a run, which are read as they stand."""
    with pytest.raises(ValueError, match=r"byte-order mark.*save it as UTF-8 without one"):
        parse_toml("\ufeffa = 1\n")


def test_rows_of_dots_in_a_text_are_no_key() -> None:
    assert parse_toml('a = """\n' + "x." * 100 + 'x\n"""\nb.c.d = 1\n')["b"] == {"c": {"d": 1}}


@given(st.text(max_size=200))
def test_any_text_gives_tables_or_a_value_error(text: str) -> None:
    try:
        assert isinstance(parse_toml(text), dict)
    except ValueError as error:
        assert str(error)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UnreadableToml, match="regular"):
        load_toml(tmp_path / "pipe.toml")


def test_a_user_that_is_not_there_is_named() -> None:
    assert expand_user("~/x") == Path.home() / "x"
    with pytest.raises(UsageError, match="~nobody-of-that-name is no user"):
        expand_user("~nobody-of-that-name/x")
