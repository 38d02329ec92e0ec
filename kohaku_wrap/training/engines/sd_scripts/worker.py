"""The sd-scripts engine's worker, started in a run's folder by `accelerate launch -m` and this module."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kohaku_wrap.config.base_model import require_weight_files
from kohaku_wrap.config.code_names import find_unknown
from kohaku_wrap.config.kernels import DETERMINISTIC_VARIABLE
from kohaku_wrap.config.site import load_site
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.trainer.checkout import Checkout, find_checkout, list_installed, require_supported
from kohaku_wrap.trainer.requirements import requirement_paths
from kohaku_wrap.training.engines.failures import report_failures
from kohaku_wrap.training.records.attempts import Attempt, Outcome
from kohaku_wrap.training.records.saving import wait_for_room

if TYPE_CHECKING:
    from kohaku_wrap.training.engines.sd_scripts.loop import Loop


class NotSupportedHere(KwrapError):
    """An option that this engine cannot resume exactly, or cannot train with."""


class UnknownCode(KwrapError):
    """The trainer's file names code that the run was not trusted with."""


class EndedEarly(KwrapError):
    """The trainer came back before the last optimizer step."""


def main() -> int:
    """Train the attempt that KWRAP_RUN and KWRAP_ATTEMPT name; 0 when it finished or was stopped as asked."""
    rank = int(os.environ.get("RANK", "0"))
    attempt = Attempt.load()
    attempt.open_log(rank)
    attempt.stop_on_signals()
    attempt.beat(rank, "start-up", attempt.start_optimizer_step)
    report_failures(attempt, rank, lambda: attempt.start_optimizer_step)
    commit = attempt.lock.trainer_commit
    if "trainer_commit" in attempt.allow and commit not in {each.commit for each in list_installed()}:
        commit = ""
    checkout = require_supported(find_checkout(commit))
    if read_secrets(attempt, rank).get("huggingface_repo_id"):
        os.environ["HF_HUB_OFFLINE"] = "0"
    enter_checkout(checkout)
    # Only now: the trainer's modules are found, and torch reads what the launch has set.
    from kohaku_wrap.training.engines.sd_scripts.loop import Loop, StopRequested
    from kohaku_wrap.training.engines.sd_scripts.seams import KwrapTrainer, install_seams

    loop = Loop(attempt, rank)
    report_failures(attempt, rank, loop.optimizer_steps_so_far)
    install_seams(loop, checkout)
    loop.args = read_arguments(loop)
    try:
        KwrapTrainer(loop).train(loop.args)
    except StopRequested as stopped:
        print(stopped.message, flush=True)
        loop.accelerator.end_training()
        outcome: Outcome = "stopped"
    else:
        outcome = "finished"
        require_end(loop)
    loop.close()
    if rank == 0:
        wait_for_room(attempt, lambda: attempt.finish(outcome, loop.optimizer_steps), loop.optimizer_steps)
    return 0


def enter_checkout(checkout: Checkout) -> None:
    """Put the checkout, and packages that only it needs, on the import path."""
    sys.path.insert(0, str(checkout.path))
    sys.path.extend(str(path) for path in requirement_paths())
    from kohaku_wrap.planning.workers.torchvision_on_cpu import import_torchvision

    import_torchvision()
    settle_torch()
    # One line a file of every state.
    logging.getLogger("accelerate.checkpointing").setLevel(logging.WARNING)


def settle_torch() -> None:
    """All processes counted, and the same bits each time: always on a CPU, on a GPU where it was asked for."""
    import torch

    if not torch.cuda.is_available():
        # Else accelerate counts one process however many torchrun started.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if not torch.cuda.is_available() or os.environ.get(DETERMINISTIC_VARIABLE) == "1":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def read_arguments(loop: Loop) -> argparse.Namespace:
    """The run's options as the trainer itself reads them, with what this attempt decides."""
    import sdxl_train_network
    from library import train_util

    from kohaku_wrap.training.engines.sd_scripts.dataset import DATASET_CLASS
    from kohaku_wrap.training.engines.sd_scripts.seams import finish_rotation, remove_leftovers
    from kohaku_wrap.training.engines.sd_scripts.tiny_sizes import change_sizes, read_sizes

    attempt = loop.attempt
    parser = sdxl_train_network.setup_parser()
    args = parser.parse_args()
    train_util.verify_command_line_training_args(args)
    args = train_util.read_config_from_file(args, parser)
    refuse_options(args, attempt)
    refuse_unknown_code(args, attempt)
    require_weight_files(vars(args), Path.cwd())
    for name, value in read_secrets(attempt, loop.rank).items():
        setattr(args, name, value)
    args.seed = attempt.lock.seed
    args.gradient_accumulation_steps = attempt.accumulation
    args.max_data_loader_n_workers = attempt.workers
    args.persistent_data_loader_workers = bool(args.persistent_data_loader_workers) and attempt.workers > 0
    args.resume = None if attempt.state is None else str(attempt.state)
    args.resume_from_huggingface = False
    args.initial_step = args.initial_epoch = None
    if attempt.lock.data == "kwrap":
        args.dataset_class = DATASET_CLASS
    sizes = read_sizes(Path(args.pretrained_model_name_or_path))
    if sizes is not None:
        change_sizes(sizes)
    if loop.rank == 0:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        remove_leftovers(Path(args.output_dir))
        finish_rotation(args, attempt.start_optimizer_step)
    parsed: argparse.Namespace = args
    return parsed


def refuse_options(args: argparse.Namespace, attempt: Attempt) -> None:
    """Raise NotSupportedHere for what would not be trained, or not be resumed, as it says."""
    columns = attempt.lock.data == "kwrap"
    faults = {
        "deepspeed": bool(getattr(args, "deepspeed", False)),
        "cache_latents": columns and bool(args.cache_latents or args.cache_latents_to_disk),
        "cache_text_encoder_outputs": columns and bool(args.cache_text_encoder_outputs),
        "validation_split": bool(args.validation_split),
    }
    named = [name for name, is_set in faults.items() if is_set]
    if named:
        raise NotSupportedHere(
            f"not supported by this engine: {', '.join(named)}",
            'Leave these options out; what is cached needs data = "sd-scripts" in [kwrap].',
        )


def refuse_unknown_code(args: argparse.Namespace, attempt: Attempt) -> None:
    """Raise UnknownCode unless all code that the trainer's file names is known, or trusted in the lock."""
    unknown = [what for _, what in find_unknown(vars(args), attempt.lock.trust)]
    if unknown:
        raise UnknownCode(
            "; ".join(unknown),
            "The run's lock trusts no such module: start a new run with --trust, or restore the file.",
        )


def read_secrets(attempt: Attempt, rank: int) -> Mapping[str, Any]:
    """`[secrets]` of the site that the run was made on. Raises KwrapError on rank 0 where that file is gone."""
    if not attempt.lock.secrets_file:
        return {}
    try:
        return load_site(attempt.lock.secrets_file).secrets
    except KwrapError:
        if rank == 0:
            raise
        return {}


def require_end(loop: Loop) -> None:
    """Raise EndedEarly unless every step is done, MostlySkipped where most of them did nothing."""
    if loop.optimizer_steps < loop.total_optimizer_steps:
        raise EndedEarly(
            f"the trainer ended after {loop.optimizer_steps:,} of {loop.total_optimizer_steps:,} optimizer steps",
            "Its log says why; `kwrap status` shows where it lies.",
        )
    loop.bad_steps.check_end(loop.total_optimizer_steps)


if __name__ == "__main__":
    sys.exit(main())
