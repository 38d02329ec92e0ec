"""The part of sd-scripts' options that the builtin engine implements; all others are refused by name."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from typing import Any

from kohaku_wrap.errors import Problem, ProblemsFound
from kohaku_wrap.formats.network_names import LYCORIS
from kohaku_wrap.trainer.options import flatten_sections, load_recorded_table

OPTIMIZERS = ("AdamW", "AdamW8bit", "Lion", "Lion8bit")
SCHEDULERS = ("constant", "constant_with_warmup", "cosine")

WITHOUT_EFFECT = frozenset(
    {
        "cache_info",
        "dataset_config",
        "ddp_gradient_as_bucket_view",
        "ddp_static_graph",
        "ddp_timeout",
        "enable_bucket",
        "gradient_accumulation_steps",
        "initial_epoch",
        "initial_step",
        "log_prefix",
        "log_tracker_name",
        "log_with",
        "logging_dir",
        "prior_loss_weight",
        "resolution",
        "save_last_n_epochs_state",
        "save_last_n_steps_state",
        "skip_until_initial_step",
        "training_comment",
        "wandb_run_name",
    }
)
"""Options about logging, processes, position and retention of states, which kwrap decides itself."""


@dataclass(frozen=True)
class BuiltinOptions:
    """sd-scripts' options under their own names and with their own defaults."""

    pretrained_model_name_or_path: str
    """The base model, a single file."""

    output_dir: str
    """Where checkpoints go."""

    output_name: str
    """What checkpoint names begin with."""

    tokenizer_cache_dir: str
    """The folder that holds both tokenizers."""

    seed: int
    """Of everything random."""

    vae: str | None = None
    """A file that replaces the base model's VAE."""

    save_model_as: str = "safetensors"
    """The only format there is."""

    save_precision: str | None = None
    """float, fp16 or bf16; None is the network's own."""

    save_every_n_steps: int | None = None
    """Optimizer steps between checkpoints."""

    save_every_n_epochs: int | None = None
    """Epochs between checkpoints."""

    save_last_n_steps: int | None = None
    """A checkpoint that is older by this many optimizer steps is removed."""

    save_last_n_epochs: int | None = None
    """A checkpoint that is older by this many epochs is removed."""

    save_state: bool = False
    """Save a state with each checkpoint and at the end."""

    save_state_on_train_end: bool = False
    """Save a state at the end."""

    no_metadata: bool = False
    """Write only the metadata that loaders need."""

    network_module: str = LYCORIS
    """The only network module there is."""

    network_dim: int | None = None
    """LyCORIS' dimension; 10000 is always the full matrix."""

    network_alpha: float = 1.0
    """LyCORIS' alpha."""

    network_dropout: float | None = None
    """LyCORIS' dropout."""

    network_args: tuple[str, ...] = ()
    """`name=value` for LyCORIS."""

    network_weights: str | None = None
    """A network to train on from."""

    dim_from_weights: bool = False
    """Take the modules of that network as they are."""

    network_train_unet_only: bool = False
    """Leave the text encoders as they are."""

    network_train_text_encoder_only: bool = False
    """Leave the UNet as it is."""

    optimizer_type: str = "AdamW"
    """One of OPTIMIZERS, in any case."""

    optimizer_args: tuple[str, ...] = ()
    """`name=value` for the optimizer."""

    learning_rate: float = 2e-6
    """Where the two below are not given."""

    unet_lr: float | None = None
    """The UNet's rate."""

    text_encoder_lr: tuple[float, ...] = ()
    """The text encoders' rate; LyCORIS takes the first."""

    lr_scheduler: str = "constant"
    """One of SCHEDULERS."""

    lr_warmup_steps: int | float = 0
    """Optimizer steps, or a share of all where it is a fraction."""

    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 for not at all."""

    train_batch_size: int = 1
    """Images of one micro-batch."""

    max_train_epochs: int | None = None
    """Epochs; the plan has turned them into optimizer steps."""

    max_train_steps: int = 1600
    """Optimizer steps where no epochs are given."""

    max_token_length: int | None = None
    """75, 150 or 225."""

    max_data_loader_n_workers: int = 8
    """Loader workers; an attempt may choose others."""

    persistent_data_loader_workers: bool = False
    """Keep the loader workers between epochs."""

    mixed_precision: str = "no"
    """no, fp16 or bf16."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""

    sdpa: bool = False
    """torch's attention; it is used in any case."""

    no_half_vae: bool = False
    """Keep the VAE in fp32 under mixed precision."""

    vae_batch_size: int | None = 1
    """Images that the VAE encodes at once."""

    noise_offset: float | None = None
    """Strength of the noise that is constant over each channel."""

    min_snr_gamma: float | None = None
    """Bound of the loss weight by signal-to-noise ratio."""

    min_timestep: int | None = None
    """The first time step that is drawn."""

    max_timestep: int | None = None
    """One after the last time step that is drawn."""

    @classmethod
    def from_config(cls, document: Mapping[str, Any], on_cpu: bool) -> BuiltinOptions:
        """From a trainer.toml's tables; raises ProblemsFound with every option or value that is not implemented."""
        values = flatten_sections(document)
        own = {field.name: field for field in fields(cls)}
        table = load_recorded_table().options
        problems = []
        for name, value in values.items():
            if name not in own and name not in WITHOUT_EFFECT and not is_default(table.get(name), value):
                what = "not implemented by the builtin engine" if name in table else "unknown option"
                problems.append(Problem(name, what))
        for name, field in own.items():
            if field.default is MISSING and values.get(name) is None:
                where = "; set paths.tokenizers in site.toml" if name == "tokenizer_cache_dir" else ""
                problems.append(Problem(name, f"is needed by the builtin engine{where}"))
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if name in own and value is not None
        }
        if isinstance(known.get("text_encoder_lr"), int | float):
            known["text_encoder_lr"] = (known["text_encoder_lr"],)
        known["optimizer_type"] = known.get("optimizer_type") or "AdamW"
        problems += find_unfit_values(known, on_cpu)
        if problems:
            raise ProblemsFound(
                "options of the builtin engine",
                problems,
                'Fix these for the builtin engine, or use engine = "sd-scripts".',
            )
        return cls(**known)

    @property
    def rate_of_text_encoders(self) -> float | None:
        """What LyCORIS is given; None is `learning_rate`."""
        return self.text_encoder_lr[0] if self.text_encoder_lr else None

    def warmup_optimizer_steps(self, total_optimizer_steps: int) -> int:
        """A fraction of the total, or the steps themselves; on any number of processes."""
        if isinstance(self.lr_warmup_steps, float):
            return int(self.lr_warmup_steps * total_optimizer_steps)
        return self.lr_warmup_steps


def is_default(option: Any, value: Any) -> bool:
    """Whether the value is what sd-scripts does anyway, so that nothing is left undone by ignoring it."""
    return option is not None and (value == option.default or (not value and not option.default))


def find_unfit_values(values: Mapping[str, Any], on_cpu: bool) -> list[Problem]:
    """Values of implemented options that this engine does not have."""
    problems = []

    def allow(name: str, allowed: tuple[Any, ...]) -> None:
        if name in values and values[name] not in allowed:
            words = ", ".join(str(each) for each in allowed)
            problems.append(Problem(name, f"{values[name]!r} is not implemented by the builtin engine; it has {words}"))

    allow("network_module", (LYCORIS,))
    allow("save_model_as", ("safetensors",))
    allow("lr_scheduler", SCHEDULERS)
    allow("mixed_precision", ("no", "fp16", "bf16"))
    allow("max_token_length", (75, 150, 225))
    allow("save_precision", ("float", "fp16", "bf16"))
    if str(values["optimizer_type"]).lower() not in {name.lower() for name in OPTIMIZERS}:
        what = f"{values['optimizer_type']!r} is not implemented by the builtin engine; it has {', '.join(OPTIMIZERS)}"
        problems.append(Problem("optimizer_type", what))
    if on_cpu and values.get("mixed_precision") == "fp16":
        problems.append(Problem("mixed_precision", '"fp16" needs a GPU; set "no" or "bf16" in the site\'s [trainer]'))
    if values.get("lr_scheduler", "constant") == "constant" and values.get("lr_warmup_steps"):
        problems.append(Problem("lr_warmup_steps", 'has no effect with "constant"; use "constant_with_warmup"'))
    if values.get("network_train_unet_only") and values.get("network_train_text_encoder_only"):
        problems.append(
            Problem("network_train_unet_only", "and network_train_text_encoder_only leave nothing to train")
        )
    for name in ("network_args", "optimizer_args"):
        problems += [
            Problem(name, f"{text!r} is not of the form name=value") for text in values.get(name, ()) if "=" not in text
        ]
    problems += [
        Problem("optimizer_args", f"the value of {text!r} is not a Python literal")
        for text in values.get("optimizer_args", ())
        if "=" in text and not is_literal(text.partition("=")[2])
    ]
    return problems


def is_literal(text: str) -> bool:
    """Whether Python reads the text as a number, tuple or other literal."""
    with suppress(ValueError, SyntaxError):
        ast.literal_eval(text)
        return True
    return False
