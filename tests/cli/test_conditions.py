"""Every command under every condition of its surroundings: the exit code, and what is left behind.

Real processes. Commands come from the program itself, so that one without a row fails the test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
from PIL import Image
from plain_runs import make_run

from kohaku_wrap.cli import program
from kohaku_wrap.dataset.own.images import JOURNAL_FILE

TRY_CONDITIONS = Path(__file__).with_name("try_conditions.py")
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

KEPT = {".supervisor.lock", ".extracting", ".judged", ".losses", ".cache", ".onnxruntime"}
"""Hidden names that are no leftovers: of each run, the journal by which `extract` goes on, what was judged and measured
so far, and what onnxruntime keeps of the machine in the home."""


@dataclass(frozen=True)
class Row:
    """One command as it is tried. `{world}` and `{plain}` are read, `{out}` is written."""

    words: str
    """After `kwrap`."""

    shows: bool = False
    """Whether its only purpose is what it prints."""

    code: int = 0
    """Where nothing is in its way."""

    makes: str = ""
    """What lies in `{out}` after it is done, and is not there before."""

    sign: str = ""
    """SIGTERM is sent when this is there; where nothing is named, as soon as the command takes signals."""

    trains: str = ""
    """The run in `{out}` that it trains."""

    changes: bool = False
    """Whether it changes what is in `{out}`, where it makes nothing."""

    without_torch: bool = False
    """Whether torch, which takes seconds to load, is missing."""


ROWS = {
    "demo": Row("demo {out}/world --posts 2", makes="world/site.toml", sign="out/world"),
    "template ls": Row("template ls", shows=True),
    "template show": Row("template show {world}/mine.toml", shows=True),
    "template check": Row("template check {world}/mine.toml --no-modules"),
    "template cp": Row("template cp {world}/mine.toml {out}/mine.toml", makes="mine.toml"),
    "template diff": Row("template diff epsilon {world}/mine.toml", shows=True),
    "inspect": Row("inspect {world}/base/model.safetensors --no-hash", shows=True),
    # Without a repository: what is tried is that it says so and leaves nothing.
    "trainer prove": Row("trainer prove", code=1),
    "trainer update": Row("trainer update --source {world}/nothing", code=1),
    "trainer install": Row("trainer install --source {world}/nothing", code=1),
    # None is installed, which is an error and nothing to show.
    "trainer show": Row("trainer show", code=1),
    "doctor": Row("doctor --engine builtin", code=1, without_torch=True),
    "select": Row("select demo --db {world}/danbooru.db --out {out}/s.parquet", makes="s.parquet"),
    "extract": Row(
        "extract {world}/demo.parquet --tars {world}/tars --out {out}/images --jobs 1 --max-missing 9",
        makes="images/extracted.parquet",
        sign="out/images",
    ),
    "caption": Row(
        "caption {world}/demo.parquet --db {world}/danbooru.db --out {out}/images --format jsonl",
        makes="images/captions.jsonl",
        sign="out/images",
    ),
    "import": Row("import {world}/own --out {out}/images", makes="images/captions.arrow", sign="out/images"),
    "plan": Row("plan demo --site {world}/site.toml", shows=True, without_torch=True),
    "cache": Row(
        "cache demo --site {world}/site-of-{try}.toml --set cache.latents=true", makes="latents", sign="out/latents"
    ),
    "train": Row(
        "train demo --site {world}/site-of-{try}.toml --run r --set max_train_steps=400 --set states.every=100",
        makes="runs/r/checkpoints/r.safetensors",
        sign="out/runs/r/metrics.jsonl",
        trains="runs/r",
    ),
    "status": Row("status {plain}/r", shows=True),
    "resume": Row("resume {out}/r", makes="r/checkpoints/r.safetensors", sign="out/r/attempts/1/[!.]*", trains="r"),
    # The plain run is one of kwrap 0.1, whose runs keep their length.
    "extend": Row("extend {out}/r --steps 4", code=2, makes="r/checkpoints/r.safetensors"),
    "branch": Row("branch {out}/r --run b", code=2, makes="b/checkpoints/b.safetensors"),
    "verify": Row("verify {plain}/r"),
    "report": Row("report {plain}/r -o {out}/page.html", makes="page.html"),
    "rename": Row("rename {out}/r other", makes="other/run.lock.toml"),
    "remove": Row("remove {out}/r --yes", changes=True),
    "merge": Row(
        "merge a -m a={world}/base/model.safetensors -o {out}/m.safetensors", makes="m.safetensors", sign="out/.m*"
    ),
    "prompt": Row("prompt 1girl", shows=True),
    "sample": Row(
        "sample {world}/base/model.safetensors --prompt 1girl --tokenizers {world}/base/tokenizers --size 64x64 "
        "--sampler-steps 1 --out {out}/look",
        makes="look/sheet.json",
    ),
    "evaluate exposure": Row("evaluate exposure {plain}/r", shows=True),
    "evaluate judges": Row("evaluate judges", shows=True),
    "evaluate loss": Row(
        "evaluate loss {world}/base/model.safetensors --images {world}/images --tokenizers {world}/base/tokenizers "
        "--template demo --posts 1 --timesteps 1 --device cpu --out {out}/losses",
        makes="losses/loss.json",
    ),
    "evaluate judge": Row(
        "evaluate judge {world}/judged --judge {world}/judges/aesthetic --result {out}/j.json", makes="j.json"
    ),
    "evaluate ccip": Row(
        "evaluate ccip {world}/base/model.safetensors --characters db --db {world}/danbooru.db --images {world}/images "
        "--judge {world}/judges/ccip --tokenizers {world}/base/tokenizers --min-posts 1 --images-per-character 1 "
        "--size 64x64 --sampler-steps 1 --out {out}/scores",
        makes="scores/ccip.json",
    ),
    # A run without a network.
    "publish": Row("publish {plain}/r --out {out}/published", code=1),
}
PREPARATIONS = (
    "demo {world} --posts 12",
    "select demo --db {world}/danbooru.db --out {world}/demo.parquet",
    "extract {world}/demo.parquet --tars {world}/tars --out {world}/images --jobs 1 --max-missing 9",
    "caption {world}/demo.parquet --db {world}/danbooru.db --out {world}/images",
    "evaluate judges --small {world}/judges",
    "sample {world}/base/model.safetensors --prompt smile --tokenizers {world}/base/tokenizers --size 64x64 "
    "--sampler-steps 1 --out {world}/judged",
    "resume {plain}/r",
)


def list_commands(group: click.Group, context: click.Context, prefix: str = "") -> Iterator[str]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from list_commands(command, context, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


COMMANDS = list(list_commands(program, click.Context(program)))


@dataclass(frozen=True)
class Place:
    """Where everything of the table lies."""

    folder: Path

    @property
    def world(self) -> Path:
        return self.folder / "world"

    @property
    def plain(self) -> Path:
        """The folder of a run that was trained."""
        return self.folder / "plain" / "runs"

    def folder_of(self, name: str, condition: str) -> Path:
        """What the command has for itself."""
        return self.folder / f"{name} {condition}".replace(" ", "-")

    def describe_preparation(self, words: str, number: int) -> dict[str, Any]:
        folder = self.folder / f"preparation-{number}"
        folder.mkdir()
        return self.describe(folder, "", words.format(world=self.world, plain=self.plain))

    def describe_try(self, name: str, condition: str) -> dict[str, Any]:
        """The command as `try_conditions.py` reads it; its folder is made and filled."""
        row, folder = ROWS[name], self.folder_of(name, condition)
        out = folder / "out"
        out.mkdir(parents=True)
        if name in ("resume", "extend", "branch", "rename", "remove"):
            shutil.copytree(self.folder / "fresh" / "runs" / "r", out / "r")
        hidden = self.folder / "locked" if condition == "no permission" else self.folder
        names = {"world": hidden / "world", "plain": hidden / "plain" / "runs", "out": out, "try": folder.name}
        if condition == "read-only":
            for path in (out, *(path for path in out.rglob("*") if path.is_dir())):
                path.chmod(0o555)
        return self.describe(folder, condition, row.words.format(**names), row.sign, row.without_torch)

    def describe(
        self, folder: Path, condition: str, words: str, sign: str = "", without_torch: bool = False
    ) -> dict[str, Any]:
        environment = {"KWRAP_HOME": str(self.folder / "home"), "HOME": str(folder)}
        if without_torch:
            environment["PYTHONPATH"] = str(self.folder / "without-torch")
        return {
            "folder": str(folder),
            "condition": condition,
            "words": words.split(),
            "sign": sign,
            "environment": environment,
        }


@pytest.fixture
def place() -> Iterator[Place]:
    """An empty world, two runs that nobody has trained, and a folder that nobody may enter."""
    place = Place(Path(tempfile.mkdtemp(prefix="kwrap-conditions-")))
    for name in ("plain", "fresh"):
        make_run(place.folder / name / "runs" / "r")
    place.world.mkdir()
    (place.world / "mine.toml").write_text('extends = "demo"\n')
    (place.world / "own").mkdir()
    for name in ("one", "two"):
        Image.effect_noise((160, 96), 60).convert("RGB").save(place.world / "own" / f"{name}.png")
        (place.world / "own" / f"{name}.txt").write_text("1girl, smile")
    for condition in CONDITIONS:
        write_site(place, place.folder_of("cache", condition))
        write_site(place, place.folder_of("train", condition))
    (place.folder / "without-torch").mkdir()
    (place.folder / "without-torch" / "torch.py").write_text('raise ImportError("there is no torch")\n')
    (place.folder / "locked").mkdir(mode=0o000)
    yield place
    for path in (place.folder, *place.folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o700)
    shutil.rmtree(place.folder)


def write_site(place: Place, folder: Path) -> None:
    """A site that caches and trains the world into the folder of the try."""
    (place.world / f"site-of-{folder.name}.toml").write_text(
        '[paths]\ndb = "danbooru.db"\ntars = "tars"\nimages = "images"\nbase_model = "base/model.safetensors"\n'
        f'tokenizers = "base/tokenizers"\nruns = "{folder / "out" / "runs"}"\n'
        f'latents = "{folder / "out" / "latents"}"\n'
        '[machine]\nengine = "builtin"\ngpus = 0\nbatch_per_gpu = 1\nworkers = 0\n'
    )


def try_all(place: Place) -> dict[tuple[str, str], int]:
    """The exit code of each command under each condition."""
    preparations = [[place.describe_preparation(words, number)] for number, words in enumerate(PREPARATIONS)]
    keys = [(name, condition) for name in ROWS for condition in CONDITIONS]
    batches = [*preparations, [place.describe_try(*key) for key in keys]]
    request = place.folder / "tries.json"
    request.write_text(json.dumps(batches))
    argv = [*(WITHOUT_RIGHTS if os.geteuid() == 0 else ()), sys.executable, str(TRY_CONDITIONS), str(request)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            stdout, stderr = process.communicate()
        finally:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
    assert process.returncode == 0, stderr
    codes = json.loads(stdout)
    for number, words in enumerate(PREPARATIONS):
        assert codes[number] == [0], (words, (place.folder / f"preparation-{number}" / "stderr.txt").read_text())
    return dict(zip(keys, codes[-1], strict=True))


def expected_codes(row: Row, condition: str) -> set[int]:
    """The exit codes that are right."""
    if condition == "SIGTERM":
        return {130} if row.trains else {130, row.code}
    if condition == "no permission" and ("{world}" in row.words or "{plain}" in row.words):
        return {1, 2}
    if condition == "read-only" and (row.makes or row.changes):
        return {1, 2}
    return {SHOWN_CODES.get(condition, row.code) if row.shows else row.code}


def list_hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.name not in KEPT]


def find_faults(place: Place, name: str, condition: str, code: int) -> Iterator[str]:
    """What is wrong with how the command ended."""
    row, folder = ROWS[name], place.folder_of(name, condition)
    out = folder / "out"
    stderr = (folder / "stderr.txt").read_text(errors="replace")
    if code not in expected_codes(row, condition):
        yield f"exit code {code}: {stderr[-2000:]}"
    if "Traceback" in stderr or "Exception ignored" in stderr:
        yield stderr[-2000:]
    # A signal may come when the file has its name already; it is whole then.
    if row.makes and code != 130 and (code == 0) != (out / row.makes).exists():
        yield f"exit code {code}, and {row.makes} is {'not ' if code == 0 else ''}there"
    hidden = list_hidden(folder)
    if code == 130 and JOURNAL_FILE in hidden:
        hidden.remove(JOURNAL_FILE)  # The next call goes on by it.
    if hidden:
        yield f"left {hidden}"
    if row.trains and code in (0, 130):
        run = out / row.trains
        end = json.loads((run / "attempts" / "1" / "end.json").read_text())
        if end["kind"] != ("finished" if code == 0 else "stopped"):
            yield f"exit code {code} after an attempt that {end['kind']}"
        if end["optimizer_step"] and not any((run / "states").iterdir()):
            yield f"ended at step {end['optimizer_step']} without a state"


def test_every_command_has_a_row() -> None:
    assert sorted(ROWS) == sorted(COMMANDS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_under_every_condition(place: Place) -> None:
    codes = try_all(place)
    wrong = [f"{name}, {condition}: {fault}" for (name, condition), code in codes.items()
             for fault in find_faults(place, name, condition, code)]  # fmt: skip
    wrong += [f"left in the home: {name}" for name in list_hidden(place.folder / "home")]
    assert not wrong, "\n".join(wrong)
