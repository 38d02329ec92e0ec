"""What a training weighs: checkpoints, states, disk over the run, host memory and GPU memory, part by part."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kohaku_wrap.config.caching import LATENTS_KEY, TEXTS_KEY, find_origin, measure_text_outputs
from kohaku_wrap.config.effective import Effective
from kohaku_wrap.dataset.buckets import BucketOptions, assign_buckets, parse_resolution
from kohaku_wrap.formats.caption_rows import ImageSizes
from kohaku_wrap.steps import StepPlan

MIB = 1 << 20
GIB = 1 << 30

OPTIMIZER_BYTES = {
    "lion8bit": 1 + 4 / 256,
    "pagedlion8bit": 1 + 4 / 256,
    "adamw8bit": 2 + 8 / 256,
    "pagedadamw8bit": 2 + 8 / 256,
    "sgdnesterov8bit": 1 + 4 / 256,
    "sgdnesterov": 4,
    "lion": 4,
    "adafactor": 0.1,
}
"""Bytes of optimizer state per trained number; 8-bit ones keep one fp32 maximum per block of 256."""

TWO_MOMENTS_BYTES = 8
"""AdamW and all that is not listed."""

BYTES_OF_PRECISION = {"float": 4, "fp16": 2, "bf16": 2}

PROCESS_BYTES = 1400 * MIB
"""One trainer process with torch, diffusers and transformers loaded."""

WORKER_BYTES = 120 * MIB
"""What a loader process makes its own besides the dataset and its batches."""

SD_SCRIPTS_IMAGE_BYTES = 1536
"""sd-scripts' Python objects of one image, in every process."""

COPIED_SHARE = 0.58
"""The share of those pages that a loader process has made its own after an eighth of an epoch."""

KWRAP_IMAGE_BYTES = 28
"""kwrap's arrays of one image in a process: bucket, order, sizes."""

COLUMN_IMAGE_BYTES = 60
"""The columns of captions.arrow without the captions; mapped once for all processes."""

CAPTION_BYTES = 330
"""A Kohaku caption's usual length, where the captions are not there yet."""

METRICS_LINE_BYTES = 400
LEDGER_RECORD_BYTES = 60
"""One a micro-batch, and one an optimizer step of each process."""

PREFETCHED_BATCHES = 2
CUDA_CONTEXT_BYTES = 700 * MIB
ACTIVATION_BYTES = {True: 2500 * MIB, False: 13 * GIB}
"""Of one image of 1024x1024 in the UNet, with and without gradient checkpointing; grows with the area."""


@dataclass(frozen=True)
class Part:
    """One named part of a sum."""

    name: str
    """What takes the space."""

    size_bytes: int
    """Its size."""


@dataclass(frozen=True)
class Sizes:
    """What one training weighs."""

    checkpoint_bytes: int
    """One network file."""

    state_bytes: int
    """One state."""

    disk: tuple[Part, ...]
    """The run's folder at its largest, under the retention policy."""

    host_memory: tuple[Part, ...]
    """All processes and loader workers together."""

    gpu_memory: tuple[Part, ...]
    """One GPU, estimated; empty on the CPU."""


def total_of(parts: tuple[Part, ...]) -> int:
    """The sum of the parts, in bytes."""
    return sum(part.size_bytes for part in parts)


def weigh_training(
    effective: Effective,
    plan: StepPlan,
    images: ImageSizes,
    trained_parameters: int,
    tensors: int,
    base_parameters: tuple[int, int, int],
) -> Sizes:
    """Weigh a plan. `base_parameters`: of the UNet, both text encoders and the VAE."""
    half = bool(effective.get("full_fp16") or effective.get("full_bf16"))
    weight_bytes = trained_parameters * (2 if half else 4)
    save_precision = effective.get("save_precision")
    saved = BYTES_OF_PRECISION.get(save_precision, 2 if half else 4)
    # A name, dtype, shape and offsets take about this much in a safetensors header.
    checkpoint = trained_parameters * saved + tensors * 140
    optimizer_type = str(effective.get("optimizer_type") or "AdamW").lower()
    optimizer = int(trained_parameters * OPTIMIZER_BYTES.get(optimizer_type, TWO_MOMENTS_BYTES))
    state = weight_bytes + optimizer + tensors * 300
    return Sizes(
        checkpoint_bytes=checkpoint,
        state_bytes=state,
        disk=(*weigh_disk(effective, plan, checkpoint, state), *weigh_caches(effective, images)),
        host_memory=weigh_host_memory(effective, plan, images, sum(base_parameters), weight_bytes),
        gpu_memory=weigh_gpu_memory(effective, plan, base_parameters, weight_bytes, optimizer),
    )


def count_due(effective: Effective, plan: StepPlan, steps: str, epochs: str, until: int, of: int = 1) -> int:
    """After how many of the first `until` optimizer steps something is due, by options of steps and of epochs.

    `of`: only those that it divides.
    """
    strides = (effective.get(steps) or 0, (effective.get(epochs) or 0) * plan.optimizer_steps_per_epoch)
    each = [math.lcm(of, stride) for stride in strides if stride]
    return sum(until // stride for stride in each) - (until // math.lcm(*each) if len(each) == 2 else 0)


def weigh_disk(effective: Effective, plan: StepPlan, checkpoint: int, state: int) -> tuple[Part, ...]:
    """Checkpoints that stay, states that stay and the one being written, and the text files."""
    steps = plan.total_optimizer_steps
    every, epochs = effective.get("save_every_n_steps"), effective.get("save_every_n_epochs")
    of_steps = (steps - 1) // every if every else 0
    if every and (span := effective.get("save_last_n_steps")):
        of_steps = min(of_steps, span // every + 1)
    of_epochs = (steps - 1) // (epochs * plan.optimizer_steps_per_epoch) if epochs else 0
    # A checkpoint of a step and one of an epoch are two files, where both come after the same step, too.
    kept_checkpoints = of_steps + min(of_epochs, effective.get("save_last_n_epochs") or of_epochs)
    saves = count_due(effective, plan, "save_every_n_steps", "save_every_n_epochs", steps - 1) + 1
    keep, milestone = effective.get("states.keep", 3), effective.get("states.every")
    states_made = saves if effective.get("save_state") else int(bool(effective.get("save_state_on_train_end")))
    milestones = steps // milestone if milestone else 0
    kept_states = min(states_made, keep + milestones)
    writing = 1 if states_made else 0
    records = plan.group + plan.processes
    return (
        Part(f"{kept_checkpoints + 1} checkpoint{'s' * (kept_checkpoints > 0)}", (kept_checkpoints + 1) * checkpoint),
        Part(
            f"{kept_states} state{'s' * (kept_states != 1)} kept, {writing} being written",
            (kept_states + writing) * state,
        ),
        Part("metrics and ledger", steps * (METRICS_LINE_BYTES + LEDGER_RECORD_BYTES * records)),
    )


def weigh_caches(effective: Effective, images: ImageSizes) -> Iterator[Part]:
    """What `kwrap cache` writes for a template that trains from cached latents or outputs of text encoders."""
    options = effective.subtable("dataset_options", with_defaults=True)
    if effective.get(LATENTS_KEY):
        buckets = assign_buckets(images.widths, images.heights, BucketOptions.from_dataset_options(options))
        cells = (buckets.resolutions.astype(np.int64) // 8).prod(axis=1) @ buckets.images_of_bucket
        channels = 8 if effective.get("cache.keep") == "moments" else 4
        number_bytes = 2 if effective.get("cache.precision") == "fp16" else 4
        variants = 2 if find_origin(effective, "flip_aug") else 1
        yield Part("cached latents, once for all runs", int(cells) * channels * number_bytes * variants)
    if effective.get(TEXTS_KEY):
        tokens, first, second, pooled = measure_text_outputs(effective)
        number_bytes = 2 if effective.get("mixed_precision") in ("fp16", "bf16") else 4
        numbers = tokens * (first + second) + pooled
        yield Part("cached outputs of text encoders, once for all runs", len(images.widths) * numbers * number_bytes)


def weigh_host_memory(
    effective: Effective, plan: StepPlan, images: ImageSizes, base_parameters: int, weight_bytes: int
) -> tuple[Part, ...]:
    """Dataset, processes and loader workers of one machine, with the pages that workers copy."""
    processes = effective.site.machine.processes_here if effective.site is not None else plan.processes
    workers = effective.get("max_data_loader_n_workers", 8)
    width, height = parse_resolution(effective.get("dataset_options.resolution", 1024))
    image_bytes = width * height * 3 * 5
    batches = processes * max(workers, 1) * PREFETCHED_BATCHES * plan.batch_size * image_bytes
    on_cpu = effective.site is not None and effective.site.machine.gpus == 0
    # safetensors maps the file, so all processes share its pages until a precision changes.
    model = (
        Part("base model in each process", processes * base_parameters * 4)
        if on_cpu
        else Part("base model, mapped once for all while loading", base_parameters * 2)
    )
    parts = [
        Part(f"trainer processes ({processes})", processes * PROCESS_BYTES),
        model,
        Part(f"loader workers ({processes * workers})", processes * workers * WORKER_BYTES),
        Part("batches made ahead", batches),
    ]
    if on_cpu:
        parts.append(Part("network, gradients and optimizer in each process", processes * weight_bytes * 3))
    if effective.get("kwrap.data") == "sd-scripts":
        objects = plan.images * SD_SCRIPTS_IMAGE_BYTES
        parts.append(Part("dataset objects in each process", processes * objects))
        copied = int(processes * workers * objects * COPIED_SHARE)
        parts.append(Part("dataset pages copied by loader workers", copied))
    else:
        captions = images.caption_bytes if images.caption_bytes is not None else plan.images * CAPTION_BYTES
        parts.append(Part("captions and sizes, mapped once for all", captions + plan.images * COLUMN_IMAGE_BYTES))
        parts.append(Part("order and buckets in each process", processes * plan.images * KWRAP_IMAGE_BYTES))
    return tuple(parts)


def weigh_gpu_memory(
    effective: Effective, plan: StepPlan, base_parameters: tuple[int, int, int], weight_bytes: int, optimizer_bytes: int
) -> tuple[Part, ...]:
    """One GPU's parts; activations are an estimate."""
    if effective.site is not None and effective.site.machine.gpus == 0:
        return ()
    unet, text_encoders, vae = base_parameters
    half = effective.get("mixed_precision") in ("fp16", "bf16")
    base_bytes = 2 if half else 4
    vae_bytes = 4 if effective.get("no_half_vae") or not half else 2
    width, height = parse_resolution(effective.get("dataset_options.resolution", 1024))
    checkpointing = bool(effective.get("gradient_checkpointing"))
    activations = int(ACTIVATION_BYTES[checkpointing] * width * height / (1024 * 1024)) * plan.batch_size
    # ddp_gradient_as_bucket_view saves nothing: DDP makes its buckets when it wraps the network, and since sd-scripts
    # never calls DDP's forward, each gradient keeps a storage of its own. The builtin engine sums them in a copy.
    copies = 2 if plan.processes > 1 else 1
    return (
        Part("UNet", unet * base_bytes),
        Part("text encoders", text_encoders * base_bytes),
        Part("VAE", vae * vae_bytes),
        Part("network weights", weight_bytes),
        Part("gradients" + ", and buffers that sum them over processes" * (copies > 1), weight_bytes * copies),
        Part("optimizer", optimizer_bytes),
        Part(f"activations of {plan.batch_size} images (rough)", activations if half else activations * 2),
        Part("CUDA context and kernels", CUDA_CONTEXT_BYTES),
    )


def machine_memory_bytes() -> int:
    """The machine's memory, or the container's limit where that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isascii() and text.isdecimal():
            total = min(total, int(text))
    return total
