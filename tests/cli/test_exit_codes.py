"""Failures become one message and an exit code in one place."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kohaku_wrap.cli import advice_for_os_error, advise, program, run_program
from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound, UsageError
from kohaku_wrap.processes import ask_python


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (KwrapError("no such run", "Try `kwrap status`."), 1, "error: no such run\nTry `kwrap status`.\n"),
        (UsageError("what is that?"), 2, "error: what is that?\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, "error: /x/y: the disk is full\n"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x/y"), 1, "error: /x/y: your quota of the disk is used up\n"),
        (OSError(errno.EFBIG, "File too large", "/x/y"), 1, "error: /x/y: the file is longer than may be here\n"),
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


SWALLOWING_MODULE = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.{name})
    time.sleep(0.2)
except KeyboardInterrupt:
    pass
"""
"""What some compiled modules do when a signal arrives while they are imported."""

PROGRAM = """
from kohaku_wrap import cli

def work(**arguments):
    import swallowing, time
    time.sleep(30)

cli.program.main = work
cli.main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_import_does_not_swallow_an_interrupt(name: str, tmp_path: Path) -> None:
    (tmp_path / "swallowing.py").write_text(SWALLOWING_MODULE.format(name=name))
    argv = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    stopped = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment, timeout=25)
    assert stopped.returncode == 130
    assert "error: interrupted" in stopped.stderr and "Traceback" not in stopped.stderr


LATE = """
import os, signal, sys, time
from kohaku_wrap import cli
from kohaku_wrap.__main__ import main

def work(**arguments):
    import sending

cli.program.main = work
main()
"""
SENDING_MODULE = """
import os, signal
os.kill(os.getpid(), signal.{name})
"""

EARLY = """
import importlib, os, signal, sys

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == "kohaku_wrap.cli.output":
            os.kill(os.getpid(), signal.{name})

sys.meta_path.insert(0, Sender())
from kohaku_wrap.__main__ import main
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("program", [EARLY, LATE], ids=["before the command is imported", "in its last import"])
def test_a_signal_at_the_edges_is_one_message(name: str, program: str, tmp_path: Path) -> None:
    (tmp_path / "sending.py").write_text(SENDING_MODULE.format(name=name))
    argv = [sys.executable, "-c", program.format(name=name)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    stopped = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment, timeout=25)
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.startswith("error: interrupted\n") and "Traceback" not in stopped.stderr


def test_a_reader_that_goes_away_ends_what_is_only_shown() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-m", "kohaku_wrap", "template", "show", "epsilon"]
    shown = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(writer)
    assert (shown.returncode, shown.stderr) == (141, "")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian", "kwrap: no such command trian; did you mean `kwrap train`?\nRun `kwrap --help` to see the comm"),
        ("template lss", "kwrap template: no such command lss; did you mean ls?\n"),
        ("select demo --bd x", "kwrap select: no such option --bd; did you mean --db?\n"),
        ("select demo", "kwrap select: --db and --out are missing\nFor example: `kwrap select epsilon --db "),
        ("extract", "kwrap extract: SEL.parquet, --tars and --out are missing\n"),
        ("plan", "kwrap plan: TEMPLATE is missing\nFor example: `kwrap plan epsilon --site site.toml`. Run `"),
        ("merge", 'kwrap merge: FORMULA_OR_RECIPE is missing\nFor example: `kwrap merge "base + 1.0 * net(e'),
        ("template cp epsilon", "kwrap template cp: DESTINATION is missing\n"),
        ("template cp a b c", "kwrap template cp: got unexpected extra argument (c)\n"),
        ("template show epsilon --set", "kwrap template show: option --set requires an argument\n"),
        ("doctor --engine other", "kwrap doctor: --engine: 'other' is not one of 'sd-scripts', 'builtin'\n"),
        ("extend r --steps 99999999999999999999", "kwrap extend: --steps: 99999999999999999999 is not in the range"),
        ("sample m --sampler-steps 1001", "kwrap sample: --sampler-steps: 1001 is not in the range 1<=x<=1000\n"),
        ("demo x --posts many", "kwrap demo: --posts: 'many' is not a valid integer\n"),
        ("plan x --site y --selection z --images 3", "kwrap plan: --selection and --images are two sources"),
    ],
)
def test_a_mistyped_line_is_one_message(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(line.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {said}")
    assert len(shown.err.splitlines()) == 2 and "--help`" in shown.err


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program([]) == 2
    assert "Start:" in capsys.readouterr().err


@pytest.mark.parametrize("mib", [60, 250, 400, 1500])
@pytest.mark.parametrize("command", ["status x", "select demo --db x --out y", "template show demo"])
def test_a_limit_of_memory_is_named(command: str, mib: int) -> None:
    """Libraries crash, abort or blame a file where they do not fit."""
    line = f"ulimit -v {mib << 10} && exec {sys.executable} -P -m kohaku_wrap {command}"
    limited = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    assert limited.returncode == 1
    assert limited.stderr.startswith("error: there is not enough memory: this command needs "), limited.stderr
    assert len(limited.stderr.splitlines()) == 2


@pytest.mark.parametrize("command", ["--version", "--help", "template ls", "trainer show --help"])
def test_what_loads_nothing_needs_little(command: str) -> None:
    line = f"ulimit -v {100 << 10} && exec {sys.executable} -P -m kohaku_wrap {command}"
    limited = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    assert (limited.returncode, limited.stderr) == (0, "") and limited.stdout


LIMITED = """
import resource, sys
from kohaku_wrap.cli import run_program
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (130 << 20), resource.RLIM_INFINITY))
sys.exit(run_program(sys.argv[1:]))
"""
"""Memory that is gone only after the start."""


@pytest.mark.parametrize("command", ["merge a -m a={} -o y.safetensors", "inspect {}", "extract {} --tars t --out y"])
def test_memory_that_runs_out_is_named(command: str, tmp_path: Path) -> None:
    network = tmp_path / "a.safetensors"
    network.write_bytes(struct.pack("<Q", 54) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4))
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", LIMITED, *command.format(network).split()]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("note: ")]
    assert lines[0].startswith("error: there is not enough memory") and len(lines) == 2


def test_memory_that_a_helper_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greedy.py").write_text("bytearray(1 << 60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MemoryError):
        ask_python("greedy")


def call(*words: str | bytes | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", "-m", "kohaku_wrap", *words]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, errors="replace", check=False, timeout=120)


def test_a_name_that_is_no_utf8_is_one_message(tmp_path: Path) -> None:
    told = call("template", "check", os.fsencode(tmp_path) + b"/\xff.toml")
    assert told.returncode == 2 and "udcff.toml: no such template" in told.stderr and "Traceback" not in told.stderr


def test_a_current_folder_that_is_gone_is_one_message(tmp_path: Path) -> None:
    line = 'mkdir gone && cd gone && rmdir ../gone && exec "$@" -P -m kohaku_wrap demo world --posts 2'
    argv = ["bash", "-c", line, "bash", sys.executable]
    told = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert told.returncode == 1 and told.stderr.startswith("error: the current folder is gone\n"), told.stderr


@pytest.mark.parametrize("name", ["captions.arrow", "metadata_cache.json"])
def test_a_pipe_in_place_of_captions_is_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / "site.toml").write_text('[paths]\nimages = "."\nbase_model = "b"\n[machine]\nengine = "builtin"\n')
    told = call("plan", "demo", "--site", tmp_path / "site.toml")
    assert told.returncode == 1 and told.stderr.count("error: ") == 1 and "Traceback" not in told.stderr, told.stderr


@pytest.mark.parametrize(
    "words",
    [
        "template check pipe.toml",
        "plan demo --site pipe.toml",
        "select pipe.toml --db pipe.db --out s.parquet",
        "select demo --db pipe.db --out s.parquet",
        "extract pipe.parquet --tars . --out images",
        "import pipe.toml --out images",
        "merge pipe.toml -o m.safetensors",
        "merge a -m a=pipe.safetensors -o m.safetensors",
        "template cp demo pipe.toml --force",
        "sample pipe.safetensors --prompt a --out look",
        "prompt 1girl --dataset pipe.toml",
        "report pipe.safetensors -o page.html",
        "report pipe.safetensors -o pipe.toml",
        "train --locked pipe.toml --run r",
        "inspect pipe.safetensors",
    ],
)
def test_a_pipe_is_not_called_absent_and_not_replaced(words: str, tmp_path: Path) -> None:
    pipes = [tmp_path / f"pipe{ending}" for ending in (".toml", ".db", ".parquet", ".safetensors")]
    for pipe in pipes:
        os.mkfifo(pipe)
    told = call(*words.split(), folder=tmp_path)
    assert told.returncode in (1, 2) and "not a regular file" in told.stderr, told.stderr
    assert sorted(tmp_path.iterdir()) == sorted(pipes) and all(pipe.is_fifo() for pipe in pipes)


@pytest.mark.parametrize("words", ["select demo --db loop --out s.parquet", "import . --out loop", "demo loop"])
def test_a_link_to_itself_is_one_message(words: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    told = call(*words.split(), folder=tmp_path)
    assert told.returncode in (1, 2) and told.stderr.startswith("error: "), told.stderr
    assert "loop" in told.stderr and "Traceback" not in told.stderr, told.stderr


def test_a_user_without_a_home_is_told_how_to_name_one() -> None:
    """As services and containers have; pathlib says the same of a user that is not there."""
    with pytest.raises(RuntimeError) as raised:
        Path("~nobody-of-this-name").expanduser()
    assert advise(raised.value) == ("no home folder is known of this user", "Name one: export HOME=/FOLDER")


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
