"""The places in the trainer's source that kwrap relies on, by name, and the corrections to its loop.

What `replacement` says is put into the syntax tree of the class NetworkTrainer when the worker loads it; the files of
the checkout stay as they are. A place is looked for in the trainer's scripts and its whole library. Why each
correction is needed: kohya-ss/sd-scripts#2407 and docs/exact-resume.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kohaku_wrap.trainer.commits import SCRIPT

LOOP = "kwrap_loop"
"""The name under which the corrected loop finds the worker's `Loop`."""

Kind = Literal["statement", "expression", "branch", "definition", "calls"]


@dataclass(frozen=True)
class Anchor:
    """One place that must be found exactly once."""

    name: str
    """What it is for, in a person's words."""

    within: str
    """The class or function that holds it, dotted, in whichever file; empty for a module itself."""

    kind: Kind
    """A statement or call by its text, a branch by its test and what it holds, a definition by its arguments."""

    text: str
    """The unparsed statement, call or test; a last `…` stands for any rest.

    `name(argument)` of a definition: the arguments that kwrap relies on, in any order. Others need a default, unless a
    `…` says that kwrap hands on whatever comes.
    """

    holds: str = ""
    """For a branch: a statement or a test that must stand anywhere inside it."""

    file: str = ""
    """The one file that kwrap takes it from; empty where it may stand in any."""

    replacement: str | None = None
    """What takes its place when the worker loads the loop; None where it must only be there."""


TRAINER = "NetworkTrainer"
"""The class whose methods hold the loop."""

LOOP_ANCHORS: tuple[Anchor, ...] = (
    Anchor(
        "limit of the first step",
        TRAINER,
        "branch",
        "initial_step > 0",
        "args.max_train_steps > initial_step",
        replacement="pass",
    ),
    Anchor(
        "place in the epochs",
        TRAINER,
        "branch",
        "initial_step > 0",
        "args.skip_until_initial_step",
        replacement=f"initial_step, epoch_to_start = (0, {LOOP}.first_epoch(len(train_dataloader)))",
    ),
    Anchor(
        "steps already done",
        TRAINER,
        "statement",
        "global_step = 0",
        replacement=f"global_step = {LOOP}.optimizer_steps_done()",
    ),
    Anchor(
        "count of skipped steps",
        TRAINER,
        "branch",
        "initial_step > 0",
        "global_step = initial_step",
        replacement="pass",
    ),
    Anchor(
        "length of the progress bar",
        TRAINER,
        "expression",
        "range(args.max_train_steps - initial_step)",
        replacement="range(args.max_train_steps - global_step)",
    ),
    Anchor(
        "number of the micro-batch",
        TRAINER,
        "expression",
        "enumerate(skipped_dataloader or train_dataloader)",
        replacement=f"enumerate(train_dataloader, start={LOOP}.first_micro_batch())",
    ),
    Anchor(
        "count of optimizer steps",
        TRAINER,
        "statement",
        "global_step += 1",
        replacement=f"global_step = {LOOP}.count_optimizer_step(global_step)",
    ),
    Anchor(
        "end of a micro-batch",
        TRAINER,
        "branch",
        "global_step >= args.max_train_steps",
        replacement=f"if {LOOP}.end_micro_batch(global_step) or global_step >= args.max_train_steps:\n    break",
    ),
)
"""The corrections to the loop."""

SEAM_ANCHORS: tuple[Anchor, ...] = (
    Anchor("trainer class", "", "definition", "SdxlNetworkTrainer(NetworkTrainer)", file=SCRIPT),
    Anchor("option parser", "", "definition", "setup_parser()", file=SCRIPT),
    Anchor("epochs of the loop", TRAINER, "expression", "range(epoch_to_start, num_train_epochs)"),
    Anchor("step hook", TRAINER, "definition", "on_step_start(self, batch, is_train, …)"),
    Anchor(
        "step hook in the loop",
        TRAINER,
        "expression",
        "self.on_step_start(args, accelerator, network, text_encoders, unet, batch, weight_dtype, is_train=True)",
    ),
    Anchor(
        "loss of a batch",
        TRAINER,
        "definition",
        "process_batch(self, batch, is_train, …)",
    ),
    Anchor(
        "noise and time steps",
        TRAINER,
        "definition",
        "get_noise_pred_and_target(self, is_train, …)",
    ),
    Anchor(
        "time steps of a batch",
        f"{TRAINER}.get_noise_pred_and_target",
        "statement",
        "return (noise_pred, target, timesteps, …",
    ),
    Anchor(
        "latents of images",
        TRAINER,
        "definition",
        "encode_images_to_latents(self, …)",
    ),
    Anchor(
        "network made",
        TRAINER,
        "definition",
        "post_process_network(self, network, …)",
    ),
    Anchor(
        "sampling",
        TRAINER,
        "definition",
        "sample_images(self, args, epoch, …)",
    ),
    Anchor(
        "sampling after an epoch",
        TRAINER,
        "expression",
        "self.sample_images(accelerator, args, epoch + 1, global_step, …)",
    ),
    Anchor("epoch for the sampler", TRAINER, "statement", "current_epoch.value = epoch + 1"),
    Anchor("accelerator", "prepare_accelerator", "calls", "Accelerator()"),
    Anchor("collator", "collator_class", "definition", "__init__(self, epoch, …)"),
    Anchor("loss recorder", "", "definition", "LossRecorder()"),
    Anchor(
        "dataset class",
        "MinimalDataset",
        "definition",
        "__init__(self, resolution, network_multiplier, debug_dataset)",
    ),
    Anchor(
        "dataset class made",
        "load_arbitrary_dataset",
        "expression",
        "dataset_class(tokenizer, args.max_token_length, args.resolution, args.debug_dataset)",
    ),
    Anchor("images of its own dataset", "", "definition", "load_image(image_path, …)"),
    Anchor("scheduler", "", "definition", "get_scheduler_fix(args, optimizer, num_processes, …)"),
    Anchor(
        "state after steps",
        "",
        "definition",
        "save_and_remove_state_stepwise(…)",
    ),
    Anchor(
        "state after an epoch",
        "",
        "definition",
        "save_and_remove_state_on_epoch_end(…)",
    ),
    Anchor("state at the end", "", "definition", "save_state_on_train_end(…)"),
    Anchor("checkpoint to remove", "", "definition", "get_remove_step_no(args, step_no)"),
    Anchor("name of a checkpoint", "", "definition", "get_step_ckpt_name(args, ext, step_no)"),
    Anchor("options read", "", "definition", "read_config_from_file(args, parser)"),
)
"""What the worker puts itself in place of, or is called by."""

ANCHORS = LOOP_ANCHORS + SEAM_ANCHORS
