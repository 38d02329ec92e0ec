"""The failures that a person can act on: what was wrong, where, and what to do next."""

from __future__ import annotations

import errno
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_TRAINER_FAILED = 3
EXIT_INTERRUPTED = 130


EXTRA_OF_PACKAGE = {
    "torch": "train",
    "accelerate": "train",
    "transformers": "train",
    "diffusers": "train",
    "bitsandbytes": "train",
    "llvmlite": "merge",
    "lycoris": "merge",
    "numba": "merge",
    "safetensors": "merge",
    "onnx": "demo",
    "onnxruntime": "evaluate",
}

LACKS_MEMORY = re.compile(
    r"failed to map segment|can't start new thread|Failed to launch worker thread|bad_alloc|"
    r"[Cc]an(?:no|')t allocate memory|^MemoryError\b",
    re.MULTILINE,
)
"""What libraries say where memory, or room for another thread, has run out."""


def reason_of(error: Exception) -> str:
    """What an error says without a number of the system and a path, which the message around it names.

    What Python says of a value of another kind means nothing to who restores a file.
    """
    if isinstance(error, TypeError | AttributeError):
        return "a value in it is of another kind than it should be"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0] if error.args else 'a key'}"
    return error.message if isinstance(error, KwrapError) else getattr(error, "strerror", None) or str(error)


def command_line(*words: object) -> str:
    """`kwrap` with these words as one types it into a shell: what needs quotes has them."""
    return shlex.join(["kwrap", *map(str, words)])


class KwrapError(Exception):
    """An expected failure, shown as one message and never as a traceback.

    Rooms derive one small class per kind of failure from it.
    """

    exit_code = EXIT_FAILED

    kind = "refused"
    """What an attempt is said to end of where this ends its worker; by itself the next attempt would meet it too."""

    is_lasting = False
    """Whether the next attempt would only meet it again, whatever the kind."""

    def __init__(self, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message}\n{self.next_step}" if self.next_step else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # As it is, whatever its class is made from: loader workers send it to the trainer's process.
        return type(self).__new__, (type(self), *self.args), vars(self)


DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


@contextmanager
def refusing(kind: type[KwrapError], message: str, next_step: str, *also: type[Exception]) -> Iterator[None]:
    """Refuse what cannot be read inside; its message ends with the reason, in brackets or after a colon.

    Caught is what is raised where a file is damaged or not what it should be, and what is named `also`.
    """
    try:
        yield
    except DAMAGE + also as error:
        reason = reason_of(error)
        told = f"{message} {reason}" if message.endswith(":") else f"{message} ({reason})"
        raise kind(told, next_step) from error


class UsageError(KwrapError):
    """What was asked for is wrong: a name, option or file."""

    exit_code = EXIT_USAGE


class MissingExtra(KwrapError):
    """A feature needs packages that were not installed."""

    def __init__(self, feature: str, extra: str, package: str = "") -> None:
        named = f": {package}" if package else ""
        super().__init__(
            f"{feature} needs packages that are not installed{named}",
            f"Install them with: pip install 'kohaku-wrap[{extra}]'",
        )


def find_extra(module: str) -> MissingExtra | None:
    """What brings a module that a command, or a helper of it, could not import; None where no extra has it."""
    package = module.partition(".")[0]
    return MissingExtra("this command", EXTRA_OF_PACKAGE[package], package) if package in EXTRA_OF_PACKAGE else None


class Interrupted(KwrapError):
    """The person stopped the work; what was finished is kept."""

    exit_code = EXIT_INTERRUPTED


def lacks_memory(error: BaseException | None) -> bool:
    """Whether memory has run out, by the error or one that it came from; a KwrapError speaks of something else."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if not isinstance(error, KwrapError) and LACKS_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass(frozen=True)
class Problem:
    """One fault of a file or of a set of options."""

    where: str
    """The key, line or option that is at fault."""

    what: str
    """What is wrong with it, and what was probably meant."""

    layer: str = ""
    """The file or layer that set it, where that is not the whole report's."""


class ProblemsFound(KwrapError):
    """All faults of a file at once, one line each."""

    def __init__(self, subject: str, problems: Sequence[Problem], next_step: str = "") -> None:
        width = max((len(problem.where) for problem in problems), default=0)
        count = f"{len(problems)} problem" + ("" if len(problems) == 1 else "s")
        lines = [f"{subject}: {count}"]
        for problem in problems:
            layer = f"  ({problem.layer})" if problem.layer else ""
            # A key of a file may hold a line break, which would make a line of its own.
            where = problem.where.replace("\n", "\\n")
            lines.append(f"  {where:<{width}}  {problem.what}{layer}")
        super().__init__("\n".join(lines), next_step)
        self.problems = tuple(problems)
