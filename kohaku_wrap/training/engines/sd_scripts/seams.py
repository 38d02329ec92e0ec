"""Where kwrap puts itself into sd-scripts: its accelerator, its scheduler, its states, its trainer's methods."""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import sdxl_train_network
import torch
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from torch.utils.data import DataLoader, RandomSampler

import kohaku_wrap
from kohaku_wrap.files import fsync_folder
from kohaku_wrap.formats.machine_paths import without_paths
from kohaku_wrap.streams import seed_of
from kohaku_wrap.trainer.anchors import LOOP, TRAINER
from kohaku_wrap.trainer.checkout import Checkout
from kohaku_wrap.trainer.corrections import correct_loop
from kohaku_wrap.training.data.loader import DeliveredErrors, quieten_worker
from kohaku_wrap.training.data.moments import holds_moments, sample_moments
from kohaku_wrap.training.engines.branching import take_up_branch
from kohaku_wrap.training.engines.schedule import options_of_cycle, take_up_schedule
from kohaku_wrap.training.engines.sd_scripts.cpu_processes import leave_frozen_modules
from kohaku_wrap.training.engines.sd_scripts.dataset import EpochSampler, KwrapDataset, TrainersOwnDataset
from kohaku_wrap.training.engines.sd_scripts.foreign import convert_schedule
from kohaku_wrap.training.engines.sd_scripts.loop import Loop
from kohaku_wrap.training.engines.sd_scripts.measuring import NOISE_FUNCTION, Measuring, noise_of_posts
from kohaku_wrap.training.engines.sd_scripts.objects import find_object, named, replace_object
from kohaku_wrap.training.records.networks import without_idle
from kohaku_wrap.training.records.samples import collect_trainer_pictures
from kohaku_wrap.training.records.states import check_state_sizes

OPTIMIZER_FILE, SCALER_FILE = "optimizer.bin", "scaler.pt"
"""accelerate's names within a state."""

TAG_TABLE = "ss_tag_frequency"


def install_seams(loop: Loop, checkout: Checkout) -> None:
    """Correct the trainer's loop and replace what its modules look up; its files stay as they are."""
    trainer = find_object(TRAINER)
    module = sys.modules[trainer.__module__]
    setattr(module, LOOP, loop)
    corrected = correct_loop(checkout.path, checkout.name)
    methods: dict[str, Any] = {}
    exec(compile(corrected, str(module.__file__), "exec"), module.__dict__, methods)
    for name, method in methods.items():
        setattr(trainer, name, method)
    replace_object(Accelerator, make_accelerator_class(leave_frozen_modules(Accelerator), loop))
    for name, make in (
        ("LossRecorder", make_recorder_class),
        ("get_scheduler_fix", schedule_for_one_process),
        (NOISE_FUNCTION, lambda draw_noise, loop: noise_of_posts(draw_noise, lambda: loop.measuring)),
    ):
        replace_object(find_object(name), make(find_object(name), loop))
    # kwrap writes its own states, sealed, at the end of the micro-batch.
    for name in ("save_and_remove_state_stepwise", "save_and_remove_state_on_epoch_end", "save_state_on_train_end"):
        replace_object(find_object(name), write_no_state)


def write_no_state(*_arguments: Any, **_keywords: Any) -> None:
    """Stands where the trainer would write a state in place under its final name."""


def schedule_for_one_process(make_schedule: Callable[..., Any], loop: Loop) -> Callable[..., Any]:
    """The trainer's schedule, counted in optimizer steps on any number of processes."""

    def make(*arguments: Any, **keywords: Any) -> Any:
        loop.fired.add("scheduler")
        given = named(make_schedule, arguments, keywords)
        args = argparse.Namespace(**vars(given["args"]) | options_of_cycle(loop.attempt.lock.cycle))
        return make_schedule(**given | {"num_processes": 1, "args": args})

    return make


def make_recorder_class(base: Any, loop: Loop) -> Any:
    """The trainer's loss recorder, taken up where the state left it."""

    class LossRecorder(base):  # type: ignore[misc]  # sd-scripts has no type information
        def __init__(self) -> None:
            super().__init__()
            loop.fired.add("loss recorder")
            number = len(loop.loss_recorders)
            if number < len(loop.losses_of_state):
                kept = loop.losses_of_state[number]
                self.loss_list, self.loss_total = list(kept["loss_list"]), kept["loss_total"]
            loop.loss_recorders.append(self)

    return LossRecorder


def make_accelerator_class(base: Any, loop: Loop) -> Any:
    """accelerate's own class with kwrap's loader and states."""

    class KwrapAccelerator(base):  # type: ignore[misc]  # taken from sd-scripts' module at run time
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            loop.fired.add("accelerator")
            loop.accept_accelerator(self)

        def prepare(self, *objects: Any, **keywords: Any) -> Any:
            swapped = [swap_loader(each, loop) if is_training_loader(each) else each for each in objects]
            prepared = super().prepare(*swapped, **keywords)
            for each in prepared if isinstance(prepared, tuple) else (prepared,):
                if isinstance(each, AcceleratedScheduler):
                    each.split_batches = True
                    loop.optimizer = each.optimizers[0]
                    names = name_rates(loop.network, loop.options, len(loop.optimizer.param_groups))
                    loop.rate_groups = {name: group for group, name in enumerate(names)}
            return prepared

        def load_state(self, input_dir: str, *arguments: Any, **keywords: Any) -> None:
            state = Path(input_dir)
            if not loop.attempt.foreign:
                check_state_sizes(state)
            fresh = [copy.deepcopy(each.scheduler.state_dict()) for each in self._schedulers]
            if loop.attempt.begins_branch:
                with self.lent(_optimizers=[], _schedulers=[], scaler=self.scaler_of(state)):
                    super().load_state(input_dir, *arguments, **keywords)
            else:
                super().load_state(input_dir, *arguments, **keywords)
            # Restored on rank 0 alone: the ranks would disagree about where an accumulation ends.
            self.step = 0
            if loop.optimizer_steps or not loop.attempt.begins_branch:
                loop.read_losses(state)
            loop.state_bytes = sum(path.stat().st_size for path in state.iterdir() if path.is_file())
            if loop.attempt.foreign:
                for schedule in self._schedulers:
                    convert_schedule(schedule.scheduler, loop.attempt.start_optimizer_step)
            if loop.attempt.begins_branch:
                saved = torch.load(state / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
                schedule = self._schedulers[0].scheduler if self._schedulers else None
                take_up_branch(self._optimizers[0], schedule, saved, loop.attempt, loop.rank, loop.rate_groups)
            else:
                for schedule, before in zip(self._schedulers, fresh, strict=True):
                    take_up_schedule(schedule.scheduler, before, loop.attempt)
            print(f"resumed from {state.name}", flush=True)

        @contextmanager
        def lent(self, **others: Any) -> Iterator[None]:
            """Let accelerate load a state as if it had these in place of its own."""
            own = {name: getattr(self, name) for name in others}
            self.__dict__.update(others)
            try:
                yield
            finally:
                self.__dict__.update(own)

        def scaler_of(self, state: Path) -> Any:
            """Its scaler of gradients where the state has one to load."""
            return self.scaler if (state / SCALER_FILE).is_file() else None

    return KwrapAccelerator


def is_training_loader(candidate: Any) -> bool:
    """Whether it is the trainer's loader of training batches, known by its collator and its shuffle."""
    return (
        isinstance(candidate, DataLoader)
        and isinstance(candidate.collate_fn, find_object("collator_class"))
        and isinstance(candidate.sampler, RandomSampler)
    )


def swap_loader(loader: Any, loop: Loop) -> DataLoader[Any]:
    """The same loader with kwrap's order and keys; its own seed is not drawn from the global generator."""
    loop.fired.add("data loader")
    start = loop.attempt.start
    if isinstance(loader.dataset, KwrapDataset):
        dataset: Any = loader.dataset
    else:
        dataset = TrainersOwnDataset(loader.dataset, loop.seed, loop.count, (start.epoch, start.global_position))
    loop.dataset = dataset
    loop.fired.add("dataset")
    sampler = EpochSampler(
        dataset.order,
        start.epoch,
        start.global_position,
        loader.collate_fn.current_epoch,
        on_epoch=lambda: loop.fired.add("sampler"),
    )
    return DataLoader(
        DeliveredErrors(dataset),
        batch_size=1,
        sampler=sampler,
        collate_fn=itemgetter(0),
        num_workers=loader.num_workers,
        persistent_workers=loader.persistent_workers,
        worker_init_fn=quieten_worker,
        generator=torch.Generator().manual_seed(seed_of("loader", loop.seed)),
    )


class KwrapTrainer(sdxl_train_network.SdxlNetworkTrainer):  # type: ignore[misc]  # sd-scripts has no type information
    """sd-scripts' own trainer for SDXL networks, telling the loop what it does."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop

    def post_process_network(self, *arguments: Any, **keywords: Any) -> None:
        """Have the network's checkpoints written whole or not at all, without tables of tags."""
        super().post_process_network(*arguments, **keywords)
        network = named(super().post_process_network, arguments, keywords)["network"]
        self.loop.fired.add("network")
        self.loop.network = network
        network.save_weights = whole_checkpoints(network.save_weights, self.loop)

    def on_step_start(self, *arguments: Any, **keywords: Any) -> None:
        """Seed noise and time steps by position; raises what the dataset met with this batch."""
        given = named(super().on_step_start, arguments, keywords)
        if given["is_train"]:
            self.loop.start_micro_batch(given["batch"])
        super().on_step_start(*arguments, **keywords)

    def encode_images_to_latents(self, *arguments: Any, **keywords: Any) -> Any:
        """Encode a part of a batch, or draw from mean and deviation where these are cached."""
        images = named(super().encode_images_to_latents, arguments, keywords)["images"]
        if holds_moments(images):
            latents = sample_moments(images)
        else:
            latents = super().encode_images_to_latents(*arguments, **keywords)
        self.loop.note_latents(latents)
        return latents

    def get_noise_pred_and_target(self, *arguments: Any, **keywords: Any) -> Any:
        result = super().get_noise_pred_and_target(*arguments, **keywords)
        if named(super().get_noise_pred_and_target, arguments, keywords)["is_train"]:
            self.loop.note_timesteps(result[2])
        return result

    def process_batch(self, *arguments: Any, **keywords: Any) -> Any:
        given = named(super().process_batch, arguments, keywords)
        if given["is_train"] and self.loop.measuring is None:
            self.loop.begin_measuring(Measuring(super().process_batch, given))
        cached = given["batch"].get("latents")
        if cached is not None:
            # They were encoded before the loop, or lie on the disk.
            self.loop.note_latents(cached)
            if isinstance(self.loop.dataset, KwrapDataset):
                given["batch"]["latents"] = torch.nan_to_num(cached.float(), nan=0.0)
        loss = super().process_batch(*arguments, **keywords)
        if given["is_train"]:
            self.loop.note_loss(loss)
        return loss

    def post_process_loss(self, *arguments: Any, **keywords: Any) -> Any:
        """The weights of time steps; of measured posts the losses before them are kept."""
        if self.loop.measuring is not None and self.loop.measuring.fixed is not None:
            self.loop.measuring.losses = named(super().post_process_loss, arguments, keywords)["loss"].detach()
        return super().post_process_loss(*arguments, **keywords)

    def sample_images(self, *arguments: Any, **keywords: Any) -> None:
        """Sample as the trainer does, but not "at first" again after a resume; then end the epoch."""
        loop, given = self.loop, named(super().sample_images, arguments, keywords)
        at_first = given["epoch"] == 0
        if given["args"].sample_prompts and not (at_first and loop.optimizer_steps):
            with loop.apart("sampling"):
                super().sample_images(*arguments, **keywords)
                try:
                    collect_trainer_pictures(loop.attempt.run)
                except OSError as error:
                    print(f"pictures stay in {loop.attempt.run.checkpoints}: {error.strerror}", flush=True)
            loop.beat("step")
        if given["epoch"]:
            loop.end_epoch(given["epoch"])


def name_rates(network: Any, args: Any, groups: int) -> tuple[str, ...]:
    """What the optimizer's groups are called in the metrics, in LyCORIS' order; two of each with LoRA+."""
    names = []
    plus = bool(getattr(network, "loraplus_lr_ratio", None))
    rates = {"lr_text_encoder": args.text_encoder_lr, "lr_unet": args.unet_lr}
    parts = {"lr_text_encoder": "text_encoder_loras", "lr_unet": "unet_loras"}
    for name, rate in rates.items():
        rate = rate[0] if isinstance(rate, list) and rate else rate
        if getattr(network, parts[name], None) and (rate or args.learning_rate):
            names += [name, f"{name}_plus"] if plus else [name]
    return tuple(names) if len(names) == groups else tuple(f"lr_group_{group}" for group in range(groups))


def whole_checkpoints(save_weights: Callable[..., None], loop: Loop) -> Callable[..., None]:
    """The network's own writer, to a hidden neighbour that gets the name when all is on disk.

    A full disk is waited out, as it is for states.
    """

    def save(file: str, dtype: Any, metadata: dict[str, str] | None) -> None:
        def write() -> None:
            write_whole(Path(file), lambda part: save_weights(part, dtype, describe_checkpoint(metadata, loop)))

        loop.save_checkpoint_file(Path(file), write)

    return save


def write_whole(final: Path, write: Callable[[str], None]) -> None:
    """Let `write` make a hidden neighbour of `final`, and give it the name when it is on disk."""
    # The writer tells the format by the suffix.
    part = final.with_name(f".{final.stem}.{os.getpid()}.part{final.suffix}")
    try:
        write(str(part))
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.replace(final)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_folder(final.parent)


def describe_checkpoint(metadata: dict[str, str] | None, loop: Loop) -> dict[str, str]:
    """The trainer's metadata without paths and idle options; a count and a digest in place of a table of all tags."""
    kept = without_idle(metadata or {}, loop.attempt.lock)
    if TAG_TABLE in kept:
        kept[TAG_TABLE] = "{}"
    about = {"kwrap_version": kohaku_wrap.__version__, "kwrap_run": loop.attempt.run.name}
    if parent := loop.attempt.lock.parent_network:
        about["kwrap_trained_on_from"] = parent
    return without_paths({**kept, **about, **loop.dataset.about_captions})


def remove_leftovers(checkpoints: Path) -> None:
    """Remove checkpoints that a crash left half-written under hidden names."""
    for path in checkpoints.glob(".*.part.*"):
        path.unlink(missing_ok=True)


def finish_rotation(args: Any, optimizer_steps: int) -> None:
    """Remove the checkpoint that the trainer would have removed right after writing the state of a resume."""
    every = args.save_every_n_steps
    if not every or not optimizer_steps or optimizer_steps % every:
        return
    old = find_object("get_remove_step_no")(args=args, step_no=optimizer_steps)
    if old is not None:
        name = find_object("get_step_ckpt_name")(args=args, ext="." + args.save_model_as, step_no=old)
        (Path(args.output_dir) / name).unlink(missing_ok=True)
