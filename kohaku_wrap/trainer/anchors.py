"""The places in the trainer's source that kwrap relies on, by name, and the corrections to its loop.

What `replacement` says is put into the syntax tree of `NetworkTrainer.train` when the worker loads it; the files of
the checkout stay as they are. Why each correction is needed: kohya-ss/sd-scripts#2407 and docs/exact-resume.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LOOP = "kwrap_loop"
"""The name under which the corrected loop finds the worker's `Loop`."""

Kind = Literal["statement", "expression", "branch", "definition", "calls"]


@dataclass(frozen=True)
class Anchor:
    """One place that must be found exactly once."""

    name: str
    """What it is for, in a person's words."""

    file: str
    """The file within the checkout."""

    within: str
    """The function or class that holds it, dotted; empty for the whole module."""

    kind: Kind
    """A statement or call by its text, a branch by its test and what it holds, a definition by its arguments."""

    text: str
    """The unparsed statement, call or test; `name(argument)` of a definition. A last `…` stands for any rest."""

    holds: str = ""
    """For a branch: a statement or a test that must stand anywhere inside it."""

    replacement: str | None = None
    """What takes its place when the worker loads the loop; None where it must only be there."""


TRAIN = "NetworkTrainer.train"

LOOP_ANCHORS: tuple[Anchor, ...] = (
    Anchor(
        "limit of the first step",
        "train_network.py",
        TRAIN,
        "branch",
        "initial_step > 0",
        "args.max_train_steps > initial_step",
        "pass",
    ),
    Anchor(
        "place in the epochs",
        "train_network.py",
        TRAIN,
        "branch",
        "initial_step > 0",
        "args.skip_until_initial_step",
        f"initial_step, epoch_to_start = (0, {LOOP}.first_epoch(len(train_dataloader)))",
    ),
    Anchor(
        "steps already done",
        "train_network.py",
        TRAIN,
        "statement",
        "global_step = 0",
        replacement=f"global_step = {LOOP}.optimizer_steps_done()",
    ),
    Anchor(
        "count of skipped steps",
        "train_network.py",
        TRAIN,
        "branch",
        "initial_step > 0",
        "global_step = initial_step",
        "pass",
    ),
    Anchor(
        "length of the progress bar",
        "train_network.py",
        TRAIN,
        "expression",
        "range(args.max_train_steps - initial_step)",
        replacement="range(args.max_train_steps - global_step)",
    ),
    Anchor(
        "number of the micro-batch",
        "train_network.py",
        TRAIN,
        "expression",
        "enumerate(skipped_dataloader or train_dataloader)",
        replacement=f"enumerate(train_dataloader, start={LOOP}.first_micro_batch())",
    ),
    Anchor(
        "count of optimizer steps",
        "train_network.py",
        TRAIN,
        "statement",
        "global_step += 1",
        replacement=f"global_step = {LOOP}.count_optimizer_step(global_step)",
    ),
    Anchor(
        "end of a micro-batch",
        "train_network.py",
        TRAIN,
        "branch",
        "global_step >= args.max_train_steps",
        replacement=f"if {LOOP}.end_micro_batch(global_step, epoch) or global_step >= args.max_train_steps:\n    break",
    ),
)
"""The corrections to `NetworkTrainer.train`."""

SEAM_ANCHORS: tuple[Anchor, ...] = (
    Anchor(
        "trainer class", "sdxl_train_network.py", "", "definition", "SdxlNetworkTrainer(train_network.NetworkTrainer)"
    ),
    Anchor("option parser", "sdxl_train_network.py", "", "definition", "setup_parser()"),
    Anchor(
        "step hook",
        "train_network.py",
        "NetworkTrainer",
        "definition",
        "on_step_start(self, args, accelerator, network, text_encoders, unet, batch, weight_dtype, is_train)",
    ),
    Anchor(
        "step hook in the loop",
        "train_network.py",
        TRAIN,
        "expression",
        "self.on_step_start(args, accelerator, network, text_encoders, unet, batch, weight_dtype, is_train=True)",
    ),
    Anchor(
        "loss of a batch",
        "train_network.py",
        "NetworkTrainer",
        "definition",
        "process_batch(self, batch, …)",
    ),
    Anchor(
        "noise and time steps",
        "train_network.py",
        "NetworkTrainer",
        "definition",
        "get_noise_pred_and_target(self, args, accelerator, …)",
    ),
    Anchor(
        "latents of images",
        "train_network.py",
        "NetworkTrainer",
        "definition",
        "encode_images_to_latents(self, args, vae, images)",
    ),
    Anchor(
        "network made",
        "train_network.py",
        "NetworkTrainer",
        "definition",
        "post_process_network(self, args, accelerator, network, text_encoders, unet)",
    ),
    Anchor(
        "sampling",
        "train_network.py",
        "NetworkTrainer",
        "definition",
        "sample_images(self, accelerator, args, epoch, global_step, …)",
    ),
    Anchor(
        "sampling after an epoch",
        "train_network.py",
        TRAIN,
        "expression",
        "self.sample_images(accelerator, args, epoch + 1, global_step, …)",
    ),
    Anchor("epoch for the sampler", "train_network.py", TRAIN, "statement", "current_epoch.value = epoch + 1"),
    Anchor("accelerator", "library/train_util.py", "prepare_accelerator", "calls", "Accelerator()"),
    Anchor("collator", "library/train_util.py", "collator_class", "definition", "__init__(self, epoch, step, dataset)"),
    Anchor("loss recorder", "library/train_util.py", "", "definition", "LossRecorder()"),
    Anchor(
        "dataset class",
        "library/train_util.py",
        "MinimalDataset",
        "definition",
        "__init__(self, resolution, network_multiplier, debug_dataset)",
    ),
    Anchor(
        "dataset class made",
        "library/train_util.py",
        "load_arbitrary_dataset",
        "expression",
        "dataset_class(tokenizer, args.max_token_length, args.resolution, args.debug_dataset)",
    ),
    Anchor("images of its own dataset", "library/train_util.py", "", "definition", "load_image(image_path, alpha)"),
    Anchor("scheduler", "library/train_util.py", "", "definition", "get_scheduler_fix(args, optimizer, num_processes)"),
    Anchor(
        "state after steps",
        "library/train_util.py",
        "",
        "definition",
        "save_and_remove_state_stepwise(args, accelerator, step_no)",
    ),
    Anchor(
        "state after an epoch",
        "library/train_util.py",
        "",
        "definition",
        "save_and_remove_state_on_epoch_end(args, accelerator, epoch_no)",
    ),
    Anchor("state at the end", "library/train_util.py", "", "definition", "save_state_on_train_end(args, accelerator)"),
    Anchor("checkpoint to remove", "library/train_util.py", "", "definition", "get_remove_step_no(args, step_no)"),
)
"""What the worker puts itself in place of, or is called by."""

ANCHORS = LOOP_ANCHORS + SEAM_ANCHORS
