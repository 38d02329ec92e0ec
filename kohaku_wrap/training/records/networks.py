"""The networks in a run's checkpoints: what each was when the run wrote it, and whether it still is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kohaku_wrap.config.fates import rows_of
from kohaku_wrap.config.needs import OWN_DATA, list_lacking
from kohaku_wrap.dataset.buckets import parse_resolution
from kohaku_wrap.file_hashes import count_unhashed, kept_sha256
from kohaku_wrap.files import read_json, write_json
from kohaku_wrap.training.records.attempts import Attempt, attempt_numbers, list_attempts
from kohaku_wrap.training.records.folder import Run
from kohaku_wrap.training.records.lock import Lock

NETWORKS_FILE = "networks.json"
"""Of an attempt: the sha256 of each network that it wrote, by name."""

STEP_ENDING, EPOCH_ENDING = "-step{:08d}", "-{:06d}"
"""What the trainer puts after a run's name in that of a checkpoint, by its step or its epoch."""

OF_STEP, OF_EPOCH = re.compile(r"-step(\d{8,})"), re.compile(r"-(\d{6,})")
"""What stands between a run's name and the ending, which may be digits like these themselves, such as a date."""

OF_THE_DATASET = ("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate")
"""Options that the trainer writes into networks as its own options file has them, while the dataset's decides."""

ARCHITECTURE = "modelspec.architecture"
"""Where a network has it, a resolution belongs beside it: the trainer knows that of its own options file alone, and
writes SDXL's 1024x1024 where the dataset has one."""


def without_idle(metadata: Mapping[str, str], lock: Lock) -> dict[str, str]:
    """The metadata without `ss_` fields of options that did nothing in the run, such as a rate that no part has.

    What the dataset's options decide is that of the dataset.
    """
    values, dataset = lock.values, lock.table("dataset")
    arguments = {f"network_args.{name}": value for name, value in lock.table("network_args").items()}
    beside = {**values, **arguments, OWN_DATA: lock.data}
    idle = {f"ss_{name}" for name, fate in rows_of("option").items() if list_lacking(fate.ways(), beside.get)}
    idle.add("ss_prior_loss_weight")
    has_unet = values.get("unet_lr") or values.get("network_train_text_encoder_only")
    if has_unet and (values.get("text_encoder_lr") or values.get("network_train_unet_only")):
        idle.add("ss_learning_rate")
    kept = {name: text for name, text in metadata.items() if name not in idle}
    for name in OF_THE_DATASET:
        own = {str(subset.get(name, dataset.get(name))) for subset in lock.subsets}
        if kept.pop(f"ss_{name}", None) is not None and len(own) == 1:
            kept[f"ss_{name}"] = own.pop()
    if ARCHITECTURE in kept and (resolution := dataset.get("resolution")):
        kept["modelspec.resolution"] = "{}x{}".format(*parse_resolution(resolution))
    return kept


@dataclass(frozen=True)
class Network:
    """A file in a run's checkpoints."""

    path: Path
    """Where it is."""

    written: str
    """The sha256 of what the run wrote under that name; empty where it kept none, as kwrap did before 0.2."""

    now: str
    """Its sha256 now; empty where it is gone."""

    @property
    def is_changed(self) -> bool:
        return bool(self.written) and self.written != self.now

    @property
    def change(self) -> str:
        """What became of it, for people."""
        now = f"is now {self.now[:12]}…" if self.now else "the file is gone"
        return f"{self.path}: the sha256 was {self.written[:12]}… when the run wrote it, {now}"


def note_network(attempt: Attempt, path: Path) -> None:
    """Keep the sha256 of a network that the attempt has just written, before any state or word counts on it."""
    written = read_written(attempt.folder) | {path.name: kept_sha256(path)}
    write_json(attempt.folder / NETWORKS_FILE, written)


def note_new_name(attempt: Attempt, name: str, new_name: str) -> None:
    """Keep the sha256 of a network that is about to get another name."""
    written = read_written(attempt.folder)
    if sha256 := written.pop(name, ""):
        write_json(attempt.folder / NETWORKS_FILE, written | {new_name: sha256})


def read_written(attempt_folder: Path) -> dict[str, str]:
    """The sha256 by name of what one attempt wrote; what is none is left out."""
    written = read_json(attempt_folder / NETWORKS_FILE)
    return {name: sha256 for name, sha256 in written.items() if isinstance(sha256, str)}


def list_written(run: Run) -> dict[str, str]:
    """The sha256 by name of what the run wrote; a later attempt's network replaces that of an earlier one."""
    written: dict[str, str] = {}
    for number in attempt_numbers(run):
        written |= read_written(run.attempts / str(number))
    return written


def finished_step(run: Run) -> int | None:
    """The optimizer step at which the newest attempt finished; None where it did not."""
    result = next((attempt.result() for attempt in reversed(list_attempts(run))), None)
    return int(result["optimizer_step"]) if result is not None and result["outcome"] == "finished" else None


def shorter_end(run: Run) -> int:
    """The optimizer step at which the newest attempt finished a shorter chapter of the run; 0 where it did not."""
    step = finished_step(run) or 0
    return step if step < run.lock.total_optimizer_steps else 0


def is_finished(run: Run) -> bool:
    """Whether the newest attempt reached the last step and the final network is there.

    The network alone proves nothing: a crash may have cut it while it was written.
    """
    return bool(run.networks) and finished_step(run) is not None and not shorter_end(run)


def step_of_network(run: Run, path: Path, end: int) -> int | None:
    """The optimizer step that a network is named after; `end` for the run's last one, None for a stranger."""
    place = path.stem.removeprefix(run.output_name)
    if match := OF_STEP.fullmatch(place):
        return int(match.group(1))
    if match := OF_EPOCH.fullmatch(place):
        return int(match.group(1)) * run.lock.count.optimizer_steps_per_epoch
    return end if path.stem == run.output_name else None


def compare_networks(run: Run, on_bytes: Callable[[int], None] | None = None) -> Iterator[Network]:
    """Each network among the run's checkpoints, by name, and the last one of a finished run where it is gone.

    Others that are gone were removed by the run itself, as its options say. `on_bytes` gets the bytes that are read.
    """
    written, files = list_written(run), run.network_files
    for path in files:
        sha256 = written.get(path.name, "")
        yield Network(path, sha256, kept_sha256(path, on_bytes) if sha256 else "")
    for name in sorted(written.keys() - {path.name for path in files}):
        if Path(name).stem == run.output_name and finished_step(run) is not None:
            yield Network(run.checkpoints / name, written[name], "")


def bytes_of_networks(run: Run) -> int:
    """Bytes of the run's networks whose hash is not kept, so that a comparison reads them; for progress."""
    written = list_written(run)
    return count_unhashed(path for path in run.network_files if path.name in written)
