"""A run's files from an effective template: trainer.toml, dataset.toml, preset.toml, accelerate.yaml, run.lock.toml."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kohaku_wrap
from kohaku_wrap.config.code_names import list_trusted
from kohaku_wrap.config.effective import Effective, shape_batch
from kohaku_wrap.config.fates import digest_options
from kohaku_wrap.config.kernels import choose_kernels
from kohaku_wrap.config.run_files import (
    ACCELERATE_FILE,
    DATASET_FILE,
    LOCK_FILE,
    LOCK_FORMAT,
    PRESET_FILE,
    PROMPTS_FILE,
    TRAINER_FILE,
    digest_lock,
    flatten_dataset,
)
from kohaku_wrap.config.samples import KWRAP, TRAINER, settle_samples, who_draws
from kohaku_wrap.config.schema import ARGUMENT_TABLES, NETWORK_FILES
from kohaku_wrap.config.site import Site
from kohaku_wrap.config.trainer_arguments import (
    describe_accelerate,
    render_literals,
    render_network_args,
    render_prompts,
    render_yaml,
    section_of,
)
from kohaku_wrap.config.training_data import compose_dataset, describe_data
from kohaku_wrap.config.validation import describe_validation, settle_held_out
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.file_hashes import kept_sha256, sha256_of_file, sha256_of_text
from kohaku_wrap.files import describe_absence, write_text
from kohaku_wrap.formats.caption_rows import NoImages, read_captions_metadata
from kohaku_wrap.formats.held_out import HELD_OUT_FILE
from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.steps import StepPlan
from kohaku_wrap.trainer.commits import find_known
from kohaku_wrap.trainer.engines import find_engine
from kohaku_wrap.trainer.git import read_commit
from kohaku_wrap.trainer.installed import find_trainer, list_versions, read_trainer_commit

TOKENIZER_FILES = frozenset(
    {
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "config.json",
    }
)
"""What is read of a tokenizer's folder."""

SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model", ("pretrained_model", "vae", "tokenizer_cache", "no_half_vae", "v2", "v_param")),
    ("network", ("network_", "dim_from_weights", "base_weights", "scale_weight_norms")),
    ("optimizer", ("optimizer_", "learning_rate", "unet_lr", "text_encoder_lr", "lr_", "max_grad_norm")),
    ("saving", ("output_", "save_", "metadata_", "no_metadata")),
    ("logging", ("log", "wandb", "console_log", "sample_")),
)


class MissingInput(KwrapError):
    """A file that the run needs is not there."""


@dataclass(frozen=True)
class RenderedRun:
    """A run's files, before or after they are written."""

    folder: Path
    """The run's folder, absolute."""

    name: str
    """The run's name."""

    trainer: Mapping[str, Any]
    """Options of trainer.toml, flat, as they arrive in the trainer's Namespace."""

    dataset: Mapping[str, Any]
    """dataset.toml."""

    lock: Mapping[str, Any]
    """run.lock.toml."""

    texts: Mapping[str, str]
    """Every file by its name in the folder."""

    def write(self) -> RenderedRun:
        """Write all files, the lock last: a folder with a lock is whole."""
        for name, text in self.texts.items():
            write_text(self.folder / name, text)
        return self


def compose_run(
    effective: Effective,
    site: Site,
    run_folder: Path,
    run_name: str,
    plan: StepPlan,
    inputs: Mapping[str, Any] | None = None,
    run_id: str = "",
    beginning: Mapping[str, Any] | None = None,
) -> RenderedRun:
    """Compose the run's files without touching the disk or hashing anything.

    `inputs`: what `hash_inputs` gave; without it only paths are locked. `run_id`: made at random for a run to train.
    `beginning`: tables of the lock that say what a branch begins from.
    """
    folder = Path(run_folder).absolute()
    trainer = compose_trainer(effective, folder, run_name)
    dataset = compose_dataset(effective, site.paths.images)
    lock = compose_lock(effective, site, run_name, plan, trainer, inputs or name_inputs(site))
    machine = site.machine
    accelerate = describe_accelerate(
        machine.processes, machine.gpus, trainer.get("mixed_precision", "no"), machines=machine.accelerate
    )
    sectioned: dict[str, dict[str, Any]] = {}
    for name, value in trainer.items():
        sectioned.setdefault(section_of(name, SECTIONS), {})[name] = value
    texts = {
        TRAINER_FILE: toml_text(sectioned),
        DATASET_FILE: toml_text(dataset),
        PRESET_FILE: toml_text(effective.preset),
        ACCELERATE_FILE: render_yaml(accelerate),
    }
    if who_draws(effective) == TRAINER and (samples := settle_samples(effective)):
        texts[PROMPTS_FILE] = render_prompts(samples)
    with suppress(NoImages):
        if held_out := settle_held_out(effective, site.paths.images):
            lock["validation"] = describe_validation(effective, held_out)
            texts[HELD_OUT_FILE] = held_out.text()
    lock |= beginning or {}
    lock["run"] |= {"id": run_id, "options_digest": digest_options(lock)}
    lock["versions"] = list_versions(find_engine(machine.engine).package_folders())
    lock["files"] = dict(texts)
    lock["digest"] = digest_lock(tomllib.loads(toml_text(lock)))
    texts[LOCK_FILE] = toml_text(lock)
    return RenderedRun(folder, run_name, trainer, dataset, lock, texts)


def compose_trainer(effective: Effective, folder: Path, run_name: str) -> dict[str, Any]:
    """The options of trainer.toml, flat; they run with plain sd-scripts too."""
    shape = shape_batch(effective)
    options = {
        name: value
        for name, value in effective.options.items()
        if value is not None and name not in effective.table.dataset_options
    }
    network_args = effective.subtable("network_args")
    if effective.preset:
        network_args["preset"] = str(folder / PRESET_FILE)
    if network_args:
        options["network_args"] = render_network_args(network_args)
    for name in ("optimizer_args", "lr_scheduler_args"):
        if table := effective.subtable(name):
            options[name] = render_literals(table)
    if who_draws(effective) == TRAINER:
        options["sample_prompts"] = str(folder / PROMPTS_FILE)
        if every := effective.get("samples.every"):
            options["sample_every_n_steps"] = every
    if options.get("log_with"):
        options.setdefault("logging_dir", str(folder / "logs"))
    options |= {
        "output_dir": str(folder / "checkpoints"),
        "output_name": run_name,
        "train_batch_size": shape.batch_per_gpu,
        "gradient_accumulation_steps": shape.accumulation,
    }
    return options


def compose_lock(
    effective: Effective,
    site: Site,
    run_name: str,
    plan: StepPlan,
    trainer: Mapping[str, Any],
    inputs: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that a run depends on."""
    shape = shape_batch(effective)
    engine = site.machine.engine
    checkout = find_trainer() if find_engine(engine).has_checkout else None
    values = {name: value for name, value in effective.defaults.items() if name in effective.table.options}
    values |= trainer
    for name in ARGUMENT_TABLES:
        values.pop(name, None)
    run = {
        "name": run_name,
        "template": effective.name,
        "template_files": [str(path) for path in effective.files],
        "template_commit": read_commit(effective.path.parent),
        "engine": engine,
        "data": effective.get("kwrap.data"),
        "dataset": inputs.get("captions_dataset") or effective.get("kwrap.dataset", ""),
        "seed": effective.get("seed"),
        "effective_batch": shape.effective_batch,
        "batch_per_gpu": shape.batch_per_gpu,
        "kwrap_version": kohaku_wrap.__version__,
    }
    if trusted := list_trusted(effective.values, effective.trust):
        run["trust"] = sorted({module for _, _, module in trusted})
    if site.secrets:
        run["secrets_file"] = str(site.path)
    states = {"keep": effective.get("states.keep"), "every": effective.get("states.every")}
    lock: dict[str, Any] = {
        "format": LOCK_FORMAT,
        "run": run,
        "plan": {
            "images": plan.images,
            "batches": plan.batches,
            "micro_batches_per_epoch": plan.micro_batches_per_epoch,
            "optimizer_steps_per_epoch": plan.optimizer_steps_per_epoch,
            "total_optimizer_steps": plan.total_optimizer_steps,
            "epochs": plan.epochs,
            "processes": plan.processes,
            "accumulation": plan.accumulation,
        },
        "states": drop_unset(states),
        "values": drop_unset(dict(sorted(values.items()))),
        "dataset": drop_unset(effective.subtable("dataset_options", with_defaults=True))
        | {"batch_size": shape.batch_per_gpu, "image_dir": str(site.paths.images)},
        "samples": settle_samples(effective)
        if who_draws(effective) == KWRAP
        else drop_unset(effective.subtable("samples")),
    }
    if effective.get("cache.latents") or effective.get("cache.text_encoders"):
        lock["cache"] = effective.subtable("cache", with_defaults=True)
    for name in ARGUMENT_TABLES:
        lock[name] = effective.subtable(name)
    lock |= {
        "preset": dict(effective.preset),
        "inputs": drop_unset(dict(inputs)),
        "trainer": describe_trainer(checkout),
        "kernels": choose_kernels(on_cpu=site.machine.gpus == 0),
        "machine": {
            "gpus": site.machine.gpus,
            "processes": site.machine.processes,
            "workers": trainer.get("max_data_loader_n_workers", 0),
            "platform": platform.platform(),
            "python": platform.python_version(),
        }
        | ({"accelerate": dict(site.machine.accelerate)} if site.machine.accelerate else {}),
    }
    return lock


def describe_trainer(checkout: Path | None) -> dict[str, Any]:
    """The checkout, how kwrap knows its commit, and that commit's rule for captions."""
    known = find_known(checkout) if checkout else None
    return {"path": str(checkout or ""), "commit": read_trainer_commit(checkout) if checkout else ""} | (
        {"support": known.support, "joins_by_separator": known.joins_by_separator} if known else {}
    )


def drop_unset(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table without None, which TOML cannot hold."""
    return {key: value for key, value in table.items() if value is not None}


def name_inputs(site: Site) -> dict[str, Any]:
    """The run's inputs by path, nothing hashed."""
    names = ("base_model", "images", "vae", "tokenizers")
    return {name: str(path) for name in names if (path := getattr(site.paths, name))}


def hash_inputs(
    effective: Effective,
    site: Site,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The run's inputs with their sha256; reads a base model that it did not know. Raises MissingInput.

    The selection's sha256 is the one that the captions were made from.
    """
    inputs = name_inputs(site)
    for name in [name for name in ("base_model", "vae") if name in inputs]:
        path = Path(inputs[name])
        if not path.is_file():
            raise MissingInput(f"{path}: {describe_absence(path)} ({name})", f"Fix paths.{name} in {site.path}.")
        inputs[f"{name}_sha256"] = kept_sha256(path, on_bytes)
    data = effective.get("kwrap.data")
    inputs |= describe_data(data, site.paths.images, flatten_dataset(compose_dataset(effective, site.paths.images)))
    inputs["captions_dataset"] = site.paths.images.name
    with suppress(NoImages):
        captions = read_captions_metadata(site.paths.images)
        inputs["captions_dataset"] = captions.get("dataset", "")
        inputs["prompt_format"] = captions.get("prompt_format")
        inputs["selection_sha256"] = captions.get("selection_sha256")
    inputs |= hash_named_files(effective.options)
    if parent := effective.get("network_weights"):
        inputs |= {"network": parent, "network_name": Path(parent).name, "network_sha256": kept_sha256(Path(parent))}
    inputs["site"], inputs["site_sha256"] = str(site.path), sha256_of_file(site.path)
    for index, path in enumerate(effective.files):
        inputs[f"template_{index}_sha256"] = sha256_of_file(path)
    inputs["preset_sha256"] = sha256_of_text(toml_text(effective.preset))
    return inputs


def hash_named_files(options: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of what options name besides the models: tokenizers, and networks to start from or to merge first.

    Empty for an option that is not set or names nothing that is there.
    """
    found: dict[str, str] = {}
    for name in NETWORK_FILES:
        value = options.get(name)
        paths = [Path(each) for each in (value if isinstance(value, list) else [value]) if each]
        if paths and all(path.is_file() for path in paths):
            found[f"{name}_sha256"] = sha256_of_text("\n".join(kept_sha256(path) for path in paths))
    folder = options.get("tokenizer_cache_dir")
    if folder and Path(folder).is_dir():
        files = sorted(path for path in Path(folder).glob("*/*") if path.name in TOKENIZER_FILES)
        rows = [f"{path.relative_to(folder).as_posix()} {kept_sha256(path)}" for path in files]
        found["tokenizers_sha256"] = sha256_of_text("\n".join(rows))
    return found
