"""What kwrap does inside the trainer's loop: positions, seeds, ledger, metrics, states, and an end when asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.engines.interface import Engine
from kohaku_wrap.training.engines.step_sums import StepSums
from kohaku_wrap.training.engines.validating import Validation
from kohaku_wrap.training.records.attempts import Attempt

if TYPE_CHECKING:
    from kohaku_wrap.training.engines.sd_scripts.measuring import Measuring

LOSSES_FILE = "kwrap_losses.pt"
"""The loss average, within a state."""

SEAMS = (
    "accelerator",
    "data loader",
    "sampler",
    "dataset",
    "scheduler",
    "network",
    "loss recorder",
    "place in the epochs",
    "steps already done",
    "number of the micro-batch",
    "step hook",
    "latents of images",
    "noise and time steps",
    "loss of a batch",
    "count of optimizer steps",
    "end of a micro-batch",
)
"""What must have been called by the end of the first optimizer step."""


class SilentSeam(KwrapError):
    """The trainer did not call what kwrap relies on."""


class WrongPlan(KwrapError):
    """The trainer counts other steps than the run's plan does."""


class StopRequested(KwrapError):
    """A stop was asked for, and the state is saved."""


@dataclass
class MicroBatch:
    """What is known of the micro-batch in work."""

    facts: Mapping[str, Any]
    """Epoch, position, image ids and content, as the dataset put them."""

    timesteps: torch.Tensor | None = None
    """(images,) noise levels, on the trainer's device."""

    nan_latents: torch.Tensor | None = None
    """() count, on the trainer's device."""

    loss: torch.Tensor | None = None
    """() mean loss, on the trainer's device."""


class Loop(Engine):
    """One process of one attempt, as the corrected loop sees it."""

    def __init__(self, attempt: Attempt, rank: int) -> None:
        super().__init__(attempt, rank)
        self.fired: set[str] = set()
        self.network: Any = None
        self.losses_of_state: list[dict[str, Any]] = []
        self.loss_recorders: list[Any] = []
        self.micro_batch: MicroBatch | None = None
        self.step_ended = False
        self.state_after_epoch = False
        self.measuring: Measuring | None = None

    # What the corrected loop calls, see trainer/anchors.py.

    def first_epoch(self, micro_batches_per_epoch: int) -> int:
        """The epoch, from 0, at which the loop starts; past the last one when all is trained.

        Raises WrongPlan when the trainer would count other steps than the plan.
        """
        self.fired.add("place in the epochs")
        planned = self.count.micro_batches_per_process(self.attempt.processes)
        trainer_total = self.options.max_train_steps
        if micro_batches_per_epoch != planned or trainer_total != self.total_optimizer_steps:
            raise WrongPlan(
                f"the trainer counts {micro_batches_per_epoch:,} micro-batches an epoch and {trainer_total:,} "
                f"optimizer steps, the plan {planned:,} and {self.total_optimizer_steps:,}",
                "The dataset changed after the run was made; start a new run.",
            )
        return self.attempt.start.epoch + self.is_last_step

    def optimizer_steps_done(self) -> int:
        """Steps done before this attempt."""
        self.fired.add("steps already done")
        return self.optimizer_steps

    def first_micro_batch(self) -> int:
        """The number, from 0, of the first micro-batch of the epoch that begins now."""
        self.fired.add("number of the micro-batch")
        return self.micro_batch_of_epoch

    def count_optimizer_step(self, _optimizer_steps: int) -> int:
        """One more step; called after the optimizer's, before anything is saved. Raises NonFiniteLoss."""
        self.fired.add("count of optimizer steps")
        self.take_micro_batch()
        self.end_step()
        self.step_ended = True
        if self.is_checkpoint_due:
            self.beat("saving")
        return self.optimizer_steps

    def end_micro_batch(self, optimizer_steps: int) -> bool:
        """Whether to leave the epoch; saves a state where one is due. Raises StopRequested."""
        self.fired.add("end of a micro-batch")
        if not self.step_ended:
            self.take_micro_batch()
            return False
        self.step_ended = False
        # Only now has the trainer recorded the loss.
        self.write_metrics()
        self.sums = StepSums()
        self.require_seams()
        self.validate_if_due()
        if optimizer_steps % self.count.optimizer_steps_per_epoch == 0 or self.is_last_step:
            self.state_after_epoch = True
        else:
            self.save_and_stop()
        return False

    # What the seams call, see seams.py.

    def start_micro_batch(self, batch: Any) -> None:
        """Seed everything that the trainer draws for this batch. Raises OutOfOrder, and what the dataset met."""
        self.fired.add("step hook")
        if isinstance(batch, KwrapError):
            raise batch
        self.begin_micro_batch(batch["kwrap"])
        self.micro_batch = MicroBatch(batch["kwrap"])

    def begin_measuring(self, measuring: Measuring) -> None:
        """Take the models and what else a loss needs, once, and measure what is due before the first micro-batch."""
        self.measuring = measuring
        dataset, device = getattr(self.dataset, "batches", None), self.accelerator.device
        if dataset is not None:
            dtype = str(self.options.mixed_precision)
            self.validation = Validation.of(self.attempt, self.rank, device, dataset, dtype)
        self.validate_if_due()

    def list_models(self) -> list[torch.nn.Module]:
        return self.measuring.list_models() if self.measuring else []

    def measure_posts(self, batch: dict[str, Any], ids: list[int], timesteps: tuple[int, ...]) -> torch.Tensor:
        assert self.measuring is not None
        return self.measuring.measure_posts(batch, ids, timesteps)

    def note_latents(self, latents: torch.Tensor) -> None:
        """Count the images whose latents are not numbers; called for each part of the batch (vae_batch_size)."""
        self.fired.add("latents of images")
        if self.micro_batch is not None:
            found = torch.isnan(latents).flatten(1).any(dim=1).sum()
            before = self.micro_batch.nan_latents
            self.micro_batch.nan_latents = found if before is None else before + found

    def note_timesteps(self, timesteps: torch.Tensor) -> None:
        self.fired.add("noise and time steps")
        if self.micro_batch is not None:
            self.micro_batch.timesteps = timesteps.detach()

    def note_loss(self, loss: torch.Tensor) -> None:
        self.fired.add("loss of a batch")
        if self.micro_batch is not None:
            self.micro_batch.loss = loss.detach()

    def end_epoch(self, epochs_done: int) -> None:
        """Save the state that waited for the epoch's checkpoint. Raises StopRequested."""
        if self.state_after_epoch:
            self.state_after_epoch = False
            self.save_and_stop(epochs_done)

    # The loop's own.

    def take_micro_batch(self) -> None:
        """Record what the seams noted."""
        done, self.micro_batch = self.micro_batch, None
        if done is None:
            return
        # The trainer asks for the loss itself right after; until then the device may work on.
        loss = float(done.loss) if done.loss is not None else math.nan
        timesteps = [] if done.timesteps is None else done.timesteps.flatten().tolist()
        self.record_micro_batch(done.facts, loss, timesteps, 0 if done.nan_latents is None else int(done.nan_latents))

    def save_and_stop(self, epochs_done: int | None = None) -> None:
        """Save what is due. Raises StopRequested."""
        if self.save_if_due(epochs_done):
            raise StopRequested(f"stopped after optimizer step {self.optimizer_steps}")

    def require_seams(self) -> None:
        """Raise SilentSeam unless all that kwrap relies on was called by now."""
        missing = [seam for seam in SEAMS if seam not in self.fired]
        if missing:
            raise SilentSeam(
                f"sd-scripts never called: {', '.join(missing)}",
                "Train with a commit that kwrap supports: kwrap trainer show",
            )

    def average_loss(self, _loss: float) -> float:
        """That of the trainer's own recorder."""
        return float(self.loss_recorders[0].moving_average) if self.loss_recorders else math.nan

    def fill_state(self, folder: Path) -> None:
        """Let accelerate write network, optimizer, schedule and scaler, and add the loss average."""
        self.accelerator.save_state(str(folder))
        lists = [torch.tensor(recorder.loss_list, dtype=torch.float64) for recorder in self.loss_recorders]
        totals = [float(recorder.loss_total) for recorder in self.loss_recorders]
        torch.save({"lists": lists, "totals": totals}, folder / LOSSES_FILE)

    def read_losses(self, state: Path) -> None:
        """Take up the loss average of a state, where it has one."""
        path = state / LOSSES_FILE
        if path.is_file():
            kept = torch.load(path, weights_only=True)
            self.losses_of_state = [
                {"loss_list": losses.tolist(), "loss_total": total}
                for losses, total in zip(kept["lists"], kept["totals"], strict=True)
            ]
