"""A run's files as the trainer will read them, against what was written when the run was made."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from kohaku_wrap.config.reading import LENGTHS
from kohaku_wrap.config.run_files import (
    ACCELERATE_FILE,
    DATASET_FILE,
    PLACE_KEYS,
    PRESET_FILE,
    PROMPTS_FILE,
    TRAINER_FILE,
    UnreadableRunFile,
    is_place,
    read_run_text,
)
from kohaku_wrap.errors import Problem, reason_of
from kohaku_wrap.files import read_regular
from kohaku_wrap.formats.held_out import HELD_OUT_FILE
from kohaku_wrap.toml_files import parse_toml
from kohaku_wrap.training.records.accelerate_file import BY_LAUNCH, describe_attempt_accelerate
from kohaku_wrap.training.records.attempts import list_attempts
from kohaku_wrap.training.records.folder import Run

BY_ATTEMPT = frozenset({"gradient_accumulation_steps", "max_data_loader_n_workers", "persistent_data_loader_workers"})
"""Options that an attempt may have otherwise without another result."""

RENDERED_LISTS = frozenset({"network_args", "optimizer_args", "lr_scheduler_args"})
"""Options that a lock of kwrap 0.1 keeps as tables alone, by other names and types."""

DECIDED_BY_LOCK = frozenset({"seed", "train_batch_size", "batch_size"})
"""Options of the trainer's files whose value is taken from the lock all the same: the plan follows from them."""

KEY_OF_PLACE = {
    "pretrained_model_name_or_path": "base_model",
    "tokenizer_cache_dir": "tokenizers",
    "image_dir": "dataset",
    PROMPTS_FILE: "sample_prompts",
}
"""The key that a difference has where it is not the option's own name."""


def compare_files(run: Run, trainer: Mapping[str, Any], dataset: Mapping[str, Any]) -> Iterator[Problem]:
    """Every value that the trainer would read otherwise than it was written, was added or is gone."""
    yield from compare_place(run, trainer)
    if run.lock.format == 1:
        left_out = BY_ATTEMPT | RENDERED_LISTS | PLACE_KEYS
        yield from compare_options(trainer, run.lock.values, left_out)
        yield from compare_options(dataset, run.lock.table("dataset"), PLACE_KEYS)
        return
    for name, written in run.lock.files.items():
        try:
            before, now = read_run_text(name, written), read_run_text(name, read_text(run.folder / name))
        except UnreadableRunFile as error:
            yield Problem(name, error.message.removeprefix(f"{name}: "))
            continue
        if name == TRAINER_FILE:
            now = with_lengths_of_lock(run, before, now)
        if name == ACCELERATE_FILE:
            yield from compare_accelerate(run, before, now)
        elif name in (PROMPTS_FILE, HELD_OUT_FILE):
            if before != now:
                yield Problem(KEY_OF_PLACE.get(name, name), f"{name} was changed")
        elif changes := list(compare_values(before, now)):
            yield from changes
        elif name == PRESET_FILE and parse_toml(written) != parse_toml(read_text(run.folder / name)):
            # [a.b] and ["a.b"] are one key here and two tables for LyCORIS.
            yield Problem(name, "its tables have other names, by quotes or dots")


def with_lengths_of_lock(run: Run, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's options as the next attempt has them: a length of an earlier chapter gives way to the lock's."""
    length = {name: now[name] for name in LENGTHS if name in now}
    if length not in [dict(chapter.length) for chapter in run.lock.chapters]:
        return dict(now)
    return {name: value for name, value in now.items() if name not in LENGTHS} | {
        name: before[name] for name in LENGTHS if name in before
    }


def read_text(path: Path) -> str:
    """A file of the run. Raises UnreadableRunFile."""
    try:
        return read_regular(path)
    except (OSError, UnicodeDecodeError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else reason_of(error)
        raise UnreadableRunFile(f"{path.name}: {what}", "Restore the run's own files.") from None


def compare_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """Every key whose value is another; a place may be another as long as it is one."""
    for key in sorted(before.keys() | now.keys()):
        if key in BY_ATTEMPT or (is_place(key) and bool(before.get(key)) == bool(now.get(key))):
            continue
        if (key in before, as_text(before.get(key))) != (key in now, as_text(now.get(key))):
            is_lasting = key in DECIDED_BY_LOCK and key in before
            lasting = f"; the lock decides, {before[key]!r} is trained" if is_lasting else ""
            what = f"{describe(before, key, 'was')}, {describe(now, key, 'is now')}{lasting}"
            yield Problem(KEY_OF_PLACE.get(key, key), what)


def as_text(value: Any) -> str:
    """The value so that 1, 1.0 and true are three."""
    return json.dumps(value, sort_keys=True, default=str)


def describe(values: Mapping[str, Any], key: str, verb: str) -> str:
    """`was 5` or `was not set`."""
    return f"{verb} {values[key]!r}" if key in values else f"{verb} not set"


def compare_options(now: Mapping[str, Any], locked: Mapping[str, Any], left_out: Collection[str]) -> Iterator[Problem]:
    """Options that are set otherwise than a lock of kwrap 0.1 says, which holds defaults that no file repeats."""
    for name, value in now.items():
        if name not in left_out and name in locked and locked[name] != value:
            lasting = f"; the lock decides, {locked[name]!r} is trained" if name in DECIDED_BY_LOCK else ""
            yield Problem(name, f"was {locked[name]!r}, is now {value!r}{lasting}")
        elif name not in left_out and name not in locked:
            yield Problem(name, f"was not set, is now {value!r}")


def compare_accelerate(run: Run, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Problem]:
    """accelerate's file, which each attempt writes anew for its processes: those keys may be any attempt's."""
    attempts = [describe_attempt_accelerate(attempt) for attempt in list_attempts(run)]
    written = [before, *({f"accelerate.{name}": value for name, value in table.items()} for table in attempts)]
    for key in sorted(before.keys() | now.keys() | {key for table in written for key in table}):
        allowed = written if key.removeprefix("accelerate.") in BY_LAUNCH else written[:1]
        if all(as_text(table.get(key)) != as_text(now.get(key)) for table in allowed):
            yield Problem(key, f"{describe(allowed[-1], key, 'was')}, {describe(now, key, 'is now')}")


def compare_place(run: Run, trainer: Mapping[str, Any]) -> Iterator[Problem]:
    """Whether the trainer would read and write its own files in this folder."""
    elsewhere = "checkpoints would go to another place than the run's own folder"
    written = trainer.get("output_dir")
    if written is not None and Path(written).resolve() != run.checkpoints.resolve():
        yield Problem("output_dir", f"is {written}: {elsewhere}")
    name = trainer.get("output_name")
    if name is not None and name != run.output_name:
        yield Problem("output_name", f"is {name!r}: the run's checkpoints are named {run.output_name!r}")
    own = {"sample_prompts": (trainer.get("sample_prompts"), PROMPTS_FILE)}
    for each in trainer.get("network_args") or ():
        option, _, value = str(each).partition("=")
        if option == "preset":
            own["network_args.preset"] = (value, PRESET_FILE)
    for key, (path, file) in own.items():
        if path and file in run.lock.files and Path(path).resolve() != (run.folder / file).resolve():
            yield Problem(key, f"is {path}, not the run's own {file}")


def list_moves(run: Run, trainer: Mapping[str, Any], dataset: Mapping[str, Any], told: str = "") -> Iterator[str]:
    """Notes on places that are others and were not told of, and on options that the attempt decides."""
    if run.lock.format == 1:
        return
    now = {**trainer, **dataset}
    before: dict[str, Any] = {}
    for name in (TRAINER_FILE, DATASET_FILE):
        before |= read_run_text(name, run.lock.files.get(name, ""))
    for key in sorted(before.keys() & now.keys()):
        is_told = is_place(key) and (str(now[key]).startswith(f"{run.folder}/") or str(now[key]) in told)
        if (key in BY_ATTEMPT or is_place(key)) and before[key] != now[key] and not is_told:
            why = "each attempt decides it" if key in BY_ATTEMPT else "what lies there is compared by its content"
            yield f"{key} was {before[key]!r}, is now {now[key]!r}; {why}"
