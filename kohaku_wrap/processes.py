"""Helper processes: Python started so that it imports nothing from the folder in which one happens to stand.

A folder may be a stranger's, and a `torch.py` in it would run as soon as a helper imports torch. Every Python that
kwrap starts gets its command and its environment here. Not `-I`: absolute entries of PYTHONPATH are the person's own.

A helper that is asked runs as `python -m kohaku_wrap.processes PID MODULE`: it ends with the process PID that asked.
"""

from __future__ import annotations

import json
import os
import queue
import re
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import IO, Any

from kohaku_wrap.errors import EXIT_FAILED, LACKS_MEMORY, KwrapError, find_extra, lacks_memory

STOP_SECONDS = 10.0
"""How long a helper may take to end when it is asked to."""

ORPHAN_SECONDS = 0.5
"""How often a helper looks whether the process that asked is still there."""


class NoAnswer(KwrapError):
    """A helper process failed, gave no answer in time, or one that is no JSON."""


def count_cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def asked_threads() -> int:
    """What OMP_NUM_THREADS says; 0 for nothing."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isascii() and given.isdecimal() else 0


def python_command(*words: object) -> list[str]:
    """This Python with these words, such as `-m` and a module; the current folder is not on its import path."""
    return [sys.executable, "-P", *map(str, words)]


def safe_settings() -> dict[str, str]:
    """The variables that keep the current folder off the import path of a Python and of all that it starts.

    Empty and relative entries of PYTHONPATH go, absolute ones stay; an empty PYTHONPATH counts as none.
    """
    settings = {"PYTHONSAFEPATH": "1"}
    if given := os.environ.get("PYTHONPATH"):
        settings["PYTHONPATH"] = os.pathsep.join(filter(os.path.isabs, given.split(os.pathsep)))
    return settings


def safe_environment(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """The caller's variables with a safe import path, and `added` over them."""
    return {**os.environ, **safe_settings(), **(added or {})}


def safe_children() -> AbstractContextManager[None]:
    """Give a safe import path to processes that are started by others within, such as those of multiprocessing."""
    return setting_variables(safe_settings())


@contextmanager
def setting_variables(added: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the time of a block."""
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def ask_python(
    module: str,
    *arguments: object,
    request: Any = None,
    added: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout_seconds: float | None = None,
) -> Any:
    """The JSON answer of a helper module, run with `arguments` and, where it is given, `request` as JSON on stdin.

    `added`: variables over the caller's. Raises NoAnswer, whose message is the helper's last line on stderr; of a
    KwrapError that line holds message and advice. Raises MemoryError where the helper had too little.
    """
    try:
        done = subprocess.run(
            python_command("-m", "kohaku_wrap.processes", os.getpid(), module, *arguments),
            input="" if request is None else json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=safe_environment(added),
            cwd=folder,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"no answer within {timeout_seconds:g} s") from None
    if done.returncode and LACKS_MEMORY.search(done.stderr):
        raise MemoryError
    if done.returncode:
        raise NoAnswer((done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"])[-1])
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise NoAnswer("the process gave an answer that is no JSON") from None


def start_helper(
    module: str,
    *arguments: object,
    log: Path,
    added: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """A helper module that runs beside this process, in a session of its own; what it prints is in `log`."""
    command = python_command("-m", "kohaku_wrap.processes", os.getpid(), module, *arguments)
    how: dict[str, Any] = {"env": safe_environment(added), "start_new_session": True}
    with log.open("wb") as stream:
        return subprocess.Popen(command, stdin=stdin, stdout=stream, stderr=subprocess.STDOUT, **how)


class LineHelper:
    """A helper module that runs beside this process, gets a request as JSON on stdin and answers in lines of JSON.

    Each answer is put into a queue with the helper's index, and None at its end.
    """

    def __init__(
        self, module: str, request: Any, added: Mapping[str, str], index: int, answers: queue.Queue[tuple[int, Any]]
    ) -> None:
        """`added`: variables over the caller's."""
        self.child = subprocess.Popen(
            python_command("-m", "kohaku_wrap.processes", os.getpid(), module),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            env=safe_environment(added), start_new_session=True,
        )  # fmt: skip
        self.errors: list[str] = []
        self.threads = [
            threading.Thread(target=self._send, args=(json.dumps(request),), daemon=True),
            threading.Thread(target=self._read, args=(index, answers), daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def _send(self, text: str) -> None:
        assert self.child.stdin
        with suppress(OSError), self.child.stdin as stream:  # it has ended, and its end says why
            stream.write(text)

    def _read(self, index: int, answers: queue.Queue[tuple[int, Any]]) -> None:
        assert self.child.stdout
        for line in self.child.stdout:
            with suppress(ValueError):  # of a helper that was killed as it wrote
                answers.put((index, json.loads(line)))
        answers.put((index, None))

    def _read_errors(self) -> None:
        assert self.child.stderr
        for line in self.child.stderr:
            self.errors = [*self.errors[-40:], line]

    def describe_failure(self) -> str:
        """Why it ended without its work, by its last line on stderr; empty where it did not.

        Raises MemoryError, and MissingExtra where it could not import a package.
        """
        code = self.child.wait()
        self.threads[-1].join(STOP_SECONDS)
        if code == 0:
            return ""
        said = "".join(self.errors)
        if LACKS_MEMORY.search(said) or code == -9:
            raise MemoryError
        last = (said.strip().splitlines() or [f"it ended with code {code}"])[-1]
        absent = re.fullmatch(r"ModuleNotFoundError: No module named '([^']+)'", last)
        if absent and (missing := find_extra(absent[1])):
            raise missing
        return last

    def stop(self) -> None:
        """End the process where it still runs."""
        end_child(self.child)


def ask_in_lines(
    module: str,
    requests: Sequence[Any],
    added: Mapping[str, str],
    kind: type[KwrapError],
    message: str,
    next_step: str,
) -> Generator[dict[str, Any], None, None]:
    """The lines that a helper module answers, one process a request, as they come; all are stopped at the end.

    `added`: variables over the caller's. Raises what a helper says that ended it, else this kind of error, whose
    message ends with the helper's last words.
    """
    answers: queue.Queue[tuple[int, Any]] = queue.Queue()
    running: list[LineHelper] = []
    try:
        for index, request in enumerate(requests):
            running.append(LineHelper(module, request, added, index, answers))
        left = len(running)
        while left:
            index, line = answers.get()
            if line is not None:
                raise_answer(line)
                yield line
                continue
            if failure := running[index].describe_failure():
                raise kind(f"{message}: {failure}", next_step)
            left -= 1
    finally:
        for helper in running:
            helper.stop()


def end_child(child: subprocess.Popen[Any], seconds: float = STOP_SECONDS) -> None:
    """End a process where it still runs: by SIGTERM, after so long by force."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def keeping_outlet() -> Iterator[IO[str]]:
    """Standard output for answers alone: what is printed within, by compiled packages too, goes to stderr."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as outlet, redirect_stdout(sys.stderr):
        os.dup2(2, 1)
        yield outlet


def answer_in_lines(work: Callable[[Any, Callable[..., None]], None]) -> int:
    """Let `work` do the request on stdin; it is given that and what writes one line of the answer, by keywords.

    Returns the helper's exit code; the last line says why it failed.
    """
    with keeping_outlet() as answers:

        def tell(**words: Any) -> None:
            print(json.dumps(words), file=answers, flush=True)

        try:
            work(json.load(sys.stdin), tell)
        except OSError as error:
            tell(os_error=[error.errno, error.strerror, os.fsdecode(error.filename or "")])
        except KwrapError as error:
            tell(error=[error.message, error.next_step])
        else:
            return 0
    return EXIT_FAILED


def raise_answer(line: Mapping[str, Any]) -> None:
    """Raise what a helper said of its end by `answer_in_lines`; nothing for another line."""
    if told := line.get("os_error"):
        raise OSError(*told[:2], told[2] or None)
    if told := line.get("error"):
        raise KwrapError(*told)


def answer(make: Callable[[], Any]) -> None:
    """Print what a helper module makes as the JSON that `ask_python` reads."""
    with keeping_outlet() as outlet:
        json.dump(make(), outlet, default=str)


def accelerate_command() -> tuple[str, ...]:
    """The `accelerate` of this very Python, found without a PATH."""
    script = Path(sys.executable).parent / "accelerate"
    if script.exists():
        return (str(script),)
    return tuple(python_command("-m", "accelerate.commands.accelerate_cli"))


def end_with(parent: int) -> None:
    """End this process once the process `parent` is no longer its parent, so that a killed one leaves no orphan."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def main() -> int:
    """Run a helper module as its own program."""
    parent, module, *arguments = sys.argv[1:]
    threading.Thread(target=end_with, args=(int(parent),), daemon=True).start()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except KwrapError as error:
        if lacks_memory(error):
            raise
        print(". ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
