"""What kwrap does inside the trainer's loop: positions, seeds, ledger, metrics, states, and an end when asked."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.data.columns import content_digest
from kohaku_wrap.training.data.order import order_digest
from kohaku_wrap.training.data.torch_streams import seed_generators, step_seed
from kohaku_wrap.training.engines.step_sums import StepSums, begin_ledger
from kohaku_wrap.training.records.attempts import Attempt
from kohaku_wrap.training.records.bad_steps import BadSteps
from kohaku_wrap.training.records.ledger import LedgerWriter
from kohaku_wrap.training.records.metrics import MetricsWriter
from kohaku_wrap.training.records.saving import save_run_state, wait_for_room

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


class OutOfOrder(KwrapError):
    """A batch came at another position than the order says."""


class StopRequested(KwrapError):
    """A stop was asked for, and the state is saved."""


@dataclass
class MicroBatch:
    """What is known of the micro-batch in work."""

    facts: Mapping[str, Any]
    """Epoch, position, image ids and content, as the dataset put them."""

    learning_rate: float
    """The UNet's rate in this optimizer step."""

    timesteps: torch.Tensor | None = None
    """(images,) noise levels, on the trainer's device."""

    nan_latents: torch.Tensor | None = None
    """() count, on the trainer's device."""

    loss: torch.Tensor | None = None
    """() mean loss, on the trainer's device."""


class Loop:
    """One process of one attempt, as the corrected loop sees it."""

    def __init__(self, attempt: Attempt, rank: int) -> None:
        lock = attempt.lock
        self.attempt = attempt
        self.rank = rank
        self.seed = lock.seed
        self.count = lock.count
        self.start = self.count.position_of(attempt.start_optimizer_step, attempt.processes)
        self.optimizer_steps = attempt.start_optimizer_step
        self.micro_batches = 0
        self.micro_batch_of_epoch = self.start.micro_batch
        self.total_optimizer_steps = lock.total_optimizer_steps
        self.fired: set[str] = set()
        self.args: argparse.Namespace | None = None
        self.accelerator: Any = None
        self.optimizer: Any = None
        self.dataset: Any = None
        self.network: Any = None
        self.rate_names: tuple[str, ...] = ()
        self.state_bytes = 0
        self.losses_of_state: list[dict[str, Any]] = []
        self.loss_recorders: list[Any] = []
        self.micro_batch: MicroBatch | None = None
        self.sums = StepSums()
        self.rates: list[float] = []
        self.stopping = False
        self.step_ended = False
        self.step_skipped = False
        self.state_after_epoch = False
        self.bad_steps = BadSteps.at_start(attempt)
        self.ledger: LedgerWriter = begin_ledger(attempt, rank)
        self.metrics = MetricsWriter(attempt) if rank == 0 else None

    def optimizer_steps_so_far(self) -> int:
        return self.optimizer_steps

    # What the corrected loop calls, see trainer/anchors.py.

    def first_epoch(self, micro_batches_per_epoch: int) -> int:
        """The epoch, from 0, at which the loop starts; past the last one when all is trained.

        Raises WrongPlan when the trainer would count other steps than the plan.
        """
        self.fired.add("place in the epochs")
        planned = self.count.micro_batches_per_process(self.attempt.processes)
        trainer_total = self.args.max_train_steps if self.args else 0
        if micro_batches_per_epoch != planned or trainer_total != self.total_optimizer_steps:
            raise WrongPlan(
                f"the trainer counts {micro_batches_per_epoch:,} micro-batches an epoch and {trainer_total:,} "
                f"optimizer steps, the plan {planned:,} and {self.total_optimizer_steps:,}",
                "The dataset changed after the run was made; start a new run.",
            )
        if self.optimizer_steps >= self.total_optimizer_steps:
            return self.start.epoch + 1
        return self.start.epoch

    def optimizer_steps_done(self) -> int:
        """Steps done before this attempt."""
        self.fired.add("steps already done")
        return self.optimizer_steps

    def first_micro_batch(self) -> int:
        """The number, from 0, of the first micro-batch of the epoch that begins now."""
        self.fired.add("number of the micro-batch")
        self.micro_batch_of_epoch = 0 if self.micro_batches else self.start.micro_batch
        return self.micro_batch_of_epoch

    def count_optimizer_step(self, optimizer_steps: int) -> int:
        """One more step; called after the optimizer's, before anything is saved. Raises NonFiniteLoss."""
        self.fired.add("count of optimizer steps")
        self.record_micro_batch()
        self.stopping = self.sums.sum_over_ranks(self.attempt, self.rank, self.accelerator.device) or self.stopping
        skipped = bool(self.accelerator.optimizer_step_was_skipped)
        self.optimizer_steps = optimizer_steps + 1
        self.step_skipped = skipped
        self.record_step()
        self.step_ended = True
        if self.saves_checkpoint_now():
            self.attempt.beat(self.rank, "saving", self.optimizer_steps, self.micro_batches)
        return self.optimizer_steps

    def end_micro_batch(self, optimizer_steps: int, epoch: int) -> bool:
        """Whether to leave the epoch; saves a state where one is due. Raises StopRequested."""
        self.fired.add("end of a micro-batch")
        if not self.step_ended:
            self.record_micro_batch()
            return False
        self.step_ended = False
        self.write_metrics()
        self.sums = StepSums()
        self.require_seams()
        epoch_ends = optimizer_steps % self.count.optimizer_steps_per_epoch == 0
        if epoch_ends or optimizer_steps >= self.total_optimizer_steps:
            # The trainer writes an epoch's checkpoint first; a state before it would lose that checkpoint in a crash.
            self.state_after_epoch = True
            return False
        due = self.is_state_due()
        if due or self.stopping:
            self.save_state(scheduled=due)
        if self.stopping:
            raise StopRequested(f"stopped after optimizer step {optimizer_steps}")
        return False

    # What the seams call, see sd_scripts_seams.py.

    def begin_micro_batch(self, batch: Any) -> None:
        """Seed everything that the trainer draws for this batch. Raises OutOfOrder, and what the dataset met."""
        self.fired.add("step hook")
        if isinstance(batch, KwrapError):
            raise batch
        facts = batch["kwrap"]
        expected = self.micro_batch_of_epoch * self.attempt.processes + self.rank
        if facts["position"] != expected:
            raise OutOfOrder(
                f"rank {self.rank} got position {facts['position']} of epoch {facts['epoch']}, expected {expected}",
                "This is a fault of kwrap: please report it with the versions that `kwrap doctor` prints.",
            )
        seed_generators(step_seed(self.seed, facts["epoch"], facts["position"]))
        self.rates = [rate_of(group) for group in self.optimizer.param_groups]
        self.micro_batch = MicroBatch(facts, self.unet_rate())

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
        if not self.state_after_epoch:
            return
        self.state_after_epoch = False
        args = self.args
        every = int(getattr(args, "save_every_n_epochs", None) or 0)
        is_last = self.optimizer_steps >= self.total_optimizer_steps
        at_epoch = every > 0 and epochs_done % every == 0 and bool(getattr(args, "save_state", False))
        at_end = is_last and bool(getattr(args, "save_state", False) or getattr(args, "save_state_on_train_end", False))
        due = self.is_state_due() or at_epoch or at_end
        if due or (self.stopping and not is_last):
            self.save_state(scheduled=due)
        if self.stopping and not is_last:
            raise StopRequested(f"stopped after optimizer step {self.optimizer_steps}")

    # The loop's own.

    def record_micro_batch(self) -> None:
        """Append what was trained to the ledger and to the step's sums."""
        done, self.micro_batch = self.micro_batch, None
        if done is None:
            return
        facts = done.facts
        # The trainer asks for the loss itself right after; until then the device may work on.
        loss = float(done.loss) if done.loss is not None else math.nan
        timesteps = [] if done.timesteps is None else done.timesteps.flatten().tolist()
        self.ledger.append(
            optimizer_step=self.count.optimizer_step_of(facts["epoch"], facts["position"]),
            epoch=facts["epoch"],
            position=facts["position"],
            order_digest=order_digest(facts["image_ids"]),
            content_digest=content_digest(facts["content"], timesteps),
            loss=loss,
            learning_rate=done.learning_rate,
            is_fill=facts["is_fill"],
            is_substitute=bool(facts["substituted"]),
        )
        self.micro_batches += 1
        self.micro_batch_of_epoch += 1
        self.attempt.beat(self.rank, "step", self.optimizer_steps, self.micro_batches)
        wait_for_room(self.attempt, self.ledger.write_out, self.optimizer_steps, self.micro_batches, "step", self.rank)
        self.sums.loss += loss
        self.sums.images += len(facts["image_ids"])
        self.sums.nan_latents += int(done.nan_latents) if done.nan_latents is not None else 0
        self.sums.substitutes += len(facts["substituted"])

    def record_step(self) -> None:
        """Append the optimizer step to the ledger and count what was wrong with it. Raises NonFiniteLoss."""
        loss = self.sums.mean_loss(self.attempt)
        is_non_finite = not math.isfinite(loss)
        self.bad_steps.add(is_non_finite, self.step_skipped)
        self.ledger.append_step(
            optimizer_step=self.optimizer_steps,
            epoch=self.epoch_of_step(),
            updates=self.optimizer_steps - self.bad_steps.skipped,
            rates=self.rates,
            is_skipped=self.step_skipped,
            is_non_finite=is_non_finite,
        )
        wait_for_room(self.attempt, self.ledger.write_out, self.optimizer_steps, self.micro_batches, "step", self.rank)
        try:
            self.bad_steps.check_step(self.attempt, self.optimizer_steps, loss, self.step_skipped)
        except KwrapError:
            self.write_metrics()
            raise

    def epoch_of_step(self) -> int:
        """The epoch, from 0, that the last optimizer step belongs to."""
        return (self.optimizer_steps - 1) // self.count.optimizer_steps_per_epoch

    def write_metrics(self) -> None:
        """One line of metrics.jsonl, on rank 0, once the trainer has recorded the loss."""
        if self.metrics is None:
            return
        self.metrics.append(
            self.sums.metrics_line(
                self.attempt,
                self.optimizer_steps,
                epoch=self.epoch_of_step(),
                loss_average=float(self.loss_recorders[0].moving_average) if self.loss_recorders else math.nan,
                rates=dict(zip(self.rate_names, self.rates, strict=False)),
                skipped_images_loaded=int(self.dataset.images_loaded_too_early),
                optimizer_step_skipped=int(self.step_skipped),
                bad_steps_in_a_row=self.bad_steps.in_a_row,
            )
        )

    def unet_rate(self) -> float:
        """The UNet's learning rate; the first group's where there is no UNet."""
        for name, rate in zip(self.rate_names, self.rates, strict=False):
            if name == "lr_unet":
                return rate
        return self.rates[0] if self.rates else math.nan

    def require_seams(self) -> None:
        """Raise SilentSeam unless all that kwrap relies on was called by now."""
        missing = [seam for seam in SEAMS if seam not in self.fired]
        if missing:
            raise SilentSeam(
                f"sd-scripts never called: {', '.join(missing)}",
                "Train with a commit that kwrap supports: kwrap trainer show",
            )

    def saves_checkpoint_now(self) -> bool:
        """Whether the trainer writes a checkpoint after this optimizer step."""
        every = int(getattr(self.args, "save_every_n_steps", None) or 0)
        return every > 0 and self.optimizer_steps % every == 0

    def is_state_due(self) -> bool:
        return self.saves_checkpoint_now() and bool(getattr(self.args, "save_state", False))

    def save_state(self, scheduled: bool) -> None:
        """Write a state at the steps done; every rank calls it."""
        self.attempt.beat(self.rank, "saving", self.optimizer_steps, self.micro_batches)
        self.ledger.sync()
        self.accelerator.wait_for_everyone()
        if self.rank == 0:
            state = save_run_state(
                self.attempt,
                self.optimizer_steps,
                self.fill_state,
                scheduled=scheduled,
                extra=self.bad_steps.document(),
                expected_bytes=self.state_bytes,
            )
            print(f"saved {state.name}", flush=True)
        self.accelerator.wait_for_everyone()

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

    def close(self) -> None:
        self.ledger.close()
        if self.metrics is not None:
            self.metrics.close()


def rate_of(group: Mapping[str, Any]) -> float:
    """The rate of an optimizer's group; NaN where the optimizer finds it by itself."""
    return math.nan if group["lr"] is None else float(group["lr"])
