"""Cells of one kind drawn together: forwards of one fixed batch, so that no neighbour changes a bit of a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.formats.sdxl import LATENT_CHANNELS, LATENT_PIXELS
from kohaku_wrap.sampling.cells import Cell
from kohaku_wrap.sampling.chunks import Tokenizer
from kohaku_wrap.sampling.drawing.encoding import Encoded, encode_prompt
from kohaku_wrap.sampling.drawing.models import Drawer
from kohaku_wrap.sampling.drawing.samplers import FIRST_NOISE, HIRES_NOISE, Sampler, draw_noise


class NotFinite(KwrapError):
    """Numbers of a picture that are infinite or no numbers."""


class Artist:
    """A model on its device, which draws."""

    def __init__(
        self, drawer: Drawer, tokenizers: tuple[Tokenizer, Tokenizer], device: torch.device, offload: bool
    ) -> None:
        self.drawer, self.tokenizers, self.device, self.offload = drawer, tokenizers, device, offload
        self.encoded: dict[tuple[Any, ...], Encoded] = {}
        if not offload:
            for module in (drawer.unet, drawer.vae, *drawer.encoders):
                module.to(device)

    @contextmanager
    def placed(self, *modules: torch.nn.Module) -> Iterator[None]:
        """Have the modules on the device, for the time of the block only where they are taken off it."""
        if not self.offload:
            yield
            return
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:
            for module in modules:
                module.to("cpu")

    def encode(self, cell: Cell, negative: bool = False) -> Encoded:
        """A cell's prompt, or its negative one, encoded; each only once."""
        text = cell.negative if negative else cell.prompt
        key = (text, cell.clip_skip, cell.emphasis, cell.lenient)
        if key not in self.encoded:
            with self.placed(*self.drawer.encoders):
                self.encoded[key] = encode_prompt(
                    text, self.drawer.encoders, self.tokenizers, cell.clip_skip, cell.emphasis, cell.lenient
                )
        return self.encoded[key]

    @torch.inference_mode()
    def draw(self, cells: Sequence[Cell]) -> list[Image.Image]:
        """The pictures of cells of one group whose prompts have as many chunks, as many as the batch at most.

        Raises NotFinite with the cell and the step.
        """
        for cell in cells:  # while the encoders have their turn on the device
            self.encode(cell)
            self.encode(cell, negative=True)
        with self.placed(self.drawer.unet):
            latents = self.denoise(cells, None, cells[0].height, cells[0].width)
            if second := cells[0].second_size:
                latents = self.denoise(cells, latents, *second)
        with self.placed(self.drawer.vae):
            return [self.decode(cell, row[None]) for cell, row in zip(cells, latents, strict=False)]

    def denoise(
        self, cells: Sequence[Cell], before: torch.Tensor | None, height: int, width: int
    ) -> torch.Tensor:  # fmt: skip
        """(batch, 4, height / 8, width / 8) latents in fp32; rows beyond the cells only fill the batch.

        `before`: the latents of a first pass, for the second.
        """
        cell = cells[0]
        filled = [*cells, *[cell] * (cell.compute.batch - len(cells))]
        seeds = [each.seed for each in filled]
        first = (
            0 if before is None or cell.hires is None else cell.steps - max(1, round(cell.steps * cell.hires.strength))
        )
        added = 0 if before is None else HIRES_NOISE
        sampler = Sampler(cell, first)
        shape = (LATENT_CHANNELS, height // LATENT_PIXELS, width // LATENT_PIXELS)
        noise = draw_noise(seeds, added + FIRST_NOISE, shape).to(self.device)
        if before is None:
            latents = sampler.begin(noise)
        else:
            larger = [torch.nn.functional.interpolate(row[None], noise.shape[2:], mode="bilinear") for row in before]
            latents = sampler.begin_from(torch.cat(larger), noise)
        positive = self.condition([self.encode(each) for each in filled], height, width)
        negative = self.condition([self.encode(each, negative=True) for each in filled], height, width)
        for number, time in enumerate(sampler.times, start=first + 1):
            scaled = sampler.scale(latents, time)
            wanted = self.predict(scaled, time, positive)
            if cell.guidance != 1:
                unwanted = self.predict(scaled, time, negative)
                wanted = unwanted + cell.guidance * (wanted - unwanted)
            latents = sampler.step(wanted, time, latents, seeds, added + number)
            for each, row in zip(cells, latents, strict=False):
                check_finite(row, each, f"step {number} of {cell.steps}" + (" of the second pass" if added else ""))
        return latents

    def condition(self, encoded: Sequence[Encoded], height: int, width: int) -> dict[str, torch.Tensor]:
        """What the UNet gets beside latents and time: original size, crop and target size stand in each picture."""
        dtype = self.drawer.unet.dtype
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(encoded), device=self.device)
        return {
            "states": torch.cat([each.states for each in encoded]).to(self.device, dtype),
            "text_embeds": torch.cat([each.pooled for each in encoded]).to(self.device, dtype),
            "time_ids": sizes.to(dtype),
        }

    def predict(self, latents: torch.Tensor, time: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        """The UNet's prediction in fp32."""
        unet = self.drawer.unet
        predicted: torch.Tensor = unet(
            latents.to(unet.dtype),
            time.to(self.device),
            encoder_hidden_states=condition["states"],
            added_cond_kwargs={"text_embeds": condition["text_embeds"], "time_ids": condition["time_ids"]},
            return_dict=False,
        )[0]
        return predicted.float()

    def decode(self, cell: Cell, latents: torch.Tensor) -> Image.Image:
        """One picture, decoded alone."""
        vae = self.drawer.vae
        decoded = vae.decode((latents / self.drawer.scaling).to(vae.dtype), return_dict=False)[0].float()
        check_finite(
            decoded, cell, "the VAE" + (f" in {cell.compute.vae_dtype}" if cell.compute.vae_dtype != "fp32" else "")
        )
        pixels = (decoded[0] / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy(), "RGB")


def check_finite(values: torch.Tensor, cell: Cell, where: str) -> None:
    """Raise NotFinite unless all numbers are finite."""
    if not bool(torch.isfinite(values).all()):
        raise NotFinite(
            f"{cell.name}: not finite at {where} (seed {cell.seed}, {cell.width}x{cell.height}, {cell.prompt!r})",
            "Nothing was written of it. Draw with --dtype fp32 and --vae-dtype fp32; if it stays, the model is broken.",
        )
