"""The sd-scripts engine: the trainer itself, with its loop corrected and its seams taken."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sdxl_train_network

from kohaku_wrap.config.base_model import require_weight_files
from kohaku_wrap.config.code_names import find_unknown
from kohaku_wrap.config.run_files import DATASET_FILE
from kohaku_wrap.errors import KwrapError
from kohaku_wrap.trainer.checkout import Checkout
from kohaku_wrap.training.engines.sd_scripts.dataset import DATASET_CLASS
from kohaku_wrap.training.engines.sd_scripts.disk_cache import keep_latents_in_run
from kohaku_wrap.training.engines.sd_scripts.loop import Loop, StopRequested
from kohaku_wrap.training.engines.sd_scripts.objects import find_object
from kohaku_wrap.training.engines.sd_scripts.seams import (
    KwrapTrainer,
    finish_rotation,
    install_seams,
    remove_leftovers,
)
from kohaku_wrap.training.engines.sd_scripts.tiny_sizes import change_sizes
from kohaku_wrap.training.records.attempts import Attempt, Outcome


class NotSupportedHere(KwrapError):
    """An option that this engine cannot resume exactly, or cannot train with."""


class UnknownCode(KwrapError):
    """The trainer's file names code that the run was not trusted with."""


class EndedEarly(KwrapError):
    """The trainer came back before the last optimizer step."""


class SdScriptsRun(Loop):
    """One process of one attempt, trained by sd-scripts."""

    def __init__(self, attempt: Attempt, rank: int, checkout: Checkout, secrets: Mapping[str, Any]) -> None:
        super().__init__(attempt, rank)
        self.checkout = checkout
        self.secrets = secrets

    def train(self) -> Outcome:
        """Let the trainer train. Raises EndedEarly, and what `read_arguments` refuses."""
        install_seams(self, self.checkout)
        self.options = self.read_arguments()
        try:
            KwrapTrainer(self).train(self.options)
        except StopRequested as stopped:
            print(stopped.message, flush=True)
            self.accelerator.end_training()
            return "stopped"
        if not self.is_last_step:
            raise EndedEarly(
                f"the trainer ended after {self.optimizer_steps:,} of {self.total_optimizer_steps:,} optimizer steps",
                "Its log says why; `kwrap status` shows where it lies.",
            )
        return "finished"

    def read_arguments(self) -> argparse.Namespace:
        """The run's options as the trainer itself reads them, with what this attempt decides."""
        attempt = self.attempt
        parser = sdxl_train_network.setup_parser()
        args = parser.parse_args()
        args = find_object("read_config_from_file")(args=args, parser=parser)
        if (own := attempt.run.trainer_data / DATASET_FILE).is_file():
            args.dataset_config = str(own)
        refuse_options(args, attempt)
        if args.cache_latents_to_disk:
            keep_latents_in_run(attempt)
        refuse_unknown_code(args, attempt)
        require_weight_files(vars(args), Path.cwd())
        for name, value in self.secrets.items():
            setattr(args, name, value)
        # kwrap logs from its metrics, beside the training.
        args.log_with = args.logging_dir = None
        args.seed = attempt.lock.seed
        args.gradient_accumulation_steps = attempt.accumulation
        args.max_data_loader_n_workers = attempt.workers
        args.persistent_data_loader_workers = bool(args.persistent_data_loader_workers) and attempt.workers > 0
        args.resume = None if attempt.state is None else str(attempt.state)
        args.resume_from_huggingface = False
        args.initial_step = args.initial_epoch = None
        if attempt.lock.data == "kwrap":
            args.dataset_class = DATASET_CLASS
        change_sizes(Path(args.pretrained_model_name_or_path))
        if self.rank == 0:
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
