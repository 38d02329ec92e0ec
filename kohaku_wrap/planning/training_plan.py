"""The whole plan of a training: its steps, its network, its sizes and its time, with what cannot work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kohaku_wrap.config.base_model import (
    BadBaseModel,
    UnpickledByName,
    check_base_model,
    needs_own_vae,
    require_weight_files,
)
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.render import compose_trainer
from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets
from kohaku_wrap.dataset.fixed_chunks import cut_chunks
from kohaku_wrap.errors import Problem, ProblemsFound
from kohaku_wrap.formats.caption_rows import ImageSizes
from kohaku_wrap.formats.network_names import LYCORIS
from kohaku_wrap.formats.safetensors import MalformedFile, PickledFile
from kohaku_wrap.planning.module_counts import (
    ModuleCounts,
    NotCounted,
    count_network_everywhere,
    find_unmatched,
)
from kohaku_wrap.planning.pictures import PicturesPlan, plan_pictures
from kohaku_wrap.planning.sizes import Sizes, machine_memory_bytes, total_of, weigh_training
from kohaku_wrap.planning.step_plan import plan_steps
from kohaku_wrap.steps import StepPlan
from kohaku_wrap.trainer.builtin_options import BuiltinOptions
from kohaku_wrap.wording import show_bytes

FORWARDS_A_TRAINED_ROW = 3
"""A forward and a backward of two, of the network alone: what a measured row is a part of."""


@dataclass(frozen=True)
class ValidationPlan:
    """What `[validation]` makes of a training."""

    posts: int
    """Posts whose loss is measured."""

    relatives: int
    """Posts that are not trained either, as they are their like."""

    evaluations: int
    """Before the first step, every so many steps, and after the last one; none where `every` is 0."""

    forwards: int
    """Of the UNet, all evaluations together."""

    rows: int
    """Images of each forward."""

    seconds: float | None
    """Of all evaluations, where a step's time is known: a row as a third of a trained one."""


def plan_validation(
    effective: Effective, plan: StepPlan, images: ImageSizes, seconds_per_step: float | None
) -> ValidationPlan | None:
    """The evaluations of a training; None where none are asked for, or it is not known of which posts."""
    if images.measured is None:
        return None
    options = BucketOptions.from_dataset_options(effective.subtable("dataset_options", with_defaults=True))
    buckets = assign_buckets(images.widths, images.heights, options)
    rows = int(effective.get("validation.batch"))
    chunks = len(cut_chunks(np.flatnonzero(images.measured), buckets, rows))
    total, every = plan.total_optimizer_steps, int(effective.get("validation.every"))
    evaluations = 2 + (total - 1) // every if every else 0
    forwards = evaluations * chunks * int(effective.get("validation.timesteps"))
    seconds = None
    if seconds_per_step is not None:
        seconds = seconds_per_step * forwards * rows / (plan.effective_batch * FORWARDS_A_TRAINED_ROW)
    posts = int(images.measured.sum())
    relatives = int((np.broadcast_to(images.repeats, images.measured.shape) == 0).sum()) - posts
    return ValidationPlan(posts, relatives, evaluations, forwards, rows, seconds)


@dataclass(frozen=True)
class TrainingPlan:
    """All that is known before a training starts."""

    template: str
    """Its name."""

    engine: str
    """The engine that the site names."""

    data: str
    """Who loads the images: kwrap or sd-scripts."""

    sizes_from: str
    """Where the image sizes come from."""

    image_files: int
    """Files, where an image that is repeated counts once."""

    sizes_exact: bool
    """Whether they were measured on the images."""

    steps: StepPlan
    """The counts."""

    warmup_optimizer_steps: int
    """Warm-up under kwrap."""

    warmup_plain: int
    """Warm-up under plain sd-scripts on the same site, in optimizer steps."""

    counts: tuple[ModuleCounts, ...]
    """The network, counted on diffusers' UNet and, where installed, on the trainer's."""

    sizes: Sizes | None
    """What it weighs; None where the network was not counted."""

    seconds_per_step: float | None
    """Given or measured."""

    problems: tuple[Problem, ...]
    """What cannot work."""

    not_counted: str = ""
    """Why the network was not counted."""

    pictures: PicturesPlan | None = None
    """Those of `[samples]`."""

    validation: ValidationPlan | None = None
    """That of `[validation]`."""

    @property
    def eta_seconds(self) -> float | None:
        """How long all optimizer steps take; None where no step time is known."""
        return None if self.seconds_per_step is None else self.seconds_per_step * self.steps.total_optimizer_steps


def plan_training(
    effective: Effective,
    images: ImageSizes,
    seconds_per_step: float | None = None,
    *,
    with_modules: bool = True,
    drawing_seconds: float | None = None,
) -> TrainingPlan:
    """Count and weigh a training of a template on its site over these images.

    `drawing_seconds`: what a run measured, as `plan_pictures` takes it.
    """
    steps = plan_steps(effective, images)
    problems = [*check_model(effective), *check_engine(effective)]
    counts: tuple[ModuleCounts, ...] = ()
    module = effective.get("network_module")
    not_counted = f"modules, parameters and sizes of {module} are not known: only those of {LYCORIS} are counted"
    if not with_modules:
        not_counted = "modules, parameters and sizes were not asked for"
    elif module == LYCORIS:
        not_counted = ""
        try:
            counts = tuple(count_network_everywhere(effective))
        except NotCounted as fault:
            not_counted = f"{fault.message}. {fault.next_step}"
    sizes, base = None, (0, 0, 0)
    if counts:
        first = counts[0]
        problems += effective.blame(find_unmatched(first))
        base = (first.base_unet_parameters, first.base_text_encoder_parameters, first.base_vae_parameters)
        sizes = weigh_training(effective, steps, images, first.parameters, first.tensors, base)
        problems += check_memory(sizes)
    warmup, warmup_plain = count_warmup(effective, steps)
    return TrainingPlan(
        template=effective.name,
        engine=effective.engine,
        data=effective.get("kwrap.data", "kwrap"),
        sizes_from=images.source,
        image_files=len(images.widths),
        sizes_exact=images.exact,
        steps=steps,
        warmup_optimizer_steps=warmup,
        warmup_plain=warmup_plain,
        counts=counts,
        sizes=sizes,
        seconds_per_step=seconds_per_step,
        problems=tuple(problems),
        not_counted=not_counted,
        pictures=plan_pictures(effective, steps, sum(base), drawing_seconds),
        validation=plan_validation(effective, steps, images, seconds_per_step),
    )


def count_warmup(effective: Effective, steps: StepPlan) -> tuple[int, int]:
    """Optimizer steps of warm-up under kwrap, and under plain sd-scripts.

    sd-scripts advances its schedule once per process and step, but multiplies only the total by the processes.
    """
    warmup = effective.get("lr_warmup_steps", 0)
    if isinstance(warmup, float):
        share = int(warmup * steps.total_optimizer_steps)
        return share, share
    return warmup, -(-warmup // steps.processes)


def check_model(effective: Effective) -> list[Problem]:
    """A base model that is there and cannot be trained; one that is not there yet hinders no plan."""
    site = effective.site
    if site is None or not site.paths.base_model.is_file():
        return []
    try:
        check_base_model(site.paths.base_model, needs_own_vae(site))
        require_weight_files(effective.options, site.path.parent)
    except (BadBaseModel, UnpickledByName, PickledFile, MalformedFile) as fault:
        return [Problem("base_model" if isinstance(fault, BadBaseModel) else "weights", fault.message, str(site.path))]
    return []


def find_builtin_faults(effective: Effective) -> list[Problem]:
    """Options that the builtin engine does not have on the template's site; `kwrap train` refuses them."""
    on_cpu = effective.site is not None and effective.site.machine.gpus == 0
    try:
        BuiltinOptions.from_config(compose_trainer(effective, Path.cwd(), "plan"), on_cpu=on_cpu)
    except ProblemsFound as found:
        return effective.blame((fault.where, fault.what) for fault in found.problems)
    return []


def check_engine(effective: Effective) -> list[Problem]:
    """What the builtin engine lacks, where the site names it; tokenizers may come later, as the base model may."""
    if effective.engine != "builtin" or not effective.batch:
        return []
    return [fault for fault in find_builtin_faults(effective) if fault.where != "tokenizer_cache_dir"]


def check_memory(sizes: Sizes) -> list[Problem]:
    """Host memory beyond the machine's."""
    needed, there = total_of(sizes.host_memory), machine_memory_bytes()
    if needed <= there:
        return []
    largest = max(sizes.host_memory, key=lambda part: part.size_bytes)
    what = (
        f"{show_bytes(needed)} needed, {show_bytes(there)} there; the largest part is {largest.name} with "
        f'{show_bytes(largest.size_bytes)}. Fewer workers in site.toml, or data = "kwrap", need less'
    )
    return [Problem("host memory", what)]
