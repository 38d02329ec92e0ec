"""Which differences of a run a person may accept with `--allow`, and what is refused."""

from __future__ import annotations

from collections.abc import Collection

from kohaku_wrap.config.fates import ARGUMENT_PLACES, fate_of, fate_of_key
from kohaku_wrap.config.reading import LENGTHS
from kohaku_wrap.config.run_files import LOCK_FILE
from kohaku_wrap.errors import Problem, UsageError, command_line
from kohaku_wrap.trainer.options import load_recorded_table
from kohaku_wrap.training.comparing.file_changes import BY_ATTEMPT
from kohaku_wrap.training.comparing.places import DifferentRun, read_dataset, read_trainer
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.wording import suggest

OTHER_RUN = "other-run"
"""The key of `--allow` for a state that another run wrote."""

OTHER_OPTIONS = "options"

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
"""What of a state's fingerprint must be the run's own, and the key that a difference has."""

ACCEPTED_FAULTS = frozenset({"bad-images", "nan-latents", "non-finite-loss"})
"""What `--allow` takes besides a difference."""

ACCEPTED_DIFFERENCES = frozenset(
    {
        "base_model",
        "vae",
        "tokenizers",
        "base_weights",
        "dataset",
        "image_files",
        "trainer_commit",
        "versions",
        OTHER_RUN,
    }
)
"""Differences that take effect from the next attempt on, and so may be accepted."""

OF_THE_FOLDER = frozenset({"output_dir", "output_name"})
"""Options that name the run's own folder; another value would train into another run."""


def can_be_accepted(key: str) -> bool:
    """Whether a difference of that key takes effect where it is accepted.

    An option that decides the weights does not: the optimizer's state brings the old rates back, the schedule and the
    order follow from the lock. One that decides files alone does.
    """
    if key in ACCEPTED_DIFFERENCES:
        return True
    return key not in OF_THE_FOLDER and key not in BY_ATTEMPT and fate_of("option", key).kind == "files"


def refuse_changes(
    subject: str, changes: list[Problem], allow: Collection[str], lock_format: int = 2, hint: str = ""
) -> None:
    """Raise DifferentRun with the changes that nobody accepted; a lock of format 1 has no texts of files.

    `hint`: what may make them go away, told first.
    """
    left = [problem for problem in changes if problem.where not in allow]
    if not left:
        return
    keys = list(dict.fromkeys(problem.where for problem in left))
    offered = " ".join(f"--allow {key}" for key in keys if can_be_accepted(key))
    fixed = [key for key in keys if not can_be_accepted(key)]
    if not fixed:
        raise DifferentRun(subject, left, f"{hint}Undo these changes, or accept them: {offered}")
    kept = "Each of its files stands as it was written" if lock_format > 1 else "Its options stand as they were"
    tables = "[files]" if lock_format > 1 else "[values] and [dataset]"
    advice = [
        f"{hint}Undo the changes of {', '.join(fixed)}: a run keeps what decides its weights. "
        f"{kept} in {LOCK_FILE}, {tables}.",
        "To train with something else, start a new run: kwrap train TEMPLATE --run NAME --set KEY=VALUE",
    ]
    if offered:
        advice.append(f"The rest can be accepted: {offered}")
    raise DifferentRun(subject, left, "\n".join(advice))


def refuse_unknown(allow: Collection[str], run: Run | None = None) -> None:
    """Raise UsageError for a key of `--allow` that would have no effect, or stands for nothing, such as one mistyped.

    Differences are those of a run; without one only faults can be allowed.
    """
    options: set[str] = set()
    if run is not None:
        options = {*KEY_OF_FINGERPRINT.values(), *run.lock.values, *run.lock.table("dataset")}
        options |= {*read_trainer(run.trainer_config), *read_dataset(run.dataset_config), OTHER_OPTIONS, LOCK_FILE}
    for key in allow:
        if key in ACCEPTED_FAULTS or (run is not None and can_be_accepted(key)):
            continue
        table = key.partition(".")[0]
        if key in BY_ATTEMPT and run is not None:
            such = command_line("resume", run.folder, "--workers" if "workers" in key else "--processes", 1)
            raise UsageError(f"--allow {key}: each attempt decides it, nothing is to be allowed", f"Such as {such}")
        if key in options or table in (*BY_ATTEMPT, "network_args", "optimizer_args", "lr_scheduler_args", "preset"):
            if key in LENGTHS and run is not None:
                more = command_line("extend", run.folder, "--epochs", 1)
                raise UsageError(f"--allow {key}: a run is made longer by a command of its own", f"Such as {more}")
            raise UsageError(f"--allow {key}: cannot change within a run", advise_new_run(key))
        known = {*ACCEPTED_FAULTS, *(ACCEPTED_DIFFERENCES if run is not None else ()), *options}
        raise UsageError(
            f"--allow {key}: there is no such fault or option{suggest(key, known)}",
            f"Faults: {', '.join(sorted(ACCEPTED_FAULTS))}. A resume that is refused names its differences.",
        )


def advise_new_run(key: str) -> str:
    """How something that cannot change within a run is trained otherwise: `--set` where it takes the key."""
    new = "kwrap train TEMPLATE --run NAME"
    table = load_recorded_table()
    fate = fate_of_key(key if key in table.options or "." in key else f"dataset_options.{key}")
    if fate is not None and fate.given_by:
        return f"It {fate.given_by}. To train otherwise, start a new run: {new}"
    is_argument = key.startswith(tuple(f"{name}." for name in ARGUMENT_PLACES)) and key != "network_args.preset"
    is_option = key in {*table.options, *table.dataset_options, "effective_batch"}
    return f"Start a new run: {new}{f' --set {key}=VALUE' if is_option or is_argument else ''}"
