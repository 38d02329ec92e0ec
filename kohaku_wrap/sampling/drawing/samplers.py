"""diffusers' samplers with the lists of sigmas that people ask for, and noise that depends on the cell alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

from kohaku_wrap.sampling.cells import Cell
from kohaku_wrap.streams import seed_of

SDXL_NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
"""The noise that SDXL was trained with."""

KARRAS_RHO = 7.0
FIRST_NOISE = 0
"""The number of the noise that a picture begins as; that of step k is k + 1."""

HIRES_NOISE = 1_000_000
"""Added to the numbers of a second pass."""


class EulerAncestral(EulerAncestralDiscreteScheduler):  # type: ignore[misc]  # diffusers has no type information
    """diffusers' Euler a over a list of sigmas, which it has no option for."""

    def use_schedule(self, steps: int, schedule: str) -> None:
        """Set sigmas and time steps: exponential or Karras between the model's own ends, or uniform in time."""
        if schedule == "uniform":
            self.set_timesteps(steps)
            return
        trained = np.asarray(((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5, dtype=np.float64)
        sigmas = space_sigmas(float(trained[0]), float(trained[-1]), steps, schedule)
        # Time steps between the trained ones, by the logarithm of sigma, as k-diffusion reads them.
        times = np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained)))
        self.num_inference_steps = steps
        self.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
        self.timesteps = torch.from_numpy(times.astype(np.float32))
        self._step_index = self._begin_index = None


def space_sigmas(least: float, most: float, steps: int, schedule: str) -> npt.NDArray[np.float64]:
    """(steps,) sigmas from `most` down to `least`, as k-diffusion spaces them."""
    if schedule == "karras":
        ramp = np.linspace(0, 1, steps)
        ends = most ** (1 / KARRAS_RHO), least ** (1 / KARRAS_RHO)
        spaced: npt.NDArray[np.float64] = (ends[0] + ramp * (ends[1] - ends[0])) ** KARRAS_RHO
        return spaced
    return np.exp(np.linspace(np.log(most), np.log(least), steps))


class Sampler:
    """One cell's sampler: diffusers' scheduler and its steps."""

    def __init__(self, cell: Cell, first_step: int = 0) -> None:
        """`first_step`: how many steps of the list are left out at its noisy end, as in a second pass."""
        noise = {
            **SDXL_NOISE,
            "prediction_type": "v_prediction" if cell.prediction == "v" else "epsilon",
            "rescale_betas_zero_snr": cell.zero_terminal_snr,
            "timestep_spacing": "linspace",
        }
        self.is_ancestral = cell.sampler == "euler-a"
        if self.is_ancestral:
            self.scheduler = EulerAncestral(**noise)
            self.scheduler.use_schedule(cell.steps, cell.schedule)
        else:
            self.scheduler = DPMSolverMultistepScheduler(
                **noise,
                algorithm_type="sde-dpmsolver++" if cell.sampler == "dpmpp-2m-sde" else "dpmsolver++",
                use_karras_sigmas=cell.schedule == "karras",
                use_exponential_sigmas=cell.schedule == "exponential",
            )
            self.scheduler.set_timesteps(cell.steps)
        self.scheduler.set_begin_index(first_step)
        self.times = self.scheduler.timesteps[first_step:]

    def begin(self, noise: torch.Tensor) -> torch.Tensor:
        """Latents of the first step from standard noise."""
        return noise * float(self.scheduler.init_noise_sigma)

    def begin_from(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Latents of the first step from those of a picture, with noise over them."""
        noisy: torch.Tensor = self.scheduler.add_noise(latents, noise, self.times[:1].repeat(len(latents)))
        return noisy

    def scale(self, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The latents as the UNet takes them."""
        scaled: torch.Tensor = self.scheduler.scale_model_input(latents, time)
        return scaled

    def step(
        self, prediction: torch.Tensor, time: torch.Tensor, latents: torch.Tensor, seeds: list[int], number: int
    ) -> torch.Tensor:
        """The latents after one step; the noise is that of (seed, number) for each row."""
        if self.is_ancestral:
            generators = [noise_generator(seed, number) for seed in seeds]
            moved = self.scheduler.step(prediction, time, latents, generator=generators, return_dict=False)
        else:
            noise = draw_noise(seeds, number, latents.shape[1:]).to(latents.device)
            moved = self.scheduler.step(prediction, time, latents, variance_noise=noise, return_dict=False)
        after: torch.Tensor = moved[0]
        return after


def noise_generator(seed: int, number: int) -> torch.Generator:
    """The generator of the noise of one step of one cell, on the CPU whatever the device."""
    return torch.Generator("cpu").manual_seed(seed_of("sampling noise", seed, number))


def draw_noise(seeds: list[int], number: int, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """(rows, *shape) standard noise in fp32, each row of its own seed."""
    rows = [torch.randn((1, *shape), generator=noise_generator(seed, number), dtype=torch.float32) for seed in seeds]
    return torch.cat(rows)
