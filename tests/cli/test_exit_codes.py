"""Failures become one message and an exit code in one place."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from kohaku_wrap.cli import advice_for_os_error, program, run_program
from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound, UsageError


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (KwrapError("no such run", "Try `kwrap status`."), 1, "error: no such run\nTry `kwrap status`.\n"),
        (UsageError("what is that?"), 2, "error: what is that?\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "error: /x/y: the disk is full\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (ModuleNotFoundError("No module named 'torch'", name="torch.nn"), 1, "pip install 'kohaku-wrap[train]'\n"),
    ],
)
def test_a_failure_is_one_message(
    failure: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_arguments: object) -> None:
        raise failure

    monkeypatch.setattr(program, "main", fail)
    assert run_program([]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err


def test_an_unexpected_missing_module_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'kohaku_wrap.nothing'", name="kohaku_wrap.nothing")

    monkeypatch.setattr(program, "main", fail)
    with pytest.raises(ModuleNotFoundError):
        run_program([])


INTERRUPTED_IMPORT = """
import os, signal, sys
from kohaku_wrap import cli

def import_compiled(**arguments):
    try:
        if sys.argv[1] == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    finally:
        raise SystemError("returned a result with an exception set")

cli.program.main = import_compiled
cli.main()
"""
"""What pandas and numpy do when a signal arrives while their compiled modules are imported."""


def test_an_interrupt_that_an_import_turns_into_another_error_is_still_one() -> None:
    def call(how: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", INTERRUPTED_IMPORT, how]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    stopped = call("interrupted")
    assert stopped.returncode == 130
    assert "error: interrupted" in stopped.stderr and "Traceback" not in stopped.stderr
    assert "SystemError" in call("not interrupted").stderr


def test_an_unknown_verb_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(["trian"]) == 2
    assert "trian" in capsys.readouterr().err


def test_all_problems_are_shown_at_once() -> None:
    problems = [
        Problem("learning_rat", "unknown option; did you mean learning_rate?"),
        Problem("mixed_precision", '"bf17" is not one of no, fp16, bf16', layer="site.toml"),
    ]
    assert str(ProblemsFound("epsilon.toml", problems, "Run `kwrap template show epsilon --why`.")) == (
        "epsilon.toml: 2 problems\n"
        "  learning_rat     unknown option; did you mean learning_rate?\n"
        '  mixed_precision  "bf17" is not one of no, fp16, bf16  (site.toml)\n'
        "Run `kwrap template show epsilon --why`."
    )


def test_a_read_only_place_is_named() -> None:
    message, advice = advice_for_os_error(OSError(errno.EROFS, "Read-only file system", "/mnt/x"))
    assert message.startswith("/mnt/x: Read-only")
    assert advice
