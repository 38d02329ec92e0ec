"""The pictures that are drawn while a run trains: how many, and what they take in memory, disk and time."""

from __future__ import annotations

from dataclasses import dataclass

from kohaku_wrap.config.effective import Effective
from kohaku_wrap.config.samples import KWRAP, OWN_PROMPTS, settle_samples
from kohaku_wrap.config.site import AFTER
from kohaku_wrap.planning.sizes import BYTES_OF_PRECISION, CUDA_CONTEXT_BYTES, PROCESS_BYTES, Part, count_due
from kohaku_wrap.steps import StepPlan

THUMB_BYTES = 3 * 256 * 256
"""Of one picture on the contact sheet, at most."""

BETWEEN_STEPS = "the GPUs that train, between two steps"
"""Where sd-scripts draws."""


@dataclass(frozen=True)
class PicturesPlan:
    """What `[samples]` makes of a training."""

    by: str
    """KWRAP or TRAINER."""

    device: str
    """Where they are drawn: as `sample_device` has it, or BETWEEN_STEPS."""

    networks: int
    """Of how many optimizer steps."""

    prompts: int
    """Pictures of one network."""

    steps: int
    """Steps of the sampler a picture; each is a forward of the UNet, of two rows where there is guidance."""

    pixels: int
    """Of one picture."""

    disk_bytes: int
    """At most: what pictures take that compress not at all, and their contact sheets."""

    memory: tuple[Part, ...]
    """Of the process that draws, where it draws; empty where the trainer does, or nothing was counted."""

    seconds: float | None
    """Of all pictures; None where no run has measured it."""

    @property
    def pictures(self) -> int:
        """Of all networks together."""
        return self.networks * self.prompts

    @property
    def is_beside(self) -> bool:
        """Whether its memory is needed while the training has its own."""
        return self.device not in ("after", BETWEEN_STEPS)


def plan_pictures(
    effective: Effective, plan: StepPlan, base_parameters: int = 0, seconds_per_pixel_step: float | None = None
) -> PicturesPlan | None:
    """The pictures of a training; None where none are asked for.

    `base_parameters`: of the whole model, 0 where it was not counted. `seconds_per_pixel_step`: what a run measured,
    for one pixel and one step of the sampler.
    """
    asked = settle_samples(effective)
    if not asked:
        return None
    networks = count_networks(effective, plan, asked["by"])
    prompts = len(asked.get("prompts") or range(OWN_PROMPTS))
    pixels, steps = asked["width"] * asked["height"], int(asked["steps"])
    device, memory = BETWEEN_STEPS, tuple[Part, ...]()
    if asked["by"] == KWRAP and effective.site is not None:
        device, on_cpu = effective.site.machine.draws_on, effective.site.machine.gpus == 0
        memory = weigh_drawing(base_parameters, on_gpu=device.startswith("cuda") or (device == AFTER and not on_cpu))
    per_step = None if seconds_per_pixel_step is None else seconds_per_pixel_step * pixels
    return PicturesPlan(
        by=asked["by"],
        device=device,
        networks=networks,
        prompts=prompts,
        steps=steps,
        pixels=pixels,
        disk_bytes=networks * prompts * (3 * pixels + (THUMB_BYTES if asked["by"] == KWRAP else 0)),
        memory=memory,
        seconds=None if per_step is None else per_step * steps * networks * prompts,
    )


def count_networks(effective: Effective, plan: StepPlan, by: str) -> int:
    """Of how many optimizer steps pictures are drawn."""
    total, every = plan.total_optimizer_steps, effective.get("samples.every")
    if by == KWRAP:
        return count_due(effective, plan, "save_every_n_steps", "save_every_n_epochs", total - 1, every or 1) + 1
    # sd-scripts looks at steps only where no epochs are given.
    steps = "" if effective.get("sample_every_n_epochs") else "samples.every" if every else "sample_every_n_steps"
    at_first = bool(effective.get("sample_at_first"))
    return count_due(effective, plan, steps, "sample_every_n_epochs", total) + at_first


def weigh_drawing(base_parameters: int, *, on_gpu: bool) -> tuple[Part, ...]:
    """What the process that draws holds before its first picture; what a picture takes more grows with its size."""
    if not base_parameters:
        return ()
    precision = "fp16" if on_gpu else "float"
    parts = (Part(f"model to draw with, in {precision}", base_parameters * BYTES_OF_PRECISION[precision]),)
    if on_gpu:
        return (*parts, Part("CUDA context and kernels", CUDA_CONTEXT_BYTES))
    return (*parts, Part("process that draws", PROCESS_BYTES))
