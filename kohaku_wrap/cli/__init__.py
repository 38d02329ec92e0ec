"""The `kwrap` command: verbs in the order of use, and the one place where errors become exit codes."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

import kohaku_wrap
from kohaku_wrap.cli.output import print_error, print_note
from kohaku_wrap.cli.usage import describe_usage_error
from kohaku_wrap.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Interrupted,
    KwrapError,
    find_extra,
    lacks_memory,
)
from kohaku_wrap.outlets import OutputLost, loss_of_document

SECTIONS: dict[str, tuple[str, ...]] = {
    "Start": ("demo", "doctor", "trainer"),
    "Data": ("select", "extract", "caption", "import"),
    "Training": (
        *("template", "plan", "cache", "train", "status", "resume", "extend", "branch", "verify"),
        *("rename", "remove"),
    ),
    "Looking": ("report", "prompt", "sample", "evaluate", "inspect"),
    "Merging": ("merge", "publish"),
}
"""One module of this folder a verb, in the order in which a person meets them."""

LONGEST_SENTENCE = 64
"""Of a command's first sentence, so that the list of commands fits 80 columns; narrower ones wrap it."""

IMPORT_WAIT_SECONDS = 0.05
"""Between two looks whether an import that a signal fell into is over."""


class Verbs(click.Group):
    """A group that imports a verb's module only when the verb is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in SECTIONS.values() for name in names]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command = importlib.import_module(f"kohaku_wrap.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb that is meant; an unknown one is answered with the nearest."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            meant = f"; did you mean `kwrap {near[0]}`?" if near else ""
            raise click.UsageError(f"no such command {args[0]}{meant}", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(name) for name in self.list_commands(ctx))
        for section, names in SECTIONS.items():
            commands = [(name, self.get_command(ctx, name)) for name in names]
            rows = [
                (name.ljust(width), command.get_short_help_str(limit=LONGEST_SENTENCE))
                for name, command in commands
                if command is not None
            ]
            with formatter.section(section):
                formatter.write_dl(rows)


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with `kwrap demo DIR`, or with `make epsilon` in a checkout; docs/words.md explains the words.",
)
@click.version_option(kohaku_wrap.__version__, prog_name="kwrap")
def program() -> None:
    """Select, caption, train, resume exactly and merge: large SDXL fine-tunes on kohya sd-scripts."""


def run_program(arguments: Sequence[str] | None = None) -> int:
    """Run one `kwrap` command and return its exit code; every expected failure ends in one message."""
    try:
        code = call_program(arguments)
        sys.stdout.flush()
        return code or judge_output()
    except OutputLost as lost:
        # A reader that went away (`kwrap … | head`) has seen what it wanted; a disk that is full is said.
        if not lost.is_gone:
            print_error(lost.message, lost.next_step)
        return lost.exit_code
    except click.exceptions.NoArgsIsHelpError as help_wanted:
        help_wanted.show()
        return EXIT_USAGE
    except click.UsageError as usage:
        print_error(*describe_usage_error(usage, program, sys.argv[1:] if arguments is None else arguments))
        return EXIT_USAGE
    except (KeyboardInterrupt, click.Abort):
        return tell_interrupted()
    except Interrupted as stopped:
        # Asked for, and so no error.
        print_note(f"{stopped.message}\n{stopped.next_step}".rstrip())
        return stopped.exit_code
    except KwrapError as error:
        print_error(error.message, error.next_step)
        return error.exit_code
    except (ModuleNotFoundError, OSError, MemoryError, UnicodeEncodeError, RuntimeError) as error:
        print_error(*advise(error))
        return EXIT_FAILED


def advise(error: Exception) -> tuple[str, str]:
    """What an error of Python's own means to the person, and what to do next; raised again where it means nothing."""
    if isinstance(error, ModuleNotFoundError):
        missing = find_extra(error.name or "")
        if missing is None:
            raise error
        return missing.message, missing.next_step
    if isinstance(error, UnicodeEncodeError):
        before, after = error.object[: error.start], error.object[error.start :]
        shown = ascii(re.split(r'["\n]', before)[-1] + re.split(r'["\n]', after)[0])[1:-1]
        return f"{shown}: a name or text that is no UTF-8 cannot be written into a file", "Rename it, or fix the text."
    if isinstance(error, OSError):
        return advice_for_os_error(error)
    if isinstance(error, RuntimeError):
        if "home directory" in str(error):  # of pathlib and platformdirs
            return "no home folder is known of this user", "Name one: export HOME=/FOLDER"
        if "Symlink loop" not in str(error):  # of Path.resolve, until Python 3.13
            raise error
        return f"{str(error).split(' from ')[-1]}: a link to itself", "Remove the link, or fix it."
    return "there is not enough memory for this", "Free some, or raise its limit, and run it again."


def call_program(arguments: Sequence[str] | None) -> int:
    """The exit code of the command itself; where memory ran out, whatever came of it, raises MemoryError."""
    try:
        result: Any = program.main(args=arguments, prog_name="kwrap", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exit_request:
        return int(exit_request.exit_code)
    except Exception as error:  # of any class may say that memory ran out; the others go on as they are
        if lacks_memory(error):
            raise MemoryError from error
        raise


def judge_output() -> int:
    """The exit code of a command whose work is done: 0, unless a document that was asked for was cut."""
    lost = loss_of_document()
    if lost is None:
        return 0
    print_error(lost.message, "The work itself is done.")
    return EXIT_FAILED


def tell_interrupted() -> int:
    """The last words after a signal, and the exit code."""
    print_error("interrupted", "What was finished is kept; run the same command again to go on.")
    return EXIT_INTERRUPTED


def advice_for_os_error(error: OSError) -> tuple[str, str]:
    """What a failed system call means to the person, and what to do next."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    if error.errno == errno.ENOENT and not Path(name).is_absolute() and not is_here():
        return "the current folder is gone", "Change to a folder that is there: cd"
    where = f"{name}: " if name else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        limit = {errno.EDQUOT: "your quota of the disk is used up", errno.EFBIG: "the file is longer than may be here"}
        what = limit.get(error.errno, "the disk is full")
        free = "Raise the limit that `ulimit -f` shows" if error.errno == errno.EFBIG else "Free some space"
        return f"{where}{what}", f"{free} and run the same command again; nothing is half-written."
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{where}{error.strerror}", "Choose a path that you may write to, or fix its permissions."
    if error.errno == errno.EEXIST and not Path(name).is_dir():
        return f"{where}a file, not a folder", "Choose another path."
    return f"{where}{error.strerror or error}", "Check the path and run the same command again."


def is_here() -> bool:
    """Whether the current folder is still there."""
    try:
        Path.cwd()
    except OSError:
        return False
    return True


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported at this point of the program."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, after the imports that are under way.

    Compiled modules turn an interrupt of their import into errors of their own or swallow it.
    """
    if not is_importing(frame):
        raise KeyboardInterrupt

    def try_again(_alarm: int, later: FrameType | None) -> None:
        if is_importing(later):
            signal.setitimer(signal.ITIMER_REAL, IMPORT_WAIT_SECONDS)
        else:
            # Not raised from here: the command may have taken the signal over by now.
            signal.raise_signal(number)

    signal.signal(signal.SIGALRM, try_again)
    signal.setitimer(signal.ITIMER_REAL, IMPORT_WAIT_SECONDS)


def main() -> NoReturn:
    """The console script: SIGTERM ends a command as tidily as SIGINT does."""
    try:
        # Inside, as a signal may come as soon as it is taken.
        signal.signal(signal.SIGTERM, interrupt)
        for number in (signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, interrupt)
        code = run_program()
        if signal.setitimer(signal.ITIMER_REAL, 0)[0]:
            # It fell into the command's last imports; the alarm would end the interpreter's own end.
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        code = tell_interrupted()
    # All is done and said: what comes now only shortens the interpreter's end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: os._exit(code))
    try:
        sys.stdout.flush()
    except OutputLost as lost:
        code = code or lost.exit_code
    sys.exit(code)
