"""No Python that kwrap starts imports anything from the folder in which one stands.

Every module of the standard library and every package that kwrap or the trainer imports lies as a trap in the current
folder; one that runs leaves a line in a file, with who ran it.
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from kohaku_wrap.demo.world import make_world
from kohaku_wrap.errors import MissingExtra
from kohaku_wrap.files import shipped_folder
from kohaku_wrap.processes import (
    LineHelper,
    NoAnswer,
    ask_python,
    python_command,
    safe_children,
    safe_environment,
    safe_settings,
)

PACKAGES = ("torch", "numpy", "accelerate", "transformers", "diffusers", "lycoris", "bitsandbytes", "safetensors",
            "networks", "library", "click", "rich", "toml", "PIL", "pyarrow", "polars", "pip", "sitecustomize",
            "usercustomize", "kohaku_wrap", "evil")  # fmt: skip

TRAP = """import os, sys
with open({marker!r}, "a") as stream: stream.write(__name__ + " in " + repr(sys.argv) + "\\n")
raise ImportError("a trap")
"""


@pytest.fixture(scope="module")
def trapped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder full of traps and the file that they write."""
    folder = tmp_path_factory.mktemp("trapped")
    marker = folder / "marker.txt"
    for name in {*sys.stdlib_module_names, *PACKAGES} - set(sys.builtin_module_names):
        (folder / f"{name}.py").write_text(TRAP.format(marker=str(marker)))
    return folder, marker


def run(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("kwrap")), *words]
    environment = {**os.environ, "KWRAP_HOME": str(folder.parent / "kwrap-home"), **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_traps_work(trapped: tuple[Path, Path]) -> None:
    folder, marker = trapped
    subprocess.run([sys.executable, "-c", "import torch"], cwd=folder, capture_output=True, check=False)
    assert "torch in" in marker.read_text()
    marker.unlink()


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_no_command_and_no_process_of_it_steps_into_a_trap(trapped: tuple[Path, Path]) -> None:
    """From the database to a trained, resumed and verified run, with the traps in the run's own folder, too."""
    folder, marker = trapped
    world = folder / "world"
    make_world(world, posts=24)
    site, images, selection = str(world / "site.toml"), str(world / "images"), str(world / "demo.parquet")
    database, steps = str(world / "danbooru.db"), ["--set", "max_train_steps=2", "--set", "save_every_n_steps=1"]
    (folder / "mine.toml").write_text('extends = "demo"\noptimizer_type = "evil.Opt"\npreset = "own"\n')
    (folder / "presets").mkdir()
    shipped = (shipped_folder("templates") / "presets" / "kohaku-lokr.toml").read_text()
    (folder / "presets" / "own.toml").write_text(shipped.replace("conv_in", "conv_inn") + "\n# mine\n")
    commands = [
        ["select", "demo", "--db", database, "--out", selection],
        ["extract", selection, "--tars", str(world / "tars"), "--out", images, "--jobs", "2"],
        ["caption", selection, "--db", database, "--out", images, "--dataset", "demo"],
        ["template", "check", "mine.toml"],
        ["template", "check", "mine.toml", "--trust", "evil"],
        ["template", "show", "mine.toml"],
        ["plan", "demo", "--site", site],
        ["doctor", "demo", "--site", site, "--engine", "builtin"],
        ["trainer", "show"],
        ["train", "demo", "--site", site, "--run", "one", "--set", "effective_batch=4", *steps],
        ["resume", "one", "--site", site, "--step", "1"],
        ["verify", str(world / "runs" / "one"), "--deep", "2"],
    ]
    done = {}
    for words in commands:
        if words[0] == "resume":
            for trap in folder.glob("*.py"):
                (world / "runs" / "one" / trap.name).write_text(trap.read_text())
        done[tuple(words)] = run(words, folder, PYTHONPATH=str(folder.parent / "absent"))
        assert not marker.exists(), f"{words}: {marker.read_text()}"
    failed = {words[:2]: one.stderr[-800:] for words, one in done.items() if one.returncode and "check" not in words}
    assert not {words for words in failed if words[0] not in ("template", "doctor", "trainer")}, failed


@pytest.mark.parametrize("path", [None, "", ":", ".", "sub:.:", "..", "/absent:."])
def test_a_helper_has_absolute_entries_alone(path: str | None, trapped: tuple[Path, Path],
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    folder, marker = trapped
    monkeypatch.chdir(folder)
    if path is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", path)
    code = "import json, subprocess, sys; print(json.dumps(sys.path)); sys.stdout.flush(); " \
           "subprocess.run([sys.executable, '-m', 'random'], stdout=sys.stderr)"  # fmt: skip
    done = subprocess.run(
        python_command("-c", code), env=safe_environment(), capture_output=True, text=True, check=True
    )
    assert str(folder) not in done.stdout
    assert not marker.exists()
    assert ("/absent" in done.stdout) == ("/absent" in (path or ""))


def test_processes_of_multiprocessing_are_helpers_too(
    trapped: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, marker = trapped
    monkeypatch.chdir(folder)
    before = dict(os.environ)
    with safe_children(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        # What spawn hands over is the parent's path, in which pytest has put the tests' own folders.
        assert str(folder) not in pool.submit(eval, "__import__('sys').path").result()
    assert dict(os.environ) == before
    assert not marker.exists()


def test_an_answer_is_json_or_the_last_line_of_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "answering.py").write_text(
        "import json, sys, time\nrequest = json.load(sys.stdin)\n"
        "time.sleep(request.get('sleep', 0))\nprint(request['answer'])\nsys.exit(request.get('code', 0))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert safe_settings()["PYTHONPATH"] == str(tmp_path)
    assert ask_python("answering", request={"answer": "[1]"}) == [1]
    for request, message in (
        ({"answer": "no"}, "no JSON"),
        ({}, "KeyError"),
        ({"answer": "1", "code": 7}, "code 7"),
        ({"answer": "1", "sleep": 60}, "no answer within 1 s"),
    ):
        with pytest.raises(NoAnswer, match=message):
            ask_python("answering", request=request, timeout_seconds=1 if "sleep" in request else None)


def test_what_compiled_packages_print_is_no_part_of_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as NCCL_DEBUG=INFO and ONEDNN_VERBOSE=1, which print to standard output."""
    (tmp_path / "noisy.py").write_text(
        "import os, sys\nfrom kohaku_wrap.processes import answer, answer_in_lines\n"
        "def print_all():\n    os.write(2, b'a file called \\xff\\n' * 9000)\n"
        "    print('a package')\n    os.write(1, b'compiled\\n')\n    os.system('echo a child')\n"
        "def work(request, tell):\n    print_all()\n    tell(images=request)\n    print_all()\n"
        "def make():\n    print_all()\n    return {'made': 1}\n"
        "answer(make) if sys.argv[1:] else sys.exit(answer_in_lines(work))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert ask_python("noisy", "once") == {"made": 1}
    answers: queue.Queue[tuple[int, Any]] = queue.Queue()
    helper = LineHelper("noisy", 7, {}, 3, answers)
    assert [answers.get(timeout=60) for _ in range(2)] == [(3, {"images": 7}), (3, None)]
    assert helper.describe_failure() == ""
    assert "compiled" in "".join(helper.errors)


def test_a_package_that_a_helper_lacks_is_named_with_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lacking.py").write_text("raise ModuleNotFoundError(\"No module named 'diffusers.models'\")\n")
    (tmp_path / "diffusers_of_mine.py").write_text("import no_such_package\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answers: queue.Queue[tuple[int, Any]] = queue.Queue()
    with pytest.raises(MissingExtra, match="needs packages that are not installed: diffusers") as refused:
        LineHelper("lacking", 0, {}, 0, answers).describe_failure()
    assert refused.value.next_step == "Install them with: pip install 'kohaku-wrap[train]'"
    unknown = LineHelper("diffusers_of_mine", 0, {}, 0, answers).describe_failure()
    assert unknown == "ModuleNotFoundError: No module named 'no_such_package'"


def test_what_a_helper_refuses_is_told_with_its_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "refusing.py").write_text(
        "from kohaku_wrap.errors import KwrapError\nraise KwrapError('no trainer is here', 'Run `kwrap doctor`.')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(NoAnswer, match=r"^no trainer is here\. Run `kwrap doctor`\.$"):
        ask_python("refusing")


def test_a_helper_ends_with_the_process_that_asked_however_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waiting.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(f'{{os.getpid()}}\\n')\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asking = "from kohaku_wrap.processes import ask_python; ask_python('waiting')"
    with subprocess.Popen(python_command("-c", asking)) as process:
        wait_until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text().endswith("\n"))
        helper = int((tmp_path / "pid").read_text())
        process.kill()
    wait_until(lambda: not is_running(helper))


def wait_until(is_so: Callable[[], bool]) -> None:
    """Until `is_so`, or the test's own limit."""
    while not is_so():
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether the process is there and no zombie, which a container without an init keeps."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("environment", [{}, {"PYTHONPATH": ":."}])
def test_python_m_kohaku_wrap_drops_the_current_folder_first(
    environment: dict[str, str], tmp_path: Path, trapped: tuple[Path, Path]
) -> None:
    """What Python and an editable install import at their start comes before us: only later ones are traps here."""
    folder = tmp_path / "here"
    folder.mkdir()
    marker = trapped[1]
    for name in ("signal", "click", "json", "torch", "difflib", "tomllib"):
        (folder / f"{name}.py").write_text(TRAP.format(marker=str(marker)))
    done = subprocess.run(
        [sys.executable, "-m", "kohaku_wrap", "template", "ls"],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not marker.exists()
    assert done.returncode == 0, done.stderr


def test_one_module_alone_starts_pythons() -> None:
    """The function that forgets nothing is the only one that names the interpreter."""
    package = Path(python_command.__code__.co_filename).parent
    named: Callable[[Path], bool] = lambda path: re.search(r"sys\.executable", path.read_text()) is not None  # noqa: E731
    files = sorted(str(path.relative_to(package)) for path in package.rglob("*.py") if named(path))
    assert files == ["processes.py"]
