"""Every command under every condition of its surroundings: the exit code, and what is left behind.

Real processes. Commands come from the program itself, so that one without a row fails the test.
"""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from kohaku_wrap.cli import program

TRAINING = Path(__file__).parents[1] / "training"
WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
"""For root, whom no permission of a file stops."""

CONDITIONS = (
    "closed stdout",
    "closed stderr",
    "reader gone",
    "terminal gone",
    "full log",
    "no permission",
    "read-only",
    "SIGTERM",
)
SHOWN_CODES = {"closed stdout": 141, "reader gone": 141, "terminal gone": 141, "full log": 1}
"""Of a command whose only purpose is what it prints; a command that does more is not changed by these."""


@dataclass(frozen=True)
class Row:
    """One command as it is tried. `{world}` is read, `{out}` is written."""

    words: str
    """After `kwrap`."""

    shows: bool = False
    """Whether its only purpose is what it prints."""

    code: int = 0
    """Where nothing is in its way."""

    makes: str = ""
    """What lies in `{out}` after it is done, and is not there before."""


ROWS = {
    "demo": Row("demo {out}/world --posts 2", makes="world/site.toml"),
    "template ls": Row("template ls", shows=True),
    "template show": Row("template show {world}/mine.toml", shows=True),
    "template check": Row("template check {world}/mine.toml --no-modules"),
    "template cp": Row("template cp {world}/mine.toml {out}/mine.toml", makes="mine.toml"),
    "template diff": Row("template diff epsilon {world}/mine.toml", shows=True),
    "inspect": Row("inspect {world}/base/model.safetensors --no-hash", shows=True),
    # Without a repository: what is tried is that it says so and leaves nothing.
    "trainer install": Row("trainer install --source {world}/nothing", code=1),
    "trainer show": Row("trainer show", shows=True),
    "doctor": Row("doctor --engine builtin"),
    "select": Row("select demo --db {world}/danbooru.db --out {out}/s.parquet", makes="s.parquet"),
    "extract": Row(
        "extract {world}/demo.parquet --tars {world}/tars --out {out}/images --jobs 1 --max-missing 9",
        makes="images/extracted.parquet",
    ),
    "caption": Row(
        "caption {world}/demo.parquet --db {world}/danbooru.db --out {out}/images --format jsonl",
        makes="images/captions.jsonl",
    ),
    "plan": Row("plan demo --site {world}/site.toml", shows=True),
    "train": Row("train demo --site {world}/site.toml --run new --dry-run", shows=True),
    "status": Row("status {world}/runs/r", shows=True),
    "resume": Row("resume {out}/r", makes="r/attempts/1/end.json"),
    "verify": Row("verify {world}/runs/r"),
    "merge": Row("merge a -m a={world}/base/model.safetensors -o {out}/m.safetensors", makes="m.safetensors"),
    # A run without a network.
    "publish": Row("publish {world}/runs/r --out {out}/published", code=1),
}


def list_commands(group: click.Group, context: click.Context, prefix: str = "") -> Iterator[str]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from list_commands(command, context, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


COMMANDS = list(list_commands(program, click.Context(program)))


def kwrap(words: list[str]) -> list[str]:
    """The program from its door on; a training has the plain worker."""
    return [sys.executable, str(TRAINING / "plain_kwrap.py"), *words]


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """A world, a trained run, and a folder that nobody may enter."""
    place = Path(tempfile.mkdtemp(prefix="kwrap-conditions-"))
    world = place / "world"
    calls = (
        f"demo {world} --posts 40",
        f"select demo --db {world}/danbooru.db --out {world}/demo.parquet",
        f"extract {world}/demo.parquet --tars {world}/tars --out {world}/images --jobs 1 --max-missing 9",
        f"caption {world}/demo.parquet --db {world}/danbooru.db --out {world}/images",
    )
    environment = {**os.environ, "KWRAP_HOME": str(place / "home")}
    for call in calls:
        subprocess.run(kwrap(call.split()), check=True, env=environment, capture_output=True)
    (world / "mine.toml").write_text('extends = "demo"\n')
    sys.path.insert(0, str(TRAINING))
    from plain_runs import make_run, train

    train(make_run(world / "runs" / "r"))
    make_run(place / "fresh" / "runs" / "r")
    (place / "locked").mkdir(mode=0o000)
    yield place
    (place / "locked").chmod(0o700)
    shutil.rmtree(place)


@dataclass(frozen=True)
class Outcome:
    """What a process came to."""

    code: int
    stderr: str
    out: Path


def try_row(place: Path, name: str, condition: str) -> Outcome:
    """The command under one condition, in a folder of its own."""
    row = ROWS[name]
    case = place / f"{name} {condition}".replace(" ", "-")
    out = case / "out"
    out.mkdir(parents=True)
    if name == "resume":
        shutil.copytree(place / "fresh" / "runs" / "r", out / "r")
    world = place / "locked" / "world" if condition == "no permission" else place / "world"
    words = row.words.format(world=world, out=out).split()
    environment = {**os.environ, "KWRAP_HOME": str(case / "home"), "HOME": str(case)}
    (case / "home").mkdir()
    settings: dict[str, object] = {"env": environment, "cwd": case, "start_new_session": True}
    if condition == "read-only":
        for path in (out, *(path for path in out.rglob("*") if path.is_dir())):
            path.chmod(0o555)
    argv = kwrap(words)
    if condition in ("no permission", "read-only") and os.geteuid() == 0:
        argv = [*WITHOUT_RIGHTS, *argv]
    return Outcome(*run_under(condition, argv, settings), out)


def run_under(condition: str, argv: list[str], settings: dict[str, object]) -> tuple[int, str]:
    """Exit code and standard error, where somebody sees it."""
    start: Callable[..., subprocess.Popen[str]] = lambda argv=argv, **streams: subprocess.Popen(  # noqa: E731
        argv, stdin=subprocess.DEVNULL, text=True, **{**settings, **streams}
    )
    pipe = subprocess.PIPE
    if condition == "closed stdout":
        process = start(["bash", "-c", 'exec "$@" >&-', "bash", *argv], stderr=pipe)
    elif condition == "closed stderr":
        process = start(["bash", "-c", 'exec "$@" 2>&-', "bash", *argv], stdout=subprocess.DEVNULL)
    elif condition == "reader gone":
        reader, writer = os.pipe()
        os.close(reader)
        process = start(stdout=writer, stderr=writer)
        os.close(writer)
    elif condition == "terminal gone":
        master, slave = pty.openpty()
        process = start(stdout=slave, stderr=slave)
        os.close(slave)
        os.close(master)
    elif condition == "full log":
        with Path("/dev/full").open("w") as full:
            process = start(stdout=full, stderr=full)
    else:
        process = start(stdout=subprocess.DEVNULL, stderr=pipe)
        if condition == "SIGTERM":
            while process.poll() is None and not takes_signal(process.pid, signal.SIGTERM):
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=300)
    return process.returncode, stderr or ""


def takes_signal(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal, which Python itself has not while it starts."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (number - 1) & 1)


def expected_codes(row: Row, condition: str) -> set[int]:
    """The exit codes that are right."""
    if condition == "SIGTERM":
        return {130, row.code}
    if condition == "no permission" and "{world}" in row.words:
        return {1, 2}
    if condition == "read-only" and row.makes:
        return {1, 2}
    return {SHOWN_CODES.get(condition, row.code) if row.shows else row.code}


def test_every_command_has_a_row() -> None:
    assert sorted(ROWS) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_under_every_condition(place: Path, name: str) -> None:
    row = ROWS[name]
    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(CONDITIONS, pool.map(lambda each: try_row(place, name, each), CONDITIONS), strict=True))
    wrong = []
    for condition, outcome in outcomes.items():
        if outcome.code not in expected_codes(row, condition):
            wrong.append(f"{condition}: exit code {outcome.code}")
        if "Traceback" in outcome.stderr or "Exception ignored" in outcome.stderr:
            wrong.append(f"{condition}: {outcome.stderr[-2000:]}")
        if row.makes and (outcome.code == 0) > (outcome.out / row.makes).exists():
            wrong.append(f"{condition}: exit code 0 without {row.makes}")
        # `.supervisor.lock` is the run's own.
        names = [path.name for path in outcome.out.rglob(".*") if path.name != ".supervisor.lock"]
        if names and condition != "SIGTERM":
            wrong.append(f"{condition}: left {names}")
        if any(name.endswith(".part") for name in names):
            wrong.append(f"{condition}: left half a file, {names}")
    assert not wrong, "\n".join(wrong)
