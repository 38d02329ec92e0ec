"""The one interface of the engines: what an engine must offer, and what it may call while it trains.

What a micro-batch and an optimizer step leave behind (ledger, metrics, signs of life, states) is written here alone.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.training.data.columns import content_digest
from kohaku_wrap.training.data.order import order_digest
from kohaku_wrap.training.data.torch_streams import seed_generators, step_seed
from kohaku_wrap.training.engines.devices import WrongProcesses, require_gpus
from kohaku_wrap.training.engines.step_sums import StepSums, begin_ledger
from kohaku_wrap.training.engines.validating import Validation, leaving_no_trace
from kohaku_wrap.training.records.attempts import Attempt, Outcome
from kohaku_wrap.training.records.bad_steps import BadSteps, check_gradients, check_weights
from kohaku_wrap.training.records.evaluations import write_evaluation
from kohaku_wrap.training.records.metrics import MetricsWriter
from kohaku_wrap.training.records.networks import note_network
from kohaku_wrap.training.records.saving import save_run_state, wait_for_room
from kohaku_wrap.training.records.signs import Phase

LONGEST_WRITE_SECONDS = 1.0
"""Writing the ledger's records takes far less; more is a pause for want of room."""


class OutOfOrder(KwrapError):
    """A batch came at another position than the order says."""


class Engine(ABC):
    """One process of one attempt.

    An engine gives the values below and the abstract methods. In its loop it calls `accept_accelerator` once,
    `validate_if_due` before the first micro-batch, `begin_micro_batch` and `record_micro_batch` for each micro-batch,
    after the last one of an optimizer step `end_step`, `write_metrics`, `validate_if_due` and `save_if_due`, and
    `save_checkpoint_file` for each checkpoint.
    """

    options: Any
    """sd-scripts' options by name, of them `save_every_n_steps`, `save_every_n_epochs`, `save_state` and
    `save_state_on_train_end`."""

    optimizer: Any
    """Whose `param_groups` hold the rates."""

    dataset: Any
    """Counts in `images_loaded_too_early` what a resume loads in vain."""

    rate_groups: Mapping[str, int]
    """The optimizer's group behind each name of a rate in the metrics."""

    validation: Validation | None = None
    """Of held-out posts, where the run has some."""

    gradient_norm: Any = None
    """Of the latest optimizer step's gradients before they were clipped, as a tensor; None where none are."""

    state_bytes: int = 0
    """Size that the next state will have at least, where the states of the run do not tell."""

    def __init__(self, attempt: Attempt, rank: int) -> None:
        require_gpus(attempt)
        self.attempt = attempt
        self.rank = rank
        self.seed = attempt.lock.seed
        self.count = attempt.lock.count
        self.total_optimizer_steps = attempt.lock.total_optimizer_steps
        self.optimizer_steps = attempt.start_optimizer_step
        self.micro_batches = 0
        self.rates: list[float] = []
        self.decays: list[float | None] = []
        self.sums = StepSums()
        self.step_skipped = False
        self.stopping = False
        self.saved_step = -1
        self.accelerator: Any = None
        self.bad_steps = BadSteps.at_start(attempt)
        self.ledger = begin_ledger(attempt, rank)
        self.metrics = MetricsWriter(attempt) if rank == 0 else None

    # What an engine must offer.

    @abstractmethod
    def train(self) -> Outcome:
        """Train to the last optimizer step, or to the one after which a stop was asked for."""

    @abstractmethod
    def fill_state(self, folder: Path) -> None:
        """Write all that changes while training into an empty folder; called on rank 0."""

    @abstractmethod
    def average_loss(self, loss: float) -> float:
        """The moving average of the loss with that of the step in it; called once an optimizer step."""

    @abstractmethod
    def list_models(self) -> list[torch.nn.Module]:
        """All modules that take part in a loss."""

    @abstractmethod
    def measure_posts(self, batch: dict[str, Any], ids: list[int], timesteps: tuple[int, ...]) -> torch.Tensor:
        """(posts, time steps) on the CPU: the loss of each post without weights, by the conventions of training.

        Noise and the sample of the latents follow from the post alone, see `draw_normals`.
        """

    # What it may call.

    def accept_accelerator(self, accelerator: Any) -> None:
        """Take the engine's accelerator, and the norm of the gradients that it clips. Raises WrongProcesses."""
        self.accelerator = accelerator
        clip = accelerator.clip_grad_norm_

        def clip_and_keep(*arguments: Any, **keywords: Any) -> Any:
            self.gradient_norm = clip(*arguments, **keywords)
            return self.gradient_norm

        accelerator.clip_grad_norm_ = clip_and_keep
        # accelerate and torchrun set handlers of their own.
        self.attempt.stop_on_signals()
        if accelerator.num_processes != self.attempt.processes:
            raise WrongProcesses(accelerator.num_processes, self.attempt.processes)

    @contextmanager
    def apart(self, phase: Phase) -> Iterator[None]:
        """A time that counts to no optimizer step, with a sign of life before it."""
        self.beat(phase)
        begun = time.monotonic()
        yield
        self.sums.add_apart(phase, time.monotonic() - begun)

    @property
    def is_last_step(self) -> bool:
        """Whether every optimizer step is done."""
        return self.optimizer_steps >= self.total_optimizer_steps

    @property
    def epoch_of_step(self) -> int:
        """The epoch, from 0, that the last optimizer step belongs to."""
        return (self.optimizer_steps - 1) // self.count.optimizer_steps_per_epoch

    @property
    def micro_batch_of_epoch(self) -> int:
        """Micro-batches of the present epoch that this process has done, of earlier attempts too."""
        done = self.attempt.start.micro_batch + self.micro_batches
        return done % self.count.micro_batches_per_process(self.attempt.processes)

    def beat(self, phase: Phase) -> None:
        """Leave a sign of life."""
        self.attempt.beat(self.rank, phase, self.optimizer_steps, self.micro_batches)

    def begin_micro_batch(self, facts: Mapping[str, Any]) -> None:
        """Note the rates and seed all that is drawn for the batch with these facts (`kwrap` of its example).

        Raises OutOfOrder.
        """
        expected = self.micro_batch_of_epoch * self.attempt.processes + self.rank
        if facts["position"] != expected:
            raise OutOfOrder(
                f"rank {self.rank} got position {facts['position']} of epoch {facts['epoch']}, expected {expected}",
                "This is a fault of kwrap: please report it with the versions that `kwrap doctor` prints.",
            )
        if not self.micro_batches:
            # Loading the models is no part of the first step.
            self.sums.started = time.monotonic() - sum(self.sums.apart.values())
        seed_generators(step_seed(self.seed, facts["epoch"], facts["position"]))
        # None where the optimizer finds its rate by itself.
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.rates = [math.nan if rate is None else float(rate) for rate in rates]
        self.decays = [group.get("weight_decay") for group in self.optimizer.param_groups]

    def name_rates(self) -> dict[str, float]:
        """The rates of the step by their names in the metrics."""
        return {name: self.rates[group] for name, group in self.rate_groups.items()}

    def name_decays(self) -> dict[str, float]:
        """The weight decay of the step by the names of the rates; none where the optimizer has none."""
        named = ((name.replace("lr_", "weight_decay_", 1), self.decays[at]) for name, at in self.rate_groups.items())
        return {name: float(decay) for name, decay in named if decay is not None}

    def record_micro_batch(
        self, facts: Mapping[str, Any], loss: float, timesteps: Sequence[int], nan_latents: int
    ) -> None:
        """Append what was trained to the ledger and to the step's sums."""
        first_rate = self.rates[0] if self.rates else math.nan
        self.ledger.append(
            optimizer_step=self.count.optimizer_step_of(facts["epoch"], facts["position"]),
            epoch=facts["epoch"],
            position=facts["position"],
            order_digest=order_digest(facts["image_ids"]),
            content_digest=content_digest(facts["content"], timesteps),
            loss=loss,
            learning_rate=self.name_rates().get("lr_unet", first_rate),
            is_fill=facts["is_fill"],
            is_substitute=bool(facts["substituted"]),
        )
        self.micro_batches += 1
        self.beat("step")
        self.write_ledger()
        self.sums.loss += loss
        self.sums.images += len(facts["image_ids"])
        self.sums.nan_latents += nan_latents
        self.sums.substitutes += len(facts["substituted"])

    def write_ledger(self) -> None:
        """Hand the ledger's records to the system; a full disk is waited out."""
        begun = time.monotonic()
        wait_for_room(self.attempt, self.ledger.write_out, self.optimizer_steps, self.micro_batches, "step", self.rank)
        if (waited := time.monotonic() - begun) > LONGEST_WRITE_SECONDS:
            self.sums.add_apart("paused", waited)

    def end_step(self) -> None:
        """Count the optimizer step just made, record it, and ask whether to stop.

        Raises NonFiniteLoss or TooManyBadSteps, after the step's line of metrics and before anything is saved.
        """
        self.stopping |= self.sums.sum_over_ranks(self.attempt, self.rank, self.accelerator.device)
        self.optimizer_steps += 1
        self.step_skipped = bool(self.accelerator.optimizer_step_was_skipped)
        loss = self.sums.mean_loss(self.attempt)
        is_non_finite = not math.isfinite(loss)
        self.bad_steps.add(is_non_finite, self.step_skipped)
        self.ledger.append_step(
            optimizer_step=self.optimizer_steps,
            epoch=self.epoch_of_step,
            updates=self.optimizer_steps - self.bad_steps.skipped,
            rates=self.rates,
            is_skipped=self.step_skipped,
            is_non_finite=is_non_finite,
        )
        self.write_ledger()
        try:
            self.bad_steps.check_step(self.attempt, self.optimizer_steps, loss, self.step_skipped)
            if self.gradient_norm is not None and not self.step_skipped:
                check_gradients(self.attempt, self.optimizer_steps, float(self.gradient_norm))
            if self.may_save:
                check_weights(self.attempt, self.optimizer_steps, self.has_finite_weights())
        except KwrapError:
            self.write_metrics()
            raise

    def validate_if_due(self) -> None:
        """Measure the held-out posts where it is time to, once, and keep what came out; every rank calls it."""
        validation = self.validation
        if validation is None or not validation.is_due(self.optimizer_steps, self.is_last_step):
            return
        with self.apart("validating"), leaving_no_trace(self.list_models(), validation.device):
            found = validation.measure(self.optimizer_steps, self.measure_posts, lambda: self.beat("validating"))
        if self.rank == 0:
            wait_for_room(
                self.attempt,
                lambda: write_evaluation(self.attempt.run, found),
                self.optimizer_steps,
                self.micro_batches,
            )
            print(f"held-out loss {found.loss} after optimizer step {self.optimizer_steps}", flush=True)

    def write_metrics(self) -> None:
        """The step's line of metrics.jsonl, on rank 0; counts of faults stand there only where there are any."""
        sums, loss = self.sums, self.sums.mean_loss(self.attempt)
        average = self.average_loss(loss)
        if self.metrics is None:
            return
        wrong = {
            "nan_latents": sums.nan_latents,
            "substitutes": sums.substitutes,
            "optimizer_step_skipped": int(self.step_skipped),
            "bad_steps_in_a_row": self.bad_steps.in_a_row,
        }
        self.metrics.append(
            {
                "optimizer_step": self.optimizer_steps,
                "epoch": self.epoch_of_step,
                "micro_batch": self.optimizer_steps * self.attempt.accumulation,
                "loss": loss,
                "loss_average": average,
                **self.name_rates(),
                **self.name_decays(),
                "seconds": round(sums.seconds, 4),
                **{f"{kind}_seconds": round(seconds, 4) for kind, seconds in sums.apart.items()},
                "images": sums.images,
                "skipped_images_loaded": int(self.dataset.images_loaded_too_early),
                **{name: count for name, count in wrong.items() if count},
            }
        )

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether a checkpoint is written after this optimizer step."""
        every = self.options.save_every_n_steps
        return bool(every) and self.optimizer_steps % every == 0

    @property
    def may_save(self) -> bool:
        """Whether a network or a state may be written before the next optimizer step."""
        ends_epoch = self.optimizer_steps % self.count.optimizer_steps_per_epoch == 0
        return self.is_checkpoint_due or self.stopping or self.is_last_step or ends_epoch

    def has_finite_weights(self) -> bool:
        """Whether every trained weight is a number: a gradient can be none where the loss was one."""
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        return bool(torch.stack([weight.detach().isfinite().all() for weight in weights]).all())

    def is_state_due(self, epochs_done: int | None) -> bool:
        """Whether a state is written after this optimizer step."""
        options = self.options
        if epochs_done is not None and self.is_last_step:
            return bool(options.save_state or options.save_state_on_train_end)
        every = options.save_every_n_epochs
        at_epoch = bool(every) and epochs_done is not None and epochs_done % every == 0
        return bool(options.save_state) and (self.is_checkpoint_due or at_epoch)

    def save_if_due(self, epochs_done: int | None = None) -> bool:
        """Save the state that is due now, or asked for with a stop; whether to stop before the last step.

        After the last step of an epoch it is called once the epoch's checkpoint is there, with `epochs_done`: a state
        before it would lose that checkpoint in a crash.
        """
        stops = self.stopping and not self.is_last_step
        due = self.is_state_due(epochs_done)
        if due or stops:
            self.save_state(scheduled=due)
        return stops

    def save_state(self, scheduled: bool) -> None:
        """Write a state at the steps done, once; every rank calls it."""
        if self.saved_step == self.optimizer_steps:
            return
        self.saved_step = self.optimizer_steps
        with self.apart("saving"):
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

    def save_checkpoint_file(self, path: Path, write: Callable[[], object]) -> None:
        """Let `write` make the network at `path`, again while the disk is full, and keep its sha256; on rank 0."""
        with self.apart("saving"):
            for act in (write, lambda: note_network(self.attempt, path)):
                wait_for_room(self.attempt, act, self.optimizer_steps, self.micro_batches)

    def close(self) -> None:
        """End the files of the records."""
        self.ledger.close()
        if self.metrics is not None:
            self.metrics.close()
