"""Standard output and error of a process whose work does not depend on them: printing is never part of the work."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from kohaku_wrap.errors import EXIT_FAILED, EXIT_INTERRUPTED, KwrapError

EXIT_UNREAD = 141
"""What a shell shows of a command that SIGPIPE ended: 128 + 13."""

NAMES = {1: "standard output", 2: "standard error"}
GONE = frozenset({errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ENXIO})
"""Nobody reads any more; a terminal that went says EIO."""

PIPE_BYTES = 4096
"""PIPE_BUF: what a pipe that can be written to takes without waiting."""

PATIENCE_SECONDS = 1.0
"""How long a message waits for a reader that does not read, such as a stopped terminal, before it is left out."""


class OutputLost(KwrapError):
    """The output was the purpose of the command, and it cannot be written."""

    def __init__(self, name: str, error: OSError, is_gone: bool) -> None:
        super().__init__(
            f"{name} cannot be written: {error.strerror}", "Send the output to another place, or free some space."
        )
        self.exit_code = EXIT_UNREAD if is_gone else EXIT_FAILED
        self.is_gone = is_gone


class Outlet(io.FileIO):
    """A descriptor that leaves out what cannot be written, or says so once where writing is the purpose."""

    def __init__(self, descriptor: int, is_purpose: bool = False) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.name_shown = NAMES.get(descriptor, f"descriptor {descriptor}")
        self.is_purpose = is_purpose
        self.is_document = False
        self.may_wait = True
        self.error: OSError | None = None
        self.is_gone = False
        self._is_device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
        self._is_stuck = False

    def write(self, data: Any) -> int:
        """Hand over all of the data, or leave out what is not taken; raises OutputLost once where that matters."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                if not self.is_ready():
                    break
                done += super().write(view[done : done + PIPE_BYTES]) or 0
        except OSError as error:
            self.lose(error)
        else:
            if self.error is not None and self.is_purpose:
                self.lose(self.error)
        return len(view)

    def is_ready(self) -> bool:
        """Whether the reader takes something now; waits for it, once and not for long where it may not wait."""
        seconds = None if self.may_wait else 0.0 if self._is_stuck else PATIENCE_SECONDS
        self._is_stuck = not select.select([], [self.fileno()], [], seconds)[1]
        return not self._is_stuck

    def lose(self, error: OSError) -> None:
        """Note that the outlet cannot be written, and go on without it where nobody reads it any more."""
        first, self.error = self.error is None, error
        self.is_gone = error.errno in GONE or (error.errno == errno.EIO and self._is_device)
        if self.is_gone:
            # Libraries and children that write to the descriptor itself must not fail of it either.
            replace_by_nothing(self.fileno())
        if self.is_purpose:
            self.is_purpose = False
            raise OutputLost(self.name_shown, error, self.is_gone)
        if first:
            for listener in _listeners:
                listener(describe_loss(self))


OUTLETS: dict[int, Outlet] = {}
"""Of this process, by descriptor; empty where `open_outlets` was not called."""

_listeners: list[Callable[[str], None]] = []


def open_outlets() -> None:
    """Let all that this process prints go through outlets, before anything is printed or opened.

    Until `go_on_without_reader` standard output is the purpose: what cannot be written raises OutputLost.
    """
    closed = [descriptor for descriptor in (0, 1, 2) if not is_open(descriptor)]
    for descriptor in closed:
        # Else the next file that is opened would be standard output.
        replace_by_nothing(descriptor)
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        outlet = OUTLETS[descriptor] = Outlet(descriptor, is_purpose=descriptor == 1)
        if descriptor in closed:
            outlet.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
            outlet.is_gone = True
        encoding = getattr(stream, "encoding", None) or "utf-8"
        is_live = descriptor == 2 or outlet.isatty()
        # Names of files may hold bytes that are no text.
        layer: Any = outlet if is_live else io.BufferedWriter(outlet)
        text = io.TextIOWrapper(layer, encoding, "backslashreplace", write_through=is_live)
        setattr(sys, "stdout" if descriptor == 1 else "stderr", text)


def go_on_without_reader(is_document: bool = False) -> None:
    """From now on the work is the purpose: nobody who stops reading, and no terminal that closes, ends it.

    `is_document`: whether standard output is asked for as a whole, as with `--json`. Children inherit that a closed
    terminal is no reason to end.
    """
    for descriptor, outlet in OUTLETS.items():
        outlet.is_purpose = False
        outlet.is_document = is_document and descriptor == 1
        outlet.may_wait = descriptor == 1
    # A background job of a terminal set to `tostop` would be stopped by a line that it prints.
    for number in (signal.SIGHUP, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)


def run_as_work(main: Callable[[], int]) -> NoReturn:
    """Be a program of its own, such as `make epsilon`, whose work goes on when nobody reads what it prints.

    A KwrapError is printed, and its exit code that of the program.
    """
    open_outlets()
    go_on_without_reader()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = main()
    except KwrapError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)


def loss_of_document() -> OutputLost | None:
    """Why a document that was asked for was not written whole, where somebody may read it still."""
    outlet = OUTLETS.get(1)
    if outlet is None or outlet.error is None or outlet.is_gone or not outlet.is_document:
        return None
    return OutputLost(outlet.name_shown, outlet.error, outlet.is_gone)


@contextmanager
def telling_losses(listener: Callable[[str], None]) -> Iterator[None]:
    """For the time of the block, tell the listener of each outlet that cannot be written, those before it included."""
    _listeners.append(listener)
    try:
        for outlet in OUTLETS.values():
            if outlet.error is not None:
                listener(describe_loss(outlet))
        yield
    finally:
        _listeners.remove(listener)


def describe_loss(outlet: Outlet) -> str:
    return f"{outlet.name_shown} cannot be written ({outlet.error.strerror if outlet.error else 'unknown'})"


def is_open(descriptor: int) -> bool:
    with suppress(OSError):
        return bool(os.fstat(descriptor))
    return False


def replace_by_nothing(descriptor: int) -> None:
    """Let the descriptor take everything and give nothing."""
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != descriptor:
        os.dup2(nothing, descriptor)
        os.close(nothing)
    else:
        os.set_inheritable(descriptor, True)
