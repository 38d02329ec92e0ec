"""The builtin engine's training: one attempt of a run, exact to the bit wherever it starts."""

from __future__ import annotations

import copy
import os
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed

from kohaku_wrap.file_hashes import sha256_of_file
from kohaku_wrap.streams import seed_of
from kohaku_wrap.trainer.builtin_options import BuiltinOptions
from kohaku_wrap.training.data.loader import Example, iterate_examples, make_loader
from kohaku_wrap.training.data.run_dataset import open_run_dataset
from kohaku_wrap.training.data.sampler import PositionSampler
from kohaku_wrap.training.data.tokens import CaptionTokenizer
from kohaku_wrap.training.data.torch_streams import seed_generators
from kohaku_wrap.training.engines.branching import take_up_branch
from kohaku_wrap.training.engines.builtin.loss import LossOfBatch
from kohaku_wrap.training.engines.builtin.models import load_base_model
from kohaku_wrap.training.engines.builtin.network import (
    create_network,
    create_optimizer,
    describe_groups,
    describe_training,
    save_network,
)
from kohaku_wrap.training.engines.builtin.schedule import create_schedule
from kohaku_wrap.training.engines.builtin.state import Trained, read_optimizer
from kohaku_wrap.training.engines.interface import Engine
from kohaku_wrap.training.engines.schedule import take_up_schedule
from kohaku_wrap.training.engines.step_sums import StepSums
from kohaku_wrap.training.engines.validating import Validation
from kohaku_wrap.training.records.attempts import Outcome
from kohaku_wrap.training.records.loss_average import LossAverage
from kohaku_wrap.training.records.networks import EPOCH_ENDING, STEP_ENDING, without_idle
from kohaku_wrap.training.records.states import check_state_sizes


class BuiltinRun(Engine):
    """One process of one attempt."""

    options: BuiltinOptions

    def prepare(self) -> None:
        """Load the model, make the network, and take up the attempt's state."""
        document = tomllib.loads(self.attempt.run.trainer_config.read_text(encoding="utf-8"))
        on_cpu = not torch.cuda.is_available()
        options = replace(BuiltinOptions.from_config(document, on_cpu), seed=self.seed)
        self.options = options
        accelerator = Accelerator(
            gradient_accumulation_steps=self.attempt.accumulation,
            mixed_precision=options.mixed_precision,
            # Otherwise accelerate takes several processes without a GPU for several runs.
            cpu=on_cpu,
        )
        self.accept_accelerator(accelerator)
        self.make_deterministic()

        tokenizer = CaptionTokenizer.load(Path(options.tokenizer_cache_dir), options.max_token_length)
        self.dataset, _ = open_run_dataset(self.attempt, tokenizer)
        model = load_base_model(Path(options.pretrained_model_name_or_path), Path(options.vae) if options.vae else None)
        seed_generators(seed_of("network", options.seed))
        self.network = create_network(model, options)
        self.loss_of_batch = LossOfBatch(model, options, self.accelerator, tokenizer.end_token_id)
        self.loss_of_batch.place_model()
        self.network.to(self.accelerator.device, torch.float32)
        optimizer = create_optimizer(self.network, options)
        schedule = create_schedule(optimizer, options, self.attempt.lock.cycle)
        # The network is not prepared: gradients are averaged once an optimizer step, so nothing wraps it.
        self.network.prepare_grad_etc()
        optimizer, schedule = self.accelerator.prepare(optimizer, schedule)
        # One schedule step an optimizer step, on any number of processes.
        schedule.split_batches = True
        self.optimizer = optimizer
        self.trained = Trained(self.network, optimizer, schedule, self.accelerator.scaler, LossAverage())
        self.rate_groups = describe_groups(self.network, optimizer)
        self.take_up_state()
        self.metadata = self.describe_run() if self.rank == 0 else {}
        self.validation = Validation.of(
            self.attempt, self.rank, accelerator.device, self.dataset, options.mixed_precision
        )

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
        schedule = self.trained.schedule.scheduler
        if self.attempt.begins_branch:
            self.take_up_parent(state, schedule)
        else:
            fresh = copy.deepcopy(schedule.state_dict())
            self.trained.read(state)
            take_up_schedule(schedule, fresh, self.attempt)
        print(f"resumed from {state.name}", flush=True)

    def take_up_parent(self, state: Path, schedule: Any) -> None:
        """Begin a branch from its parent's state."""
        self.trained.read_network(state)
        take_up_branch(self.optimizer, schedule, read_optimizer(state), self.attempt, self.rank, self.rate_groups)
        self.trained.read_scaler(state)
        if self.optimizer_steps:
            self.trained.read_losses(state)

    def describe_run(self) -> dict[str, str]:
        """The metadata of every checkpoint of this run."""
        base = Path(self.options.pretrained_model_name_or_path)
        inputs = self.attempt.lock.table("inputs")
        facts = {
            "ss_new_sd_model_hash": inputs.get("base_model_sha256") or sha256_of_file(base),
            "ss_num_train_images": self.attempt.lock.images,
            "ss_num_batches_per_epoch": self.count.batches,
            "ss_batch_size_per_device": self.attempt.lock.batch_per_gpu,
            "ss_gradient_accumulation_steps": self.attempt.accumulation,
            "ss_max_train_steps": self.total_optimizer_steps,
            "kwrap_run": self.attempt.run.name,
            "kwrap_captions_digest": self.dataset.columns.digest,
            "kwrap_effective_batch": self.attempt.lock.effective_batch,
        }
        if parent := self.attempt.lock.parent_network:
            facts["kwrap_trained_on_from"] = parent
        return without_idle(describe_training(self.options, facts), self.attempt.lock)

    def train(self) -> Outcome:
        """Train to the last optimizer step, or to the one after which a stop was asked for."""
        self.prepare()
        outcome = self.train_epochs()
        # Leave the other ranks in peace.
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return outcome

    def train_epochs(self) -> Outcome:
        """From the attempt's start; the finished network is saved under the run's name."""
        start = self.attempt.start
        sampler = PositionSampler(
            self.dataset.order, start.epoch, start.global_position, self.rank, self.attempt.processes
        )
        persistent = self.options.persistent_data_loader_workers
        loader = make_loader(self.dataset, sampler, self.attempt.workers, persistent, self.seed)
        epoch = start.epoch
        self.validate_if_due()
        while self.optimizer_steps < self.total_optimizer_steps:
            sampler.set_epoch(epoch)
            self.network.train()
            for example in iterate_examples(loader):
                ends_step = (self.micro_batches + 1) % self.attempt.accumulation == 0
                self.train_micro_batch(example, ends_step)
                if ends_step and self.finish_step():
                    return "stopped"
                if self.is_last_step:
                    break
            epoch += 1
            if self.finish_epoch(epoch):
                return "stopped"
        self.save_checkpoint(self.options.output_name, self.optimizer_steps)
        return "finished"

    def train_micro_batch(self, example: Example, ends_step: bool) -> None:
        """Add one batch's gradients, and step the optimizer where this ends its accumulation."""
        self.accelerator.gradient_state._set_sync_gradients(ends_step)
        self.begin_micro_batch(example["kwrap"])
        result = self.loss_of_batch(example)
        self.accelerator.backward(result.loss)
        if ends_step:
            self.average_gradients()
            if self.options.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.network.get_trainable_params(), self.options.max_grad_norm)
        self.trained.optimizer.step()
        self.trained.schedule.step()
        self.trained.optimizer.zero_grad(set_to_none=True)
        self.record_micro_batch(example["kwrap"], float(result.loss.detach()), result.timesteps, result.nan_latents)

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

    def finish_step(self) -> bool:
        """Count the optimizer step and save what is due within an epoch; whether to stop."""
        self.end_step()
        self.write_metrics()
        self.sums = StepSums()
        self.validate_if_due()
        options, done = self.options, self.optimizer_steps
        if self.is_checkpoint_due:
            self.save_checkpoint(options.output_name + STEP_ENDING.format(done), done)
            self.remove_old_checkpoint(STEP_ENDING, done, options.save_every_n_steps, options.save_last_n_steps)
        return self.micro_batch_of_epoch > 0 and not self.is_last_step and self.save_if_due()

    def list_models(self) -> list[torch.nn.Module]:
        model = self.loss_of_batch.model
        return [model.unet, model.vae, *model.text_encoders, self.network]

    def measure_posts(self, batch: dict[str, Any], ids: list[int], timesteps: tuple[int, ...]) -> torch.Tensor:
        return self.loss_of_batch.measure(batch, ids, timesteps, self.loss_of_batch.scheduler)

    def average_loss(self, loss: float) -> float:
        """Over the last epoch's worth of steps, as sd-scripts counts it."""
        return self.trained.losses.add((self.optimizer_steps - 1) % self.count.optimizer_steps_per_epoch, loss)

    def fill_state(self, folder: Path) -> None:
        self.trained.write(folder)

    def save_checkpoint(self, name: str, optimizer_step: int) -> None:
        """Write the network's weights on rank 0; a full disk is waited out."""
        self.beat("saving")
        if self.rank == 0:
            epoch = -(-optimizer_step // self.count.optimizer_steps_per_epoch)
            facts = {
                "ss_steps": str(optimizer_step),
                "ss_epoch": str(epoch),
                "ss_training_finished_at": str(time.time()),
            }
            path = Path(self.options.output_dir) / f"{name}.safetensors"
            self.save_checkpoint_file(
                path, lambda: save_network(self.network, path, self.options, self.metadata | facts)
            )
            print(f"saved {path.name}", flush=True)

    def remove_old_checkpoint(self, pattern: str, newest: int, every: int | None, span: int | None) -> None:
        """Remove the checkpoint that sd-scripts would remove after writing the one at `newest`."""
        if self.rank == 0 and every and span is not None:
            oldest = newest - span - 1 if pattern == STEP_ENDING else newest - every * span
            oldest -= oldest % every
            if oldest > 0:
                name = f"{self.options.output_name}{pattern.format(oldest)}.safetensors"
                (Path(self.options.output_dir) / name).unlink(missing_ok=True)

    def finish_epoch(self, epochs_done: int) -> bool:
        """Save what is due after an epoch, a checkpoint not after the last one; whether to stop."""
        options, every = self.options, self.options.save_every_n_epochs
        if every and epochs_done % every == 0 and not self.is_last_step:
            self.save_checkpoint(options.output_name + EPOCH_ENDING.format(epochs_done), self.optimizer_steps)
            self.remove_old_checkpoint(EPOCH_ENDING, epochs_done, every, options.save_last_n_epochs)
        return self.save_if_due(epochs_done)
