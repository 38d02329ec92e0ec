"""The way from the database to the merged model: each step with its sha256 and the command that made it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.config.run_files import COMMAND_FILE
from kohaku_wrap.errors import KwrapError, command_line
from kohaku_wrap.file_hashes import keeps_sha256, kept_sha256, sha256_of_file
from kohaku_wrap.files import read_regular
from kohaku_wrap.merging.inspecting import FileReport, inspect_file
from kohaku_wrap.merging.replays import as_table
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.manifest import MANIFEST
from kohaku_wrap.training.records.networks import list_written
from kohaku_wrap.training.records.states import list_states

NOT_KEPT = "not kept"
CAPTIONS = {"captions_digest": "captions", "rows_digest": "rows", "image_files_digest": "image files"}
MODELS = {
    "base_model_sha256": "base model",
    "vae_sha256": "VAE",
    "network_sha256": "parent network",
    "tokenizers_sha256": "tokenizers",
}
"""Digests in the lock's inputs, and what each is of."""


@dataclass(frozen=True)
class Thing:
    """One file or set of rows of a step."""

    name: str
    """What it is called."""

    sha256: str
    """As the records have it; a word where they have none."""

    detail: str = ""
    """What else is known of it."""


@dataclass(frozen=True)
class Step:
    """One step of the way."""

    title: str
    """In a word or two."""

    things: tuple[Thing, ...]
    """What it made or took."""

    commands: tuple[str, ...] = ()
    """How, ready to paste."""


def follow_way(run: Run, data: Mapping[str, Any]) -> Iterator[Step]:
    """From the first record to the last; `data`: the summary of the run's data, which may be empty."""
    lock = run.lock
    inputs = lock.table("inputs")
    made_by = as_table(data.get("made_by"))

    def commands(*names: str) -> tuple[str, ...]:
        return tuple(str(made_by[name]) for name in names if made_by.get(name))

    if data.get("db_digest"):
        edition = f"{data.get('edition', '')}, a digest of its sizes and times".lstrip(", ")
        yield Step("Database", (Thing("metadata", str(data["db_digest"]), edition),))
    if inputs.get("selection_sha256"):
        seed = f"dataset {inputs.get('captions_dataset', '')}, seed {data['seed']}" if "seed" in data else ""
        yield Step("Selection", (Thing("selection", str(inputs["selection_sha256"]), seed),), commands("select"))
    yield from name_inputs("Images and captions", inputs, CAPTIONS, commands("extract", "caption", "import"))
    yield from name_inputs("Models that it began from", inputs, MODELS)
    if parent := lock.table("parent"):
        known = {name: value for name, value in parent.items() if isinstance(value, str | int)}
        yield Step("Branched from another run", tuple(Thing(name, str(value)) for name, value in known.items()))
    if lock.format > 1:
        decides = Thing("options", lock.options_digest, "that decide the weights")
        yield Step("Run", (Thing("run", lock.run_id, "its id, made at random"), decides), tuple(read_command(run)))
    if states := list_states(run.states):
        told = [Thing(f"optimizer step {step:,}", digest_of_manifest(path), "its manifest") for step, path in states]
        yield Step("States", tuple(told), (command_line("resume", run.folder, "--step", states[-1][0]),))
    here = {path.name for path in run.network_files}
    if written := list_written(run):
        told = [Thing(name, sha256, "" if name in here else "not there now") for name, sha256 in written.items()]
        yield Step("Checkpoints", tuple(told))
    for path in sorted(run.folder.glob("*.safetensors")):
        try:
            report = inspect_file(path, hashed=False)
        except (KwrapError, OSError):
            continue
        if report.recipe is not None:
            yield describe_merge(report)


def name_inputs(
    title: str, inputs: Mapping[str, Any], names: Mapping[str, str], commands: tuple[str, ...] = ()
) -> Iterator[Step]:
    """What the lock has the digests of, with the file's name where it is one; no step where it has none of them."""
    things = []
    for key, name in names.items():
        file = Path(str(inputs.get(key.removesuffix("_sha256"), ""))).name if key.endswith("_sha256") else ""
        if inputs.get(key):
            things.append(Thing(name, str(inputs[key]), file))
    if things:
        yield Step(title, tuple(things), commands)


def read_command(run: Run) -> Iterator[str]:
    """What the person typed to make the run."""
    try:
        words = shlex.split(read_regular(run.folder / COMMAND_FILE).splitlines()[0])
    except (OSError, ValueError, IndexError):
        return
    if words:
        yield shlex.join(["kwrap", *words[1:]])


def digest_of_manifest(state: Path) -> str:
    """The sha256 of a state's manifest, which holds that of each of its files."""
    try:
        return sha256_of_file(state / MANIFEST)
    except OSError:
        return "damaged"


def describe_merge(report: FileReport) -> Step:
    """A merged file: its formula and parents."""
    path = report.header.path
    known = kept_sha256(path) if keeps_sha256(path) else NOT_KEPT
    recipe = as_table(report.recipe)
    parents = [
        Thing(f"parent {name} {as_table(report.parents.get(str(sha256))).get('name', '')}".rstrip(), str(sha256))
        for table in ("models", "networks")
        for name, sha256 in as_table(recipe.get(table)).items()
    ]
    formula = str(recipe.get("formula", "not kwrap's recipe"))
    commands = (report.replay,) if report.replay else ()
    return Step("Merge", (Thing(path.name, known, formula), *parents), commands)


def follow_file(report: FileReport) -> Iterator[Step]:
    """A file's own merge, and those of the parents that it remembers, the nearest first."""
    if report.recipe is not None:
        yield describe_merge(report)
    for sha256, entry in report.parents.items():
        recipe = as_table(as_table(entry).get("sd_merge_recipe"))
        if recipe:
            own = Thing(str(as_table(entry).get("name", "")), str(sha256), str(recipe.get("formula", "")))
            bound = {**as_table(recipe.get("models")), **as_table(recipe.get("networks"))}
            parents = [Thing(f"parent {name}", str(each)) for name, each in bound.items()]
            yield Step("Merge of a parent", (own, *parents))
