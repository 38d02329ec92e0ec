"""The builtin engine's training: one attempt of a run, exact to the bit wherever it starts."""

from __future__ import annotations

import math
import os
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed

from kohaku_wrap.errors import KwrapError
from kohaku_wrap.files import sha256_of_file
from kohaku_wrap.streams import seed_of
from kohaku_wrap.trainer.builtin_options import BuiltinOptions
from kohaku_wrap.training.data.columns import content_digest
from kohaku_wrap.training.data.loader import Example, iterate_examples, make_loader
from kohaku_wrap.training.data.order import order_digest
from kohaku_wrap.training.data.run_dataset import open_run_dataset
from kohaku_wrap.training.data.sampler import PositionSampler
from kohaku_wrap.training.data.tokens import CaptionTokenizer
from kohaku_wrap.training.data.torch_streams import seed_generators, step_seed
from kohaku_wrap.training.engines.builtin.loss import LossOfBatch
from kohaku_wrap.training.engines.builtin.models import load_base_model
from kohaku_wrap.training.engines.builtin.network import (
    create_network,
    create_optimizer,
    create_schedule,
    describe_groups,
    describe_training,
    save_network,
)
from kohaku_wrap.training.engines.builtin.state import Trained
from kohaku_wrap.training.engines.step_sums import StepSums, begin_ledger
from kohaku_wrap.training.records.attempts import Attempt, Outcome
from kohaku_wrap.training.records.bad_steps import BadSteps
from kohaku_wrap.training.records.loss_average import LossAverage
from kohaku_wrap.training.records.metrics import MetricsWriter
from kohaku_wrap.training.records.saving import save_run_state, wait_for_room
from kohaku_wrap.training.records.states import check_state_sizes, state_folder


class WrongProcesses(KwrapError):
    """accelerate joined another number of processes than the attempt was planned for."""

    def __init__(self, joined: int, planned: int) -> None:
        super().__init__(
            f"{joined} processes train together, the attempt is one of {planned}",
            "Start the run with `kwrap train` or `kwrap resume`, or give accelerate the same number.",
        )


class BuiltinRun:
    """One process of one attempt."""

    def __init__(self, attempt: Attempt, rank: int) -> None:
        self.attempt = attempt
        self.rank = rank
        self.optimizer_steps_done = attempt.start_optimizer_step
        self.micro_batches_done = 0
        self.total_optimizer_steps = attempt.lock.total_optimizer_steps
        self.rates: list[float] = []

    def prepare(self) -> None:
        """Load the model, make the network, and take up the attempt's state."""
        document = tomllib.loads(self.attempt.run.trainer_config.read_text(encoding="utf-8"))
        on_cpu = not torch.cuda.is_available()
        options = replace(BuiltinOptions.from_config(document, on_cpu), seed=self.attempt.lock.seed)
        self.options = options
        self.accelerator = Accelerator(
            gradient_accumulation_steps=self.attempt.accumulation,
            mixed_precision=options.mixed_precision,
            # Otherwise accelerate takes several processes without a GPU for several runs.
            cpu=on_cpu,
        )
        if self.accelerator.num_processes != self.attempt.processes:
            raise WrongProcesses(self.accelerator.num_processes, self.attempt.processes)
        self.make_deterministic()
        # accelerate and torchrun set handlers of their own.
        self.attempt.stop_on_signals()

        tokenizer = CaptionTokenizer.load(Path(options.tokenizer_cache_dir), options.max_token_length)
        self.dataset, _ = open_run_dataset(self.attempt, tokenizer)
        self.order = self.dataset.order
        model = load_base_model(Path(options.pretrained_model_name_or_path), Path(options.vae) if options.vae else None)
        seed_generators(seed_of("network", options.seed))
        self.network = create_network(model, options)
        self.loss_of_batch = LossOfBatch(model, options, self.accelerator, tokenizer.end_token_id)
        self.loss_of_batch.place_model()
        self.network.to(self.accelerator.device, torch.float32)
        optimizer = create_optimizer(self.network, options)
        schedule = create_schedule(optimizer, options, self.total_optimizer_steps)
        # The network is not prepared: gradients are averaged once an optimizer step, so nothing wraps it.
        self.network.prepare_grad_etc()
        optimizer, schedule = self.accelerator.prepare(optimizer, schedule)
        # One schedule step an optimizer step, on any number of processes.
        schedule.split_batches = True
        self.trained = Trained(self.network, optimizer, schedule, self.accelerator.scaler, LossAverage())
        self.rate_groups = describe_groups(self.network, optimizer)
        self.take_up_state()
        self.metadata = self.describe_run() if self.rank == 0 else {}
        self.bad_steps = BadSteps.at_start(self.attempt)
        self.ledger = begin_ledger(self.attempt, self.rank)
        self.metrics = MetricsWriter(self.attempt) if self.rank == 0 else None

    def make_deterministic(self) -> None:
        """Ask torch for the same bits each time; on a GPU only as far as its kernels allow."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.use_deterministic_algorithms(True, warn_only=self.accelerator.device.type != "cpu")
        torch.backends.cudnn.benchmark = False

    def take_up_state(self) -> None:
        """Load the attempt's state, or leave the fresh network as it is."""
        state = self.attempt.state
        if state is None:
            return
        check_state_sizes(state)
        self.trained.read(state)
        print(f"resumed from {state.name}", flush=True)

    def describe_run(self) -> dict[str, str]:
        """The metadata of every checkpoint of this run."""
        base = Path(self.options.pretrained_model_name_or_path)
        inputs = self.attempt.lock.tables.get("inputs", {})
        facts = {
            "ss_new_sd_model_hash": inputs.get("base_model_sha256") or sha256_of_file(base),
            "ss_num_train_images": self.attempt.lock.images,
            "ss_num_batches_per_epoch": self.order.batches,
            "ss_batch_size_per_device": self.attempt.lock.batch_per_gpu,
            "ss_gradient_accumulation_steps": self.attempt.accumulation,
            "ss_max_train_steps": self.total_optimizer_steps,
            "kwrap_run": self.attempt.run.name,
            "kwrap_captions_digest": self.dataset.columns.digest,
            "kwrap_effective_batch": self.attempt.lock.effective_batch,
        }
        return describe_training(self.options, facts)

    def train(self) -> Outcome:
        """Train to the last optimizer step, or to the one after which a stop was asked for."""
        count = self.order.count
        position = count.position_of(self.optimizer_steps_done, self.attempt.processes)
        sampler = PositionSampler(
            self.order, position.epoch, position.global_position, self.rank, self.attempt.processes
        )
        loader = make_loader(
            self.dataset,
            sampler,
            self.attempt.workers,
            self.options.persistent_data_loader_workers,
            self.options.seed,
        )
        epoch = position.epoch
        while self.optimizer_steps_done < self.total_optimizer_steps:
            sampler.set_epoch(epoch)
            self.network.train()
            sums = StepSums()
            for example in iterate_examples(loader):
                ends_step = (self.micro_batches_done + 1) % self.attempt.accumulation == 0
                self.train_micro_batch(example, sums, ends_step)
                if not ends_step:
                    continue
                if self.finish_step(epoch, sums):
                    return "stopped"
                sums = StepSums()
                if self.optimizer_steps_done == self.total_optimizer_steps:
                    break
            epoch += 1
            self.save_epoch(epoch)
        self.save_end()
        self.bad_steps.check_end(self.total_optimizer_steps)
        return "finished"

    def train_micro_batch(self, example: Example, sums: StepSums, ends_step: bool) -> None:
        """Add one batch's gradients, and step the optimizer where this ends its accumulation."""
        facts = example["kwrap"]
        epoch, position = facts["epoch"], facts["position"]
        optimizer_step = self.order.count.optimizer_step_of(epoch, position)
        self.accelerator.gradient_state._set_sync_gradients(ends_step)
        seed_generators(step_seed(self.options.seed, epoch, position))
        result = self.loss_of_batch(example)
        self.accelerator.backward(result.loss)
        rates = self.trained.schedule.get_last_lr()
        if ends_step:
            self.average_gradients()
            if self.options.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.network.get_trainable_params(), self.options.max_grad_norm)
        self.trained.optimizer.step()
        self.trained.schedule.step()
        self.trained.optimizer.zero_grad(set_to_none=True)

        loss = float(result.loss.detach())
        self.ledger.append(
            optimizer_step=optimizer_step,
            epoch=epoch,
            position=position,
            order_digest=order_digest(facts["image_ids"]),
            content_digest=content_digest(facts["content"], result.timesteps),
            loss=loss,
            learning_rate=rates[self.rate_groups.get("lr_unet", 0)],
            is_fill=facts["is_fill"],
            is_substitute=bool(facts["substituted"]),
        )
        self.micro_batches_done += 1
        self.attempt.beat(self.rank, "step", self.optimizer_steps_done, self.micro_batches_done)
        wait_for_room(
            self.attempt, self.ledger.write_out, self.optimizer_steps_done, self.micro_batches_done, "step", self.rank
        )
        sums.loss += loss
        sums.images += len(facts["image_ids"])
        sums.nan_latents += result.nan_latents
        sums.substitutes += len(facts["substituted"])
        self.rates = [float(rate) for rate in rates]

    def average_gradients(self) -> None:
        """Replace each gradient by its mean over the ranks, as sd-scripts' `all_reduce_network` does."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.accelerator.num_processes
        for gradient, part in zip(gradients, torch.split(flat, [each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def finish_step(self, epoch: int, sums: StepSums) -> bool:
        """Count the optimizer step, record it, save what is due; whether a stop was asked for."""
        done = self.optimizer_steps_done + 1
        stop = sums.sum_over_ranks(self.attempt, self.rank, self.accelerator.device)
        self.optimizer_steps_done = done
        self.record_step(epoch, sums)
        due = bool(self.options.save_every_n_steps) and done % (self.options.save_every_n_steps or 1) == 0
        if due:
            self.save_checkpoint(f"{self.options.output_name}-step{done:08d}", done)
            if self.options.save_state:
                self.save_state()
            self.remove_old_checkpoint(
                "-step{:08d}", done, self.options.save_every_n_steps, self.options.save_last_n_steps
            )
        stopping = stop and done < self.total_optimizer_steps
        if stopping:
            self.save_state(scheduled=False)
        return stopping

    def record_step(self, epoch: int, sums: StepSums) -> None:
        """Append the step to ledger and metrics and count what was wrong with it. Raises NonFiniteLoss."""
        done, loss = self.optimizer_steps_done, sums.mean_loss(self.attempt)
        is_skipped, is_non_finite = bool(self.accelerator.optimizer_step_was_skipped), not math.isfinite(loss)
        self.bad_steps.add(is_non_finite, is_skipped)
        self.ledger.append_step(
            optimizer_step=done,
            epoch=epoch,
            updates=done - self.bad_steps.skipped,
            rates=self.rates,
            is_skipped=is_skipped,
            is_non_finite=is_non_finite,
        )
        wait_for_room(self.attempt, self.ledger.write_out, done, self.micro_batches_done, "step", self.rank)
        average = self.trained.losses.add((done - 1) % self.order.count.optimizer_steps_per_epoch, loss)
        if self.metrics is not None:
            line = sums.metrics_line(
                self.attempt,
                done,
                epoch,
                average,
                {name: self.rates[group] for name, group in self.rate_groups.items()},
                self.dataset.images_loaded_too_early,
                optimizer_step_skipped=int(is_skipped),
                bad_steps_in_a_row=self.bad_steps.in_a_row,
            )
            self.metrics.append(line)
        self.bad_steps.check_step(self.attempt, done, loss, is_skipped)

    def save_checkpoint(self, name: str, optimizer_step: int) -> None:
        """Write the network's weights on rank 0; a full disk is waited out."""
        self.attempt.beat(self.rank, "saving", self.optimizer_steps_done, self.micro_batches_done)
        if self.rank == 0:
            epoch = -(-optimizer_step // self.order.count.optimizer_steps_per_epoch)
            facts = {
                "ss_steps": str(optimizer_step),
                "ss_epoch": str(epoch),
                "ss_training_finished_at": str(time.time()),
            }
            path = Path(self.options.output_dir) / f"{name}.safetensors"
            wait_for_room(
                self.attempt,
                lambda: save_network(self.network, path, self.options, self.metadata | facts),
                self.optimizer_steps_done,
                self.micro_batches_done,
            )
            print(f"saved {path.name}", flush=True)

    def remove_old_checkpoint(self, pattern: str, newest: int, every: int | None, span: int | None) -> None:
        """Remove the checkpoint that sd-scripts would remove after writing the one at `newest`."""
        if self.rank == 0 and every and span is not None:
            oldest = newest - span - 1 if "step" in pattern else newest - every * span
            oldest -= oldest % every
            if oldest > 0:
                name = f"{self.options.output_name}{pattern.format(oldest)}.safetensors"
                (Path(self.options.output_dir) / name).unlink(missing_ok=True)

    def save_state(self, scheduled: bool = True) -> None:
        """Write a state at the steps done, once."""
        done = self.optimizer_steps_done
        if state_folder(self.attempt.run.states, done).exists():
            return
        self.attempt.beat(self.rank, "saving", done, self.micro_batches_done)
        self.ledger.sync()
        self.accelerator.wait_for_everyone()
        if self.rank == 0:
            save_run_state(self.attempt, done, self.trained.write, scheduled=scheduled, extra=self.bad_steps.document())
        self.accelerator.wait_for_everyone()

    def save_epoch(self, epochs_done: int) -> None:
        """Save what is due after an epoch, except after the last one."""
        every = self.options.save_every_n_epochs
        if not every or epochs_done % every or self.optimizer_steps_done >= self.total_optimizer_steps:
            return
        self.save_checkpoint(f"{self.options.output_name}-{epochs_done:06d}", self.optimizer_steps_done)
        if self.options.save_state:
            self.save_state()
        self.remove_old_checkpoint("-{:06d}", epochs_done, every, self.options.save_last_n_epochs)

    def save_end(self) -> None:
        """Save the finished network under the run's name, and its state."""
        if self.options.save_state or self.options.save_state_on_train_end:
            self.save_state()
        self.save_checkpoint(self.options.output_name, self.optimizer_steps_done)

    def close(self) -> None:
        """Leave the other ranks in peace."""
        self.ledger.close()
        if self.metrics is not None:
            self.metrics.close()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
