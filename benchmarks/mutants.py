"""Do the tests notice? Small faults planted in the files that decide the weights, one by one, and the tests run.

    python benchmarks/mutants.py                          # at most 200 mutants a room, drawn by a seed
    python benchmarks/mutants.py --file order --limit 0   # every mutant of the files with "order" in their path

The faults are those of cosmic-ray's operators: other operators and numbers, conditions turned round, loops that do
nothing, exceptions that are not caught, decorators taken away. The files, the tests near each of them, and the
mutants that change nothing, with the reason, are in mutants.toml. Each mutant stands in a copy of the project, so that
processes which a test starts have it too, and the tests run in a fork of one process that has the libraries loaded.

A mutant is killed when a test fails. Exit code 1: too few are killed, a file has none, or an entry of mutants.toml
fits no mutant.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from planted_faults import Mutant, Source, draw_mutants

CONFIGURATION = Path(__file__).with_suffix(".toml")
TIMES_THE_TESTS = 5
SPARE_SECONDS = 10
WAITING_FACTOR = 6
"""A mutant may take so many times its processor seconds on the clock: other work goes on beside it."""

EXAMPLES = 30
"""Of a property, drawn alike each time; a mutant that only more of them find is found by luck."""

PLUGINS = ["-p", "pytest_timeout", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception"]
"""What the tests need and no more: starting pytest is most of the work."""

SPARE_MEMORY_BYTES = 8 << 30
KILLED, SURVIVED, TIMED_OUT, EQUIVALENT = "killed", "survived", "timed out", "equivalent"
PASSED = 0


@dataclass
class Report:
    """What became of one file's mutants."""

    file: str
    places: int
    """Where the operators can plant a fault."""

    outcomes: list[tuple[Mutant, str]] = field(default_factory=list)
    """Those that were drawn."""

    def count(self, outcome: str) -> int:
        return sum(found == outcome for _, found in self.outcomes)


@dataclass
class Project:
    """The files to mutate, and how."""

    root: Path
    copies: list[str]
    """Files and folders that the tests need."""

    imports: list[str]
    """Libraries to load once."""

    environment: dict[str, str]
    seed: int
    most_a_room: int
    least_share: float
    tests: dict[str, list[str]]
    """The tests near each file."""

    equivalent: dict[tuple[str, str, str], str]
    """Reasons by file, lines before and lines after."""

    @classmethod
    def read(cls, path: Path, root: Path) -> Project:
        """The configuration file's."""
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        reasons = {
            (name, entry["before"], after): entry["reason"]
            for name, entries in document.get("equivalent", {}).items()
            for entry in entries
            for after in ([entry["after"]] if isinstance(entry["after"], str) else entry["after"])
        }
        return cls(
            root, document["copies"], document.get("imports", []), document.get("environment", {}), document["seed"],
            document["most_a_room"], document["least_share"], document["tests"], reasons,
        )  # fmt: skip


class Copy:
    """A copy of the project in which one mutant at a time is tried."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.project = project
        self.folder = folder
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".venv", ".git")
        for name in project.copies:
            source, target = project.root / name, folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=ignore)
            else:
                shutil.copy(source, target)

    def plant(self, file: str, source: str) -> None:
        """Write the file, and forget what was compiled of it: its size and second may be the same."""
        path = self.folder / file
        path.write_text(source, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()

    def start_tests(self, tests: Sequence[str], cpu_seconds: float) -> int:
        """Run the tests in a forked process; its id, which is its group's too. Exit status: pytest's."""
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            log = os.open(self.folder / "tests.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = self.run_tests(tests, cpu_seconds)
        except BaseException:
            import traceback

            traceback.print_exc()
            status = 3
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def run_tests(self, tests: Sequence[str], cpu_seconds: float) -> int:
        """In the forked process: pytest's exit status."""
        import hypothesis
        import pytest

        class Settings:
            @pytest.hookimpl(trylast=True)
            def pytest_configure(self) -> None:
                phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
                hypothesis.settings.register_profile(
                    "mutants", max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=phases,
                    report_multiple_bugs=False, suppress_health_check=list(hypothesis.HealthCheck),
                )  # fmt: skip
                hypothesis.settings.load_profile("mutants")

        os.chdir(self.folder)
        sys.path.insert(0, str(self.folder))
        os.environ |= {"PYTHONPATH": str(self.folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        limit = int(cpu_seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPARE_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        options = ["-x", "-q", "--tb=line", f"--basetemp={self.folder / 'tmp'}"]
        return int(pytest.main([*options, *PLUGINS, *tests], plugins=[Settings()]))


class TestsFail(Exception):
    """Nothing can be said of a file's mutants: its tests fail without one."""


@dataclass
class Running:
    """Tests that run at the moment."""

    copy: Copy
    mutant: Mutant | None
    until: float
    """The monotonic time at which they are given up."""


def wait_for_one(running: dict[int, Running]) -> tuple[Running, int | None]:
    """The first of the processes to end and its exit status; None where it ran for too long."""
    while True:
        for pid, tests in list(running.items()):
            late = time.monotonic() > tests.until
            if late:
                os.killpg(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if not ended:
                continue
            del running[pid]
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what the tests started and left
            shutil.rmtree(tests.copy.folder / "tmp", ignore_errors=True)
            code = os.waitstatus_to_exitcode(status)
            return tests, None if late or code in (-signal.SIGXCPU, -signal.SIGKILL) else code
        time.sleep(0.01)


def try_mutants(
    project: Project, file: str, mutants: Sequence[Mutant], copies: Sequence[Copy]
) -> Iterator[tuple[Mutant, str]]:
    """Each mutant and what became of it; the tests must pass without one first."""
    tests = project.tests[file]
    original = (project.root / file).read_text(encoding="utf-8")
    cpu_seconds = 0.0
    for copy in copies:  # each, so that all else is compiled
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        pid = copy.start_tests(tests, 1800)
        _, code = wait_for_one({pid: Running(copy, None, time.monotonic() + 1800)})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if code != PASSED:
            raise TestsFail(f"{file}: its tests fail as they are\n{(copy.folder / 'tests.log').read_text()}")
    limit = TIMES_THE_TESTS * cpu_seconds + SPARE_SECONDS
    free, running = list(copies), {}
    waiting = iter([mutant for mutant in mutants if not mutant.reason])
    yield from ((mutant, EQUIVALENT) for mutant in mutants if mutant.reason)
    while True:
        while free and (mutant := next(waiting, None)):
            copy = free.pop()
            copy.plant(file, mutant.source)
            pid = copy.start_tests(tests, limit)
            running[pid] = Running(copy, mutant, time.monotonic() + WAITING_FACTOR * limit)
        if not running:
            break
        ended, code = wait_for_one(running)
        free.append(ended.copy)
        assert ended.mutant
        yield ended.mutant, TIMED_OUT if code is None else SURVIVED if code == PASSED else KILLED
    for copy in copies:
        copy.plant(file, original)


def print_reports(project: Project, reports: Sequence[Report], stale: Sequence[tuple[str, str, str]]) -> bool:
    """The table and the survivors; whether all is well."""
    width = max(len(report.file) for report in reports)
    print(f"{'file':{width}}  places  drawn  killed  survived  timed out  equivalent  share killed")
    for report in [
        *reports,
        Report("all", sum(each.places for each in reports), [one for r in reports for one in r.outcomes]),
    ]:
        killed, survived = report.count(KILLED), report.count(SURVIVED)
        share = f"{killed / (killed + survived):.1%}" if killed + survived else "-"
        print(
            f"{report.file:{width}}  {report.places:6}  {len(report.outcomes):5}  {killed:6}  {survived:8}"
            f"  {report.count(TIMED_OUT):9}  {report.count(EQUIVALENT):10}  {share:>12}"
        )
    for outcome in (SURVIVED, TIMED_OUT):
        for report in reports:
            for mutant in (mutant for mutant, found in report.outcomes if found == outcome):
                print(f"\n{outcome}: {mutant.file}:{mutant.line} {mutant.operator}")
                print(f"  - {mutant.before}\n  + {mutant.after}")
    empty = [report.file for report in reports if not report.outcomes]
    for file in empty:
        print(f"\n{file}: no mutant of it was tried")
    for file, before, _ in stale:
        print(f"\n{file}: mutants.toml names lines that are not there\n  - {before}")
    killed, survived = (sum(report.count(outcome) for report in reports) for outcome in (KILLED, SURVIVED))
    enough = killed >= project.least_share * (killed + survived)
    if not enough:
        print(f"\ntoo few are killed: {killed} of {killed + survived}, wanted {project.least_share:.0%}")
    return enough and not empty and not stale


def holds_lines(text: str, lines: str) -> bool:
    """Whether the text has these lines, one after the other, whatever their indent."""
    return f"\n{lines}\n" in "\n".join(["", *(line.strip() for line in text.splitlines()), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", action="append", default=[], help="only files with this in their path")
    parser.add_argument("--limit", type=int, help="mutants a room, 0: all (default: mutants.toml's)")
    parser.add_argument("--seed", type=int, help="of the draw (default: mutants.toml's)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--match", default="", help="only mutants whose changed lines hold this text")
    parser.add_argument("--configuration", type=Path, default=CONFIGURATION)
    parser.add_argument("--root", type=Path, default=CONFIGURATION.parents[1])
    options = parser.parse_args(arguments)
    project = Project.read(options.configuration, options.root.resolve())
    files = [file for file in project.tests if not options.file or any(part in file for part in options.file)]
    os.environ |= project.environment
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False  # or each process would compile all files again
    seed = project.seed if options.seed is None else options.seed
    texts = {file: (project.root / file).read_text(encoding="utf-8") for file in files}
    sources = [Source(file, text, seed) for file, text in texts.items()]
    stale = [
        key
        for key in project.equivalent
        if key[0] not in project.tests or (key[0] in files and not holds_lines(texts[key[0]], key[1]))
    ]
    limit = project.most_a_room if options.limit is None else options.limit
    drawn = draw_mutants(sources, limit, project.equivalent)
    places = {source.file: len(source.places) for source in sources}
    for library in ["hypothesis", "pytest", "pytest_timeout", *project.imports]:
        importlib.import_module(library)
    gc.freeze()  # what is loaded is not looked through in every process
    reports = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [Copy(project, Path(folder, str(number))) for number in range(options.processes)]
        for file in files:
            chosen = [each for each in drawn[file] if options.match in each.before + each.after]
            report = Report(file, places[file])
            reports.append(report)
            started = time.monotonic()
            try:
                for mutant, outcome in try_mutants(project, file, chosen, copies):
                    report.outcomes.append((mutant, outcome))
                    if outcome in (SURVIVED, TIMED_OUT):
                        print(f"{outcome}: {file}:{mutant.line}: {mutant.after!r}", file=sys.stderr, flush=True)
            except TestsFail as fault:
                print(fault, file=sys.stderr, flush=True)
            seconds = time.monotonic() - started
            print(f"{file}: {len(chosen)} mutants in {seconds:.0f} s", file=sys.stderr, flush=True)
    return 0 if print_reports(project, reports, stale) else 1


if __name__ == "__main__":
    sys.exit(main())
