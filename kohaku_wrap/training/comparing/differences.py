"""Whether a run is still what it was: its files, data, models, trainer and packages against its lock."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kohaku_wrap.config.kernels import list_other_switches
from kohaku_wrap.config.render import hash_named_files
from kohaku_wrap.config.run_files import LOCK_FILE, UnreadableRunFile, digest_lock
from kohaku_wrap.config.training_data import describe_data
from kohaku_wrap.errors import KwrapError, Problem
from kohaku_wrap.file_hashes import kept_sha256, sha256_of_file
from kohaku_wrap.files import describe_absence
from kohaku_wrap.formats.caption_rows import (
    CAPTIONS_FILE,
    NoImages,
    find_captions,
    open_captions,
    read_captions_metadata,
)
from kohaku_wrap.formats.caption_writer import check_columns
from kohaku_wrap.trainer.commits import find_known
from kohaku_wrap.trainer.engines import find_engine
from kohaku_wrap.trainer.installed import (
    find_trainer,
    is_decisive,
    list_versions,
    plain_name,
    read_trainer_commit,
)
from kohaku_wrap.training.comparing.accepting import KEY_OF_FINGERPRINT, OTHER_OPTIONS, OTHER_RUN
from kohaku_wrap.training.comparing.file_changes import compare_files, list_moves
from kohaku_wrap.training.comparing.places import Places
from kohaku_wrap.training.comparing.site_places import MODELS, settle_places
from kohaku_wrap.training.data.latent_rules import LATENTS, TEXTS, open_latents, open_texts, require_same
from kohaku_wrap.training.records.attempts import ATTEMPT_FILE, list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.ledger import ledger_file, read_beginning, recorded_attempts
from kohaku_wrap.training.records.manifest import Fingerprint, read_manifest
from kohaku_wrap.training.records.saving import fingerprint_of
from kohaku_wrap.training.records.states import read_manifests
from kohaku_wrap.wording import count_of

NAMED_FILES = {name: f"{name}_sha256" for name in ("tokenizers", "base_weights", "network_weights")}
"""What else options name, and the lock's entry for its content."""


NOT_KEPT_BY_0_1 = (
    "this run was made by kwrap 0.1: lines taken out of its files, its argument lists, preset.toml and tokenizers were "
    "not kept and cannot be compared"
)


def list_changes(
    run: Run,
    state: Path | None = None,
    on_bytes: Callable[[int], None] | None = None,
    places: Places | None = None,
) -> list[Problem]:
    """What changed since the run was locked, and since a state of it was written; one entry a key.

    `on_bytes` gets the bytes that were read of models whose hash is not kept. `places`: those of today, if settled.
    """
    places = places or settle_places(run, on_bytes=on_bytes)
    changes = [
        *compare_lock(run),
        *compare_files(run, places.options, places.dataset_options),
        *compare_models(run, places.options, on_bytes),
        *compare_dataset(run, places),
        *compare_caches(run, places),
        *compare_trainer(run),
        # A run of kwrap 0.1 goes on all the same, as before: they are notes on it.
        *(compare_packages(run) if run.lock.format > 1 else ()),
    ]
    told = {problem.where for problem in changes}
    made = [] if state is None else compare_fingerprint(read_manifest(state).fingerprint, run)
    return changes + [problem for problem in made if problem.where not in told]


def list_notes(run: Run, places: Places) -> list[str]:
    """What changed and changes nothing of what is trained, and what of a run of kwrap 0.1 cannot be compared."""
    notes = [*places.notes, *list_moves(run, places.options, places.dataset_options, " ".join(places.notes))]
    inputs = run.lock.table("inputs")
    templates = run.lock.table("run").get("template_files", [])
    for key, path in {f"template_{index}_sha256": path for index, path in enumerate(templates)}.items():
        if key in inputs and path and Path(path).is_file() and sha256_of_file(Path(path)) != inputs[key]:
            notes.append(f"{path} changed since the run was made; the run keeps its own files")
    notes += list_missing_records(run)
    notes += list_other_switches(run.lock.table("kernels"))
    images = places.images
    with suppress(NoImages):
        if run.lock.data == "kwrap" and find_captions(images, run.lock.dataset_digest).name != CAPTIONS_FILE:
            now, own = (read_captions_metadata(images, digest) for digest in ("", run.lock.dataset_digest))
            notes.append(
                f"{images} was imported anew and has {now.get('count', 0):,} images; this run goes on with the "
                f"{own.get('count', 0):,} that it began with. A new run trains them all"
            )
    if run.lock.format == 1:
        notes.append(NOT_KEPT_BY_0_1)
        notes += [f"{problem.where}: {problem.what}" for problem in compare_packages(run)]
    return notes


def list_missing_records(run: Run) -> Iterator[str]:
    """Attempts whose record or ledger is gone or is another's: the run goes on, and `verify` goes by the ledger."""
    attempts = list_attempts(run)
    known, recorded = {attempt.number for attempt in attempts}, recorded_attempts(run.ledger)
    found = (manifest for _, manifest in read_manifests(run.states))
    saved = {manifest.attempt for manifest in found if manifest.fingerprint.run_id == run.lock.run_id}
    for number in sorted((recorded | saved) - known):
        folder = run.attempts / str(number)
        path = folder / ATTEMPT_FILE if folder.is_dir() else folder
        yield f"{path} is gone: what it trained may count twice for `kwrap verify`"
    for number in sorted(saved - recorded):
        yield f"{run.ledger} has no file of attempt {number}: `kwrap verify` cannot prove what it trained"
    for attempt in attempts:
        path = ledger_file(run.ledger, attempt.number, 0)
        with suppress(KwrapError, OSError):
            header, first = read_beginning(path)
            start = attempt.start_optimizer_step if first is None else first - 1
            written = (attempt.processes, attempt.accumulation, attempt.start_optimizer_step)
            if written != (header.processes, header.accumulation, start):
                yield (
                    f"{attempt.folder / ATTEMPT_FILE} was changed: {describe_shape(*written)}; by its ledger it was "
                    f"{describe_shape(header.processes, header.accumulation, start)}"
                )


def describe_shape(processes: int, accumulation: int, start: int) -> str:
    """How an attempt trained, for people."""
    return f"{count_of(processes, 'process')}, accumulation {accumulation:,}, from optimizer step {start:,} on"


def compare_lock(run: Run) -> Iterator[Problem]:
    """Whether the lock is as it was written; one of kwrap 0.1 cannot tell."""
    if run.lock.format == 1:
        return
    try:
        is_whole = digest_lock(run.lock.tables) == run.lock.tables.get("digest")
    except UnreadableRunFile:
        is_whole = False
    if not is_whole:
        yield Problem(LOCK_FILE, "was changed after the run was made; its own digest shows it")


def compare_models(
    run: Run, trainer: Mapping[str, Any], on_bytes: Callable[[int], None] | None = None
) -> Iterator[Problem]:
    """The files that the trainer would load, against the lock's digests; an unchanged one is not read again."""
    inputs = run.lock.table("inputs")
    for name, option in MODELS.items():
        locked, path = inputs.get(f"{name}_sha256"), Path(trainer.get(option) or "")
        if not locked or option not in trainer:
            continue
        if not path.is_file():
            yield Problem(name, f"{path}: {describe_absence(path)}")
        elif (now := kept_sha256(path, on_bytes)) != locked:
            yield Problem(name, f"{path}: the sha256 was {locked[:12]}…, is now {now[:12]}…")
    found = hash_named_files(trainer) if any(entry in inputs for entry in NAMED_FILES.values()) else {}
    for name, entry in NAMED_FILES.items():
        locked = inputs.get(entry)
        if locked and found.get(entry) != locked:
            yield Problem(name, f"the sha256 was {locked[:12]}…, is now {found.get(entry, 'none: not there')[:15]}…")


def compare_dataset(run: Run, places: Places) -> Iterator[Problem]:
    """What would be read of images and captions, against the lock's digests."""
    inputs, images = run.lock.table("inputs"), places.images
    if not images.parts or not run.lock.dataset_digest:
        return
    try:
        if "rows_digest" in inputs:
            now = describe_data(run.lock.data, images, places.dataset_options, run.lock.dataset_digest)
        else:
            now = {"captions_digest": str(read_captions_metadata(images, run.lock.dataset_digest).get("digest", ""))}
    except NoImages as missing:
        if run.lock.data == "kwrap" or "rows_digest" in inputs:
            yield Problem("images", missing.message)
        return
    digest = now["captions_digest"]
    if now.get("rows_digest") != inputs.get("rows_digest"):
        yield Problem("images", "other images are listed, or other sizes of them, so that the order would be another")
    elif digest != run.lock.dataset_digest:
        yield Problem("dataset", f"the captions had the digest {run.lock.dataset_digest[:12]}…, now {digest[:12]}…")
    elif now.get("image_files_digest") != inputs.get("image_files_digest"):
        yield Problem("image_files", "image files were replaced or removed: their lengths in bytes are others")


def compare_caches(run: Run, places: Places) -> Iterator[Problem]:
    """What is cached and would be trained, against the lock's digests; a shard that changed is read in full."""
    for name, open_store in ((LATENTS, open_latents), (TEXTS, open_texts)):
        try:
            store = open_store(places.find_run())
            if store is not None:
                ids = open_captions(places.images, run.lock.dataset_digest).read_all()["id"].to_numpy()
                require_same(store, ids, run.lock, check=True)
        except NoImages:
            return  # told by compare_dataset
        except KwrapError as error:
            yield Problem(name, f"{error.message}. {error.next_step}")


def check_captions(data: str, images: Path, digest: str = "") -> None:
    """Read the captions of a folder that would be trained, see `find_captions`; raises DamagedCaptions."""
    path = find_captions(images, digest)
    if path.is_file() and data == "kwrap":
        check_columns(path)


def compare_trainer(run: Run) -> Iterator[Problem]:
    """The checkout that would train: its commit, and whether its files are that commit's."""
    if not run.lock.trainer_commit:
        return
    checkout = find_trainer(run.lock.trainer_commit)
    commit = read_trainer_commit(checkout) if checkout else ""
    if commit != run.lock.trainer_commit:
        yield Problem("trainer_commit", f"was {run.lock.trainer_commit[:7]}, is now {commit[:7] or 'not installed'}")
    elif checkout and find_known(checkout) is None:
        yield Problem("trainer", f"{checkout}: files of sd-scripts {commit[:7]} were changed; restore them")


def compare_packages(run: Run) -> Iterator[Problem]:
    """One problem with every package that can change bits, and Python, of another version than in the lock."""
    before = by_plain_name(run.lock.table("versions"))
    if not before:
        return
    now = by_plain_name(list_versions(find_engine(run.lock.engine).package_folders()))
    optimizer = str(run.lock.values.get("optimizer_type", ""))
    own = plain_name(optimizer.split(".")[0]) if "." in optimizer else ""
    changed = [
        f"{name} was {before.get(name, 'not installed')}, is now {now.get(name, 'not installed')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and (is_decisive(name) or name == own)
    ]
    python = ".".join(str(run.lock.table("machine").get("python", "")).split(".")[:2])
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python and python != here:
        changed.append(f"Python was {python}, is now {here}")
    if changed:
        yield Problem("versions", "; ".join(changed))


def by_plain_name(versions: Mapping[str, str]) -> dict[str, str]:
    """Versions by names that do not depend on how a package spells itself."""
    return {plain_name(name): version for name, version in versions.items()}


def compare_fingerprint(found: Fingerprint, run: Run) -> Iterator[Problem]:
    """What a state was made with, against what the run has."""
    wanted = fingerprint_of(run, 0, found.processes)
    if found.run_id != wanted.run_id:
        made = f"run {found.run_id[:12]}…" if found.run_id else "a run of kwrap 0.1, which has no id"
        yield Problem(OTHER_RUN, f"the state was written by {made}, this is {wanted.run_id[:12] or 'of kwrap 0.1'}…")
    if found.options_digest and wanted.options_digest and found.options_digest != wanted.options_digest:
        yield Problem(OTHER_OPTIONS, "the state was made with other options; it would bring their rates along")
    for name, key in KEY_OF_FINGERPRINT.items():
        made, has = getattr(found, name), getattr(wanted, name)
        unit = " batches an optimizer step" if name == "group" else ""
        if made != has:
            yield Problem(key, f"the state was made with {made!r}{unit}, the run has {has!r}")
