"""What a run offers to others: the network, the baked model, a model card, hashes and the ledger's digest."""

from __future__ import annotations

import glob
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kohaku_wrap.errors import KwrapError, command_line
from kohaku_wrap.file_hashes import HASH_BLOCK_BYTES, kept_sha256, sha256_of_file
from kohaku_wrap.files import Progress, atomic_write, describe_absence, read_json, write_text
from kohaku_wrap.formats.machine_paths import without_paths
from kohaku_wrap.formats.safetensors import encode_header, read_header
from kohaku_wrap.locks import clear_leavings
from kohaku_wrap.merging.file_metadata import build_metadata
from kohaku_wrap.merging.hashes import AUTO_V2_DIGITS, FileHashes, hash_files
from kohaku_wrap.merging.planning import plan_merge
from kohaku_wrap.merging.recipes import Recipe
from kohaku_wrap.publishing.model_card import CardFacts, compose_card
from kohaku_wrap.reporting.page import PAGE_FILE, compose_page
from kohaku_wrap.training.records.attempts import ATTEMPT_FILE, RESULT_FILE
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import digest_of_ledger
from kohaku_wrap.training.records.networks import STEP_ENDING, list_written
from kohaku_wrap.training.supervising.ends import END_FILE

CARD_NAME = "README.md"
SUMS_NAME = "SHA256SUMS"
BAKE_FORMULA = "base + 1.0 * net(network)"


class CannotPublish(KwrapError):
    """A run, or a folder, that cannot be published from or to."""


@dataclass(frozen=True)
class PublishReport:
    """What was written."""

    folder: Path
    """The folder, ready to upload."""

    optimizer_step: int | None
    """The step that was published; None for the end of the run."""

    files: dict[str, str]
    """Names and sha256."""

    ledger_sha256: str
    """The digest of the ledger; empty if the run has none."""

    license: str
    """What the card says; empty if nothing is known."""

    card: Path
    """The model card."""

    no_page: str = ""
    """Why the page of the run is not there; empty where it is."""


def find_network(run: Run, optimizer_step: int | None) -> Path:
    """The network of a step, or of the end of the run.

    Raises CannotPublish with the list of those that there are.
    """
    step = "" if optimizer_step is None else STEP_ENDING.format(optimizer_step)
    path = run.checkpoints / f"{run.output_name}{step}.safetensors"
    if path.is_file():
        return path
    there = ", ".join(sorted(file.name for file in run.checkpoints.glob("*.safetensors")))
    raise CannotPublish(
        f"{run.checkpoints}: there is no {path.name}",
        f"Networks there: {there or 'none'}. Choose a step with --step N.",
    )


def refuse_other_network(run: Run, network: Path) -> None:
    """Raise CannotPublish where the network is not the one that the run wrote; of an old run nobody can tell."""
    written = list_written(run).get(network.name, "")
    if written and kept_sha256(network) != written:
        raise CannotPublish(
            f"{network}: is not the network that the run wrote, whose sha256 is {written[:AUTO_V2_DIGITS]}…",
            "Its card would tell of another training. Put the run's own network back; "
            f"`{command_line('verify', run.folder)}` compares them all.",
        )


def read_lineage(attempts: Path) -> list[dict[str, Any]]:
    """Each attempt of a run as it was recorded, with how it ended where that is known, oldest first."""
    lineage = []
    for folder in sorted(attempts.glob("[0-9]*"), key=lambda path: path.name.zfill(8)):
        entry: dict[str, Any] = {"number": folder.name}
        for name in (ATTEMPT_FILE, RESULT_FILE, END_FILE):
            entry |= {name.removesuffix(".json"): found} if (found := read_json(folder / name)) else {}
        lineage.append(entry)
    return lineage


def copy_network(source: Path, target: Path) -> None:
    """A whole copy under the target's name, or none; metadata that hold paths of the machine are written without.

    `sshs_model_hash` becomes the sha256 of the data, which sites match; LyCORIS writes another hash there.
    """
    header = read_header(source)
    metadata = {**without_paths(header.metadata), "sshs_model_hash": hash_files([source])[0].data_sha256}
    with source.open("rb") as reading, atomic_write(target, "wb") as writing:
        if metadata != header.metadata:
            writing.write(encode_header(header.tensors, metadata))
            reading.seek(header.data_start)
        shutil.copyfileobj(reading, writing, HASH_BLOCK_BYTES)


def publish_run(
    run: Run,
    out: Path,
    optimizer_step: int | None = None,
    rights: str = "",
    bake: bool = True,
    threads: int = 0,
    on_progress: Progress = lambda done, total: None,
    base_model: Path | None = None,
) -> PublishReport:
    """Fill `out` with what a step of a run, or its end, offers.

    `rights`: the license; where empty, the base model's. `base_model`: where it lies now, if not at the lock's place.
    Files are written whole, SHA256SUMS last; calling it again replaces them. Raises CannotPublish or what a merge
    raises.
    """
    name, inputs = run.output_name, run.lock.table("inputs")
    network = find_network(run, optimizer_step)
    base = base_model or Path(str(inputs.get("base_model", "")))
    if bake and not base.is_file():
        raise CannotPublish(
            f"the base model {base}: {describe_absence(base)}, so nothing can be baked",
            "Name a site file that says where it lies with --site, or publish the network alone with --no-bake.",
        )
    refuse_other_network(run, network)
    read_header(network)
    rights = rights or (read_header(base).metadata.get("modelspec.license", "") if base.is_file() else "")
    out.mkdir(parents=True, exist_ok=True)
    baked = f"{network.stem}-baked.safetensors"
    ours = {network.name, baked, f"{baked}.part", CARD_NAME, SUMS_NAME, PAGE_FILE}
    clear_leavings(out, *(f".{glob.escape(file)}.*.part" for file in ours))
    foreign = [path.name for path in out.iterdir() if path.name not in ours]
    others = [name for name in foreign if name.endswith(".safetensors")]
    if foreign and not (out / SUMS_NAME).is_file():
        raise CannotPublish(f"{out} is not empty ({foreign[0]}, …)", "Choose a new folder with --out.")
    if others:
        raise CannotPublish(f"{out} holds what another step offers ({others[0]})", "Choose a new folder with --out.")
    if not bake and (out / baked).exists():
        raise CannotPublish(
            f"{out} holds {baked} of an earlier call, which --no-bake would leave without a hash",
            "Publish without --no-bake, remove that file, or choose a new folder with --out.",
        )
    (out / SUMS_NAME).unlink(missing_ok=True)
    copy_network(network, out / network.name)
    written = [network.name]
    if bake:
        trained_on = str(inputs.get("base_model_sha256", ""))
        title = f"{name} baked into {base.stem}"
        bake_network(base, trained_on, out / network.name, out / baked, title, threads, on_progress)
        written.append(baked)
    hashes = dict(
        zip(written, hash_files([out / file for file in written], threads, on_progress, read_again=True), strict=True)
    )
    ledger, lineage = digest_of_ledger(run.ledger), read_lineage(run.attempts)
    facts = CardFacts(name, optimizer_step, run.lock.tables, lineage, hashes, ledger, rights, base.name)
    write_text(out / CARD_NAME, compose_card(facts))
    sums = {file: entry.sha256 for file, entry in hashes.items()}
    no_page = write_public_page(run, out / PAGE_FILE)
    for file in (CARD_NAME, *(() if no_page else (PAGE_FILE,))):
        sums[file] = sha256_of_file(out / file)
    write_text(out / SUMS_NAME, "".join(f"{sha256}  {file}\n" for file, sha256 in sorted(sums.items())))
    return PublishReport(out, optimizer_step, sums, ledger, rights, out / CARD_NAME, no_page)


def write_public_page(run: Run, path: Path) -> str:
    """Write the page of the run, without paths of the machine; why it could not be made, and then none is there."""
    try:
        write_text(path, compose_page([run], None))
    except KwrapError as error:
        path.unlink(missing_ok=True)
        return error.message
    return ""


def bake_network(
    base: Path, trained_on: str, network: Path, output: Path, title: str, threads: int, on_progress: Progress
) -> None:
    """Write the checkpoint with the network added at full strength, with its recipe inside.

    `trained_on`: the sha256 of the base model that the run was locked with. Raises CannotPublish for another one.
    """
    from kohaku_wrap.merging.running import run_merge

    plan = plan_merge(BAKE_FORMULA, {"base": base, "network": network})
    found: list[FileHashes] = hash_files([base, network], threads, on_progress, read_again=True)
    if trained_on and found[0].sha256 != trained_on:
        raise CannotPublish(
            f"{base}: its sha256 is {found[0].auto_v2}…, the run was trained on {trained_on[:AUTO_V2_DIGITS]}…",
            "Put back the base model of the run, or publish the network alone with --no-bake.",
        )
    recipe = Recipe(BAKE_FORMULA, title=title)
    metadata = build_metadata(plan, dict(zip(("base", "network"), found, strict=True)), recipe=recipe)
    run_merge(plan, output, metadata, threads, on_progress=on_progress)
