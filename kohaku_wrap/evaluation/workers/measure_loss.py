"""The losses of a model's chunks of posts at fixed time steps, each chunk written as soon as it is done.

Called through `ask_in_lines` with a job as JSON on stdin; answers with a line a chunk. Posts, draws, loss and
conditions are those of validation while a run trains (`kohaku_wrap/training/engines/builtin/loss.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler

from kohaku_wrap.files import atomic_write
from kohaku_wrap.formats.caption_columns import Columns
from kohaku_wrap.processes import answer_in_lines
from kohaku_wrap.sampling.checkpoints import Model
from kohaku_wrap.sampling.drawing.models import choose_device, read_model
from kohaku_wrap.training.data.columns import ColumnsDataset
from kohaku_wrap.training.data.items import ItemOptions
from kohaku_wrap.training.data.tokens import CaptionTokenizer
from kohaku_wrap.training.data.whole_items import load_whole
from kohaku_wrap.training.engines.builtin.loss import LossOfBatch
from kohaku_wrap.training.engines.builtin.models import load_base_model


class LossMeter:
    """A model on a device, and its losses."""

    def __init__(self, job: dict[str, Any], tokenizer: CaptionTokenizer) -> None:
        self.device = choose_device(job["device"], job["index"])
        model = Model.of_files(job["model"])
        tensors = read_model(model, job["threads"]) if model.networks else None
        options: Any = SimpleNamespace(
            mixed_precision=job["dtype"], no_half_vae=True, network_train_unet_only=True, gradient_checkpointing=False,
            vae_batch_size=None,
        )  # fmt: skip
        accelerator = SimpleNamespace(device=self.device, autocast=nullcontext)
        self.loss_of_batch = LossOfBatch(load_base_model(model.path, model.vae, tensors), options, accelerator,
                                         tokenizer.end_token_id)  # fmt: skip
        self.loss_of_batch.place_model()
        self.predicts_velocity = job["prediction"] == "v"
        self.scheduler = DDPMScheduler.from_config(
            self.loss_of_batch.scheduler.config, rescale_betas_zero_snr=job["zero_terminal_snr"]
        )
        self.timesteps: list[int] = job["timesteps"]

    def measure(self, batch: dict[str, Any], ids: list[int]) -> torch.Tensor:
        """(posts, time steps) float64: the mean squared error of each post."""
        return self.loss_of_batch.measure(batch, ids, self.timesteps, self.scheduler, self.predicts_velocity)


def run(job: dict[str, Any], tell: Callable[..., None]) -> None:
    """Measure the chunks of a job that are not there. A picture that cannot be read gives NaN."""
    torch.set_num_threads(job["threads"])
    torch.use_deterministic_algorithms(True, warn_only=job["device"] != "cpu")
    torch.backends.cudnn.benchmark = False
    options = ItemOptions.from_dataset_options(job["dataset_options"], job["joins_by_separator"])
    tokenizer = CaptionTokenizer.of_folders([Path(path) for path in job["tokenizers"]], job["max_token_length"])
    columns = Columns.open(Path(job["images"]), job["captions_digest"])
    posts = ColumnsDataset(columns, options, 1, 0, 1, tokenizer)
    waiting = [(Path(file), rows) for file, rows in job["chunks"] if not Path(file).is_file()]
    meter = LossMeter(job, tokenizer) if waiting else None
    for path, rows in waiting:
        assert meter is not None
        # Every forward has the same number of rows: with another one the last bits are others.
        filled = [*rows, *[rows[-1]] * (job["batch"] - len(rows))]
        batch, unreadable = load_whole(posts, filled)
        losses = meter.measure(batch, [int(posts.columns.ids[row]) for row in filled]).numpy()
        losses[unreadable] = np.nan
        with atomic_write(path, "wb") as stream:
            np.save(stream, losses[: len(rows)], allow_pickle=False)
        tell(measured=str(path))


if __name__ == "__main__":
    sys.exit(answer_in_lines(run))
