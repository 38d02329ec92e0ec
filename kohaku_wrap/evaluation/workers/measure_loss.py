"""The losses of a model's chunks of posts at fixed time steps, each chunk written as soon as it is done.

Called through `ask_python` with a job as JSON on stdin; answers with how many chunks it did. Loss, conditions and
text projection are those of training (`kohaku_wrap/training/engines/builtin/`); the sample of the latents and the noise
are functions of the post and the place of the time step alone, drawn on the CPU.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler

from kohaku_wrap.dataset.captions.mixing import BOTH, put_text
from kohaku_wrap.files import atomic_write
from kohaku_wrap.formats.caption_rows import Columns
from kohaku_wrap.processes import answer
from kohaku_wrap.sampling.checkpoints import AddedNetwork, Model
from kohaku_wrap.sampling.drawing.models import read_model
from kohaku_wrap.streams import seed_of
from kohaku_wrap.training.data.captions import choose_sign, keep_whole
from kohaku_wrap.training.data.columns import ColumnsDataset
from kohaku_wrap.training.data.images import UnreadableImage
from kohaku_wrap.training.data.items import Item, ItemOptions
from kohaku_wrap.training.data.tokens import CaptionTokenizer
from kohaku_wrap.training.engines.builtin.loss import VAE_SCALE, LossOfBatch
from kohaku_wrap.training.engines.builtin.models import load_base_model


class HeldOutPosts(ColumnsDataset):
    """The same posts each time: whole captions, no flip, the middle of the picture."""

    def draw_tags(self, row: int, epoch: int, repeat: int, draw: Any) -> tuple[str, str, str]:
        """The whole caption with its text, where it has one."""
        tags, text = self.columns.caption_of(row), self.columns.texts[row] if self.columns.texts else ""
        options = self.options_of(row).captions
        if not text:
            return keep_whole(tags, options), "", ""
        sign = choose_sign(tags)
        return keep_whole(put_text(tags, sign, int(self.columns.text_places[row]), BOTH), options), sign, text


def keep_still(options: ItemOptions) -> ItemOptions:
    """The same options without flips and random crops, each post once."""
    return replace(
        options,
        flip_aug=False,
        random_crop=False,
        num_repeats=1,
        later_subsets=tuple(keep_still(each) for each in options.later_subsets),
    )


class LossMeter:
    """A model on a device, and its losses."""

    def __init__(self, job: dict[str, Any], tokenizer: CaptionTokenizer) -> None:
        self.device = torch.device(job["device"])
        described = job["model"]
        networks = tuple(AddedNetwork(Path(path), weight) for path, weight in described["networks"])
        vae = Path(described["vae"]) if described["vae"] else None
        model = Model(Path(described["path"]), networks, vae=vae)
        tensors = read_model(model, job["threads"]) if networks else None
        options: Any = SimpleNamespace(
            mixed_precision=job["dtype"], no_half_vae=True, network_train_unet_only=True, gradient_checkpointing=False,
            vae_batch_size=None,
        )  # fmt: skip
        accelerator = SimpleNamespace(device=self.device, autocast=nullcontext)
        self.loss_of_batch = LossOfBatch(load_base_model(model.path, vae, tensors), options, accelerator,
                                         tokenizer.end_token_id)  # fmt: skip
        self.loss_of_batch.place_model()
        self.predicts_velocity = job["prediction"] == "v"
        self.scheduler = DDPMScheduler.from_config(
            self.loss_of_batch.scheduler.config, rescale_betas_zero_snr=job["zero_terminal_snr"]
        )
        self.timesteps: list[int] = job["timesteps"]

    @torch.no_grad()
    def measure(self, batch: dict[str, Any], ids: list[int]) -> torch.Tensor:
        """(posts, time steps) float64: the mean squared error of each post."""
        meter = self.loss_of_batch
        images = batch["images"].to(self.device, meter.vae_dtype)
        spread = meter.model.vae.encode(images).latent_dist
        sample = self.draw("held-out-latent", ids, 0, spread.mean)
        latents = (spread.mean + spread.std * sample) * VAE_SCALE
        text, pooled = meter.encode_captions(batch["input_ids_list"])
        found = []
        for place, step in enumerate(self.timesteps):
            noise = self.draw("held-out-noise", ids, place, latents)
            steps = torch.full((len(ids),), step, device=self.device)
            noisy = self.scheduler.add_noise(latents, noise, steps)
            wanted = self.scheduler.get_velocity(latents, noise, steps) if self.predicts_velocity else noise
            predicted = meter.predict_noise(noisy, steps, text, pooled, batch)
            apart = (predicted.double() - wanted.double()) ** 2
            found.append(apart.flatten(1).mean(dim=1).cpu())
        return torch.stack(found, dim=1)

    def draw(self, word: str, ids: list[int], place: int, like: torch.Tensor) -> torch.Tensor:
        """Normal numbers, for each post from a stream of its own."""
        rows = []
        for post in ids:
            generator = torch.Generator().manual_seed(seed_of(word, post, place))
            rows.append(torch.randn(like.shape[1:], generator=generator))
        return torch.stack(rows).to(like.device, like.dtype)


def load_batch(posts: HeldOutPosts, rows: list[int], tokenizer: CaptionTokenizer) -> tuple[dict[str, Any], list[bool]]:
    """The examples of some rows, and which pictures cannot be read; these are grey."""
    items: list[Item] = [posts.draw_item(row, 0) for row in rows]
    images, unreadable = [], []
    for item in items:
        try:
            images.append(posts.load_image(item))
            unreadable.append(False)
        except UnreadableImage:
            width, height = posts.resolution_of(item.row)
            images.append(torch.zeros(3, height, width))
            unreadable.append(True)
    ids = [tokenizer(item.caption) for item in items]
    batch = {
        "images": torch.stack(images),
        "input_ids_list": [torch.stack(list(each)) for each in zip(*ids, strict=True)],
        **posts.size_conditions(items),
    }
    return batch, unreadable


def run(job: dict[str, Any]) -> int:
    """Measure the chunks of a job that are not there; how many that were. A picture that cannot be read gives NaN."""
    torch.set_num_threads(job["threads"])
    torch.use_deterministic_algorithms(True, warn_only=job["device"] != "cpu")
    torch.backends.cudnn.benchmark = False
    options = keep_still(ItemOptions.from_dataset_options(job["dataset_options"], job["joins_by_separator"]))
    tokenizer = CaptionTokenizer.of_folders([Path(path) for path in job["tokenizers"]], job["max_token_length"])
    posts = HeldOutPosts(Columns.open(Path(job["images"]), job["captions_digest"]), options, 1, 0, 1, None)
    waiting = [(Path(file), rows) for file, rows in job["chunks"] if not Path(file).is_file()]
    meter = LossMeter(job, tokenizer) if waiting else None
    for path, rows in waiting:
        assert meter is not None
        # Every forward has the same number of rows: with another one the last bits are others.
        filled = [*rows, *[rows[-1]] * (job["batch"] - len(rows))]
        batch, unreadable = load_batch(posts, filled, tokenizer)
        losses = meter.measure(batch, [int(posts.columns.ids[row]) for row in filled]).numpy()
        losses[unreadable] = np.nan
        with atomic_write(path, "wb") as stream:
            np.save(stream, losses[: len(rows)], allow_pickle=False)
    return len(waiting)


if __name__ == "__main__":
    answer(lambda: run(json.load(sys.stdin)))
