"""From a batch to its loss, with sd-scripts' conditioning, draws and weights on diffusers' modules.

The random draws come in sd-scripts' order: the latents' sample, the noise, its offset, the time steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch.nn import functional

from kohaku_wrap.dataset.fixed_chunks import TRAIN_TIMESTEPS
from kohaku_wrap.formats.sdxl import VAE_SCALING
from kohaku_wrap.trainer.builtin_options import BuiltinOptions
from kohaku_wrap.training.data.moments import holds_moments, sample_moments
from kohaku_wrap.training.data.torch_streams import draw_timesteps
from kohaku_wrap.training.data.whole_items import LATENT_STREAM, NOISE_STREAM, draw_normals
from kohaku_wrap.training.engines.builtin.models import BaseModel
from kohaku_wrap.training.engines.builtin.texts import encode_tokens

Batch = dict[str, Any]


@dataclass(frozen=True)
class BatchLoss:
    """One batch's loss and what was met on the way."""

    loss: torch.Tensor
    """Scalar, with its graph."""

    timesteps: tuple[int, ...]
    """One an image."""

    nan_latents: int
    """Images whose latents were not numbers; zeros were trained for them, as sd-scripts does."""


class LossOfBatch:
    """Computes losses on one device with the network applied to the model."""

    def __init__(self, model: BaseModel, options: BuiltinOptions, accelerator: Any, end_token_id: int) -> None:
        self.model = model
        self.options = options
        self.accelerator = accelerator
        self.end_token_id = end_token_id
        self.weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(options.mixed_precision, torch.float32)
        self.vae_dtype = torch.float32 if options.no_half_vae else self.weight_dtype
        self.trains_text = not options.network_train_unet_only
        self.scheduler = DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            num_train_timesteps=TRAIN_TIMESTEPS,
            clip_sample=False,
        )
        signal = torch.sqrt(self.scheduler.alphas_cumprod)
        noise = torch.sqrt(1.0 - self.scheduler.alphas_cumprod)
        self.signal_to_noise = (signal / noise) ** 2

    def place_model(self) -> None:
        """Move the model to the device in the precisions that sd-scripts uses."""
        device = self.accelerator.device
        self.model.unet.to(device, self.weight_dtype)
        self.model.vae.to(device, self.vae_dtype)
        for encoder in self.model.text_encoders:
            # The CPU has no half-precision text encoders.
            encoder.to(device, torch.float32 if device.type == "cpu" else self.weight_dtype)
        if self.options.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
            self.model.unet.train()
            for encoder in self.model.text_encoders:
                encoder.train()
                if self.trains_text:
                    encoder.gradient_checkpointing_enable({"use_reentrant": False})

    def __call__(self, batch: Batch) -> BatchLoss:
        """The loss of one batch under the generators as they stand."""
        latents, nan_latents = self.encode_images(batch)
        with torch.set_grad_enabled(self.trains_text), self.accelerator.autocast():
            text, pooled = self.encode_captions(batch)
        noise = self.draw_noise(latents)
        timesteps = draw_timesteps(len(latents), self.options.min_timestep, self.options.max_timestep)
        noisy = self.scheduler.add_noise(latents, noise, timesteps.to(latents.device))
        with self.accelerator.autocast():
            predicted = self.predict_noise(noisy, timesteps.to(latents.device), text, pooled, batch)
        loss = functional.mse_loss(predicted.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
        loss = loss * batch["loss_weights"].to(loss.device)
        if self.options.min_snr_gamma:
            ratio = self.signal_to_noise[timesteps]
            weight = torch.minimum(ratio, torch.full_like(ratio, self.options.min_snr_gamma)) / ratio
            loss = loss * weight.float().to(loss.device)
        return BatchLoss(loss.mean(), tuple(timesteps.tolist()), nan_latents)

    @torch.no_grad()
    def measure(
        self, batch: Batch, ids: list[int], timesteps: Sequence[int], scheduler: Any, predicts_velocity: bool = False
    ) -> torch.Tensor:
        """(posts, time steps) float64 on the CPU: the mean squared error of each post, without weights.

        Sample of the latents and noise are functions of the post, and of the place of the time step.
        """
        spread = self.model.vae.encode(batch["images"].to(self.accelerator.device, self.vae_dtype)).latent_dist
        sample = draw_normals(LATENT_STREAM, ids, 0, spread.mean)
        latents = (spread.mean + spread.std * sample) * VAE_SCALING
        with self.accelerator.autocast():
            text, pooled = self.encode_captions(batch)
        found = []
        for place, step in enumerate(timesteps):
            noise = draw_normals(NOISE_STREAM, ids, place, latents)
            steps = torch.full((len(ids),), step, device=latents.device)
            noisy = scheduler.add_noise(latents, noise, steps)
            wanted = scheduler.get_velocity(latents, noise, steps) if predicts_velocity else noise
            with self.accelerator.autocast():
                predicted = self.predict_noise(noisy, steps, text, pooled, batch)
            found.append(((predicted.double() - wanted.double()) ** 2).flatten(1).mean(dim=1).cpu())
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def encode_images(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """(n, 4, height / 8, width / 8) latents, sampled and scaled, and how many images gave none."""
        if batch.get("latents") is not None:
            latents = batch["latents"].to(self.accelerator.device, self.vae_dtype)
        else:
            images = batch["images"].to(self.accelerator.device, self.vae_dtype)
            size = self.options.vae_batch_size or len(images)
            latents = torch.cat([self.sample_latents(part) for part in torch.split(images, size)])
        nan_latents = int(latents.isnan().flatten(1).any(dim=1).sum())
        if nan_latents:
            latents = torch.nan_to_num(latents, nan=0.0)
        return latents * VAE_SCALING, nan_latents

    def sample_latents(self, part: torch.Tensor) -> torch.Tensor:
        """A sample for each image; `part` holds pixels, or mean and deviation."""
        return sample_moments(part) if holds_moments(part) else self.model.vae.encode(part).latent_dist.sample()

    def encode_captions(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, tokens, both widths) hidden states and (n, width) pooled state, encoded now or cached."""
        device = self.accelerator.device
        if (cached := batch.get("text_encoder_outputs_list")) is not None:
            first, second, pooled = (each.to(device) for each in cached)
        else:
            encoders, ids = self.model.text_encoders, batch["input_ids_list"]
            first, second, pooled = encode_tokens(encoders, ids, device, self.end_token_id)
        return torch.cat([first, second], dim=2), pooled

    def draw_noise(self, latents: torch.Tensor) -> torch.Tensor:
        """Normal noise of the latents' shape, with a constant offset for each image and channel."""
        noise = torch.randn_like(latents)
        if self.options.noise_offset:
            offset = torch.randn((*latents.shape[:2], 1, 1), device=latents.device)
            noise = noise + self.options.noise_offset * offset
        return noise

    def predict_noise(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """The UNet's output under SDXL's size conditions: original size, crop corner, target size."""
        names = ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
        sizes = torch.cat([batch[name] for name in names], dim=1).to(noisy.device)
        conditions = {"text_embeds": pooled.to(self.weight_dtype), "time_ids": sizes}
        prediction: torch.Tensor = self.model.unet(
            noisy.to(self.weight_dtype),
            timesteps,
            text.to(self.weight_dtype),
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        return prediction
