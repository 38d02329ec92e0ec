"""Whether a run is still what it was: its files, dataset and trainer against its lock, and one lock against another."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.config.installed import find_trainer, read_trainer_commit
from kohaku_wrap.config.options import suggest
from kohaku_wrap.config.plan import CAPTIONS_FILE, NoImages, read_captions_metadata
from kohaku_wrap.dataset.captions.columns import check_columns
from kohaku_wrap.errors import KwrapError, Problem, ProblemsFound, UsageError
from kohaku_wrap.files import kept_sha256
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.training.records.manifest import Fingerprint, read_manifest
from kohaku_wrap.training.records.saving import fingerprint_of
from kohaku_wrap.training.runs.folder import Run

KEY_OF_FINGERPRINT = {
    "engine": "engine",
    "data": "data",
    "seed": "seed",
    "group": "effective_batch",
    "batch_size": "train_batch_size",
    "batches": "batches",
    "images": "images",
    "dataset_digest": "dataset",
    "trainer_commit": "trainer_commit",
}
"""What of a state's fingerprint must be the run's own, and the key that `--allow` takes for it."""

BY_ATTEMPT = frozenset({"gradient_accumulation_steps", "max_data_loader_n_workers", "persistent_data_loader_workers"})
"""Options that an attempt may have otherwise without another result."""

RENDERED_LISTS = frozenset({"network_args", "optimizer_args", "lr_scheduler_args"})
"""Options that the lock keeps as tables, by other names and types."""

DECIDED_BY_LOCK = frozenset({"seed", "train_batch_size", "batch_size"})
"""Options of the trainer's files whose value is taken from the lock all the same: the plan follows from them."""

ACCEPTED_FAULTS = frozenset({"bad-images", "nan-latents", "non-finite-loss"})
"""What `--allow` takes besides a difference."""

MODELS = {"base_model": "pretrained_model_name_or_path", "vae": "vae"}
"""Files that the lock has the sha256 of, and the trainer's option that names each."""

PLACES = frozenset(
    {
        "format",
        "run.id",
        "run.options_digest",
        "run.name",
        "run.secrets_file",
        "run.trust",
        "run.template_files",
        "run.template_commit",
        "values.output_dir",
        "values.output_name",
        "values.sample_prompts",
        "values.logging_dir",
        "values.pretrained_model_name_or_path",
        "values.vae",
        "values.tokenizer_cache_dir",
        "dataset.image_dir",
        "inputs.base_model",
        "inputs.images",
        "inputs.vae",
        "inputs.tokenizers",
        "trainer.path",
        "machine.platform",
        "machine.accelerate.main_process_ip",
        "machine.accelerate.main_process_port",
    }
)
"""Entries of a lock that say where things are and which run it is, not what is trained."""


class DifferentRun(ProblemsFound):
    """The run is no longer what its state was made with."""


def list_changes(run: Run, state: Path | None = None) -> list[Problem]:
    """What changed since the run was locked, and since a state of it was written: options, models, dataset, trainer."""
    trainer = read_trainer(run.trainer_config)
    changes = [
        *compare_options(trainer, run.lock.values, BY_ATTEMPT | RENDERED_LISTS),
        *compare_place(run, trainer),
        *compare_options(read_dataset(run.dataset_config), run.lock.tables.get("dataset", {}), frozenset()),
        *compare_models(run, trainer),
        *compare_dataset(run),
        *compare_trainer(run),
    ]
    told = {problem.where for problem in changes}
    made = [] if state is None else compare_fingerprint(read_manifest(state).fingerprint, run)
    return changes + [problem for problem in made if problem.where not in told]


def compare_options(now: Mapping[str, Any], locked: Mapping[str, Any], left_out: Collection[str]) -> Iterator[Problem]:
    """Options that are set otherwise than the lock says; the lock may hold defaults that no file repeats."""
    for name, value in now.items():
        if name not in left_out and name in locked and locked[name] != value:
            lasting = f"; the lock decides, {locked[name]!r} is trained" if name in DECIDED_BY_LOCK else ""
            yield Problem(name, f"was {locked[name]!r}, is now {value!r}{lasting}")
        elif name not in left_out and name not in locked:
            yield Problem(name, f"was not set, is now {value!r}")


def read_trainer(path: Path) -> dict[str, Any]:
    """The options of trainer.toml, flat."""
    flat: dict[str, Any] = {}
    for name, value in read_run_file(path).items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def read_dataset(path: Path) -> dict[str, Any]:
    """The options of dataset.toml, its levels put together."""
    flat: dict[str, Any] = {}
    document = read_run_file(path)
    flat |= document.get("general", {})
    for dataset in document.get("datasets", []):
        flat |= {name: value for name, value in dataset.items() if name != "subsets"}
        for subset in dataset.get("subsets", []):
            flat |= subset
    return flat


def read_run_file(path: Path) -> dict[str, Any]:
    """A TOML file of the run; raises DifferentRun when it cannot be read."""
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DifferentRun(str(path), [Problem(path.name, str(error))], "Restore the run's own files.") from error


def compare_place(run: Run, trainer: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether the trainer would write its checkpoints into this folder."""
    written = trainer.get("output_dir")
    if written is not None and Path(written).resolve() != run.checkpoints.resolve():
        yield Problem("output_dir", f"is {written}: the run's folder was moved; move it back, or mend its TOML files")


def compare_models(run: Run, trainer: Mapping[str, Any]) -> Iterator[Problem]:
    """The files that the trainer would load, against the lock's digests; an unchanged one is not read again."""
    inputs = run.lock.tables.get("inputs", {})
    for name, option in MODELS.items():
        locked, path = inputs.get(f"{name}_sha256"), Path(trainer.get(option, ""))
        if not locked:
            continue
        if not path.is_file():
            yield Problem(name, f"{path}: no such file")
        elif (now := kept_sha256(path)) != locked:
            yield Problem(name, f"{path}: the sha256 was {locked[:12]}…, is now {now[:12]}…")


def compare_dataset(run: Run) -> Iterator[Problem]:
    """The digest of the captions that would be read, against the lock's."""
    images = run.lock.tables.get("inputs", {}).get("images")
    if not images or not run.lock.dataset_digest:
        return
    try:
        digest = str(read_captions_metadata(Path(images)).get("digest", ""))
    except NoImages as missing:
        if run.lock.data == "kwrap":
            yield Problem("dataset", missing.message)
        return
    if digest != run.lock.dataset_digest:
        yield Problem("dataset", f"the captions had the digest {run.lock.dataset_digest[:12]}…, now {digest[:12]}…")


def check_captions(run: Run) -> None:
    """Read the captions that would be trained; raises DamagedCaptions."""
    path = Path(run.lock.tables.get("inputs", {}).get("images", "")) / CAPTIONS_FILE
    if path.is_file():
        check_columns(path)


def compare_trainer(run: Run) -> Iterator[Problem]:
    """The commit of the checkout that would train, against the lock's."""
    if run.lock.engine != "sd-scripts" or not run.lock.trainer_commit:
        return
    checkout = find_trainer(run.lock.trainer_commit)
    commit = read_trainer_commit(checkout) if checkout else ""
    if commit != run.lock.trainer_commit:
        yield Problem("trainer_commit", f"was {run.lock.trainer_commit[:7]}, is now {commit[:7] or 'not installed'}")


def compare_fingerprint(found: Fingerprint, run: Run) -> Iterator[Problem]:
    """What a state was made with, against what the run has."""
    wanted = fingerprint_of(run, 0, found.processes)
    for name, key in KEY_OF_FINGERPRINT.items():
        made, has = getattr(found, name), getattr(wanted, name)
        unit = " batches an optimizer step" if name == "group" else ""
        if made != has:
            yield Problem(key, f"the state was made with {made!r}{unit}, the run has {has!r}")


def refuse_changes(subject: str, changes: list[Problem], allow: Collection[str]) -> None:
    """Raise DifferentRun with the changes that nobody accepted."""
    left = [problem for problem in changes if problem.where not in allow]
    if left:
        keys = " ".join(f"--allow {key}" for key in dict.fromkeys(problem.where for problem in left))
        raise DifferentRun(subject, left, f"Undo these changes, or accept them knowingly: {keys}")


def refuse_unknown(allow: Collection[str], run: Run | None = None, changes: Collection[Problem] = ()) -> None:
    """Raise UsageError for a key of `--allow` that stands for nothing, such as one mistyped.

    Differences are those of a run; without one only faults can be allowed.
    """
    known = {*ACCEPTED_FAULTS, *(problem.where for problem in changes)}
    if run is not None:
        known |= {*KEY_OF_FINGERPRINT.values(), *MODELS, *run.lock.values, *run.lock.tables.get("dataset", {})}
    for key in allow:
        if key not in known:
            raise UsageError(
                f"--allow {key}: there is no such fault or option{suggest(key, known)}",
                f"Faults: {', '.join(sorted(ACCEPTED_FAULTS))}. A resume that is refused names its differences.",
            )


def compare_locks(locked: Mapping[str, Any], new: Mapping[str, Any]) -> list[Problem]:
    """Every entry in which two locks differ, places left aside."""
    before, after = dict(flatten(locked)), dict(flatten(new))
    if "kernels" not in locked:
        # A lock of kwrap 0.1 says nothing of them.
        after = {key: value for key, value in after.items() if not key.startswith("kernels.")}
    return [
        Problem(key, f"locked {describe(before, key)}, here {describe(after, key)}")
        for key in sorted(before.keys() | after.keys())
        if key not in PLACES and not key.startswith("files.") and before.get(key) != after.get(key)
    ]


def describe(entries: Mapping[str, Any], key: str) -> str:
    return repr(entries[key]) if key in entries else "unset"


def flatten(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`table.key` and value of every entry."""
    for name, value in tables.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def refuse_other_lock(path: Path, new: Mapping[str, Any]) -> None:
    """Raise ProblemsFound with every difference between a lock file and the lock of the run to be made."""
    problems = compare_locks(read_lock(path), new)
    if problems:
        raise ProblemsFound(str(path), problems, "Mend what differs, or train without --locked.")


def read_lock(path: Path) -> dict[str, Any]:
    """The tables of a lock file."""
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KwrapError(f"{path}: not a lock ({error})", "Give the run.lock.toml of a run.") from error


def template_of_lock(path: Path) -> str:
    """The template file that a lock was made from, or its name where the file is gone. Raises KwrapError."""
    run = read_lock(path).get("run", {})
    if "template" not in run:
        raise KwrapError(f"{path}: [run] template is missing", "Give the run.lock.toml of a run, or name the template.")
    files = run.get("template_files") or []
    return files[-1] if files and Path(files[-1]).is_file() else str(run["template"])
