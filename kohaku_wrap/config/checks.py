"""Contradictions between effective values that cost people days, each with the layer that brought it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kohaku_wrap.config.base_model import note_other_prediction
from kohaku_wrap.config.caching import (
    note_cache,
    refuse_cached_captions,
    refuse_cached_items,
    refuse_cached_latents,
)
from kohaku_wrap.config.effective import BadBatch, Effective, Faults, shape_batch
from kohaku_wrap.config.needs import describe_idle, find_lacks
from kohaku_wrap.config.network import find_network_faults
from kohaku_wrap.config.optimizers import find_optimizer_faults, find_unknown_code
from kohaku_wrap.config.samples import find_sample_faults, note_ignored_steps, note_shared_gpu
from kohaku_wrap.config.training_data import note_whole_captions
from kohaku_wrap.config.validation import find_validation_faults, note_held_out
from kohaku_wrap.dataset.buckets import BucketOptions
from kohaku_wrap.errors import Problem, ProblemsFound
from kohaku_wrap.formats.network_names import LYCORIS
from kohaku_wrap.steps import StepPlan

TYPICAL_WEIGHT = 0.02
"""The size of a typical weight of SDXL and of a LoKr factor."""

HALF_ULP_FP16 = 2.0**-17
"""Half the distance between neighbouring fp16 numbers at TYPICAL_WEIGHT, which lies between 2^-6 and 2^-5."""


LIMITS: Mapping[str, tuple[int, int | None]] = {
    "learning_rate": (0, None),
    "unet_lr": (0, None),
    "text_encoder_lr": (0, None),
    "lr_warmup_steps": (0, None),
    "max_grad_norm": (0, None),
    "min_snr_gamma": (0, None),
    "network_dim": (1, None),
    "network_dropout": (0, 1),
    "max_data_loader_n_workers": (0, None),
    "seed": (0, (1 << 32) - 1),
    "dataset_options.num_repeats": (1, None),
    "dataset_options.keep_tokens": (0, None),
    "dataset_options.caption_dropout_rate": (0, 1),
    "dataset_options.caption_tag_dropout_rate": (0, 1),
    "states.keep": (1, None),
    "states.every": (1, None),
    "samples.every": (1, None),
    "samples.steps": (1, None),
    "samples.width": (8, None),
    "samples.height": (8, None),
    "validation.posts": (0, None),
    "validation.every": (0, None),
    "validation.timesteps": (1, 1000),
    "validation.batch": (1, 256),
    "save_every_n_steps": (1, None),
    "save_every_n_epochs": (1, None),
    "save_last_n_steps": (0, None),
    "save_last_n_epochs": (1, None),
    "max_train_steps": (0, (1 << 32) - 1),
    "max_train_epochs": (0, 1_000_000),
    "min_timestep": (0, 999),
    "max_timestep": (0, 1000),
    "vae_batch_size": (1, None),
}
"""The smallest and largest value of numbers that mean nothing beyond; the trainer takes any in silence."""


def check_effective(effective: Effective) -> list[Problem]:
    """Every contradiction of a template, on its site where one is given."""
    return effective.blame(fault for rule in RULES for fault in rule(effective))


def note_rare_saves(effective: Effective, steps: int) -> list[str]:
    """What is saved or sampled less often than once in the optimizer steps of a run."""
    named = ((key, effective.get(key)) for key in ("save_every_n_steps", "samples.every", "sample_every_n_steps"))
    return [
        f"{key} = {every:,} is more than the {steps:,} optimizer steps of the whole run: it comes at none of them"
        for key, every in named
        if every and every > steps
    ]


def find_bucket_faults(effective: Effective) -> Faults:
    """Bucket options that no resolution fits."""
    options = effective.subtable("dataset_options", with_defaults=True)
    try:
        if options.get("resolution") is not None:
            BucketOptions.from_dataset_options(options)
    except ProblemsFound as found:
        yield from ((f"dataset_options.{fault.where}", fault.what) for fault in found.problems)


def find_batch_faults(effective: Effective) -> Faults:
    """A batch that cannot be made on the site."""
    try:
        if effective.site and is_complete(effective):
            shape_batch(effective)
    except BadBatch as fault:
        yield "effective_batch", f"{fault.message}. {fault.next_step}"


def is_complete(effective: Effective) -> bool:
    """Whether the template is one to train with, rather than a base for others."""
    return bool(effective.get("effective_batch"))


def describe_notes(effective: Effective, plan: StepPlan | None = None) -> list[str]:
    """What is worth knowing and no fault."""
    notes = [
        *effective.notes,
        *describe_idle(effective),
        *note_cache(effective),
        *note_whole_captions(effective),
        *note_shared_gpu(effective),
        *note_ignored_steps(effective),
        *note_held_out(effective),
    ]
    notes += note_other_prediction(effective)
    warmup = effective.get("lr_warmup_steps", 0)
    processes = effective.site.machine.processes if effective.site else 1
    said = any("lr_warmup_steps" in note for note in notes)
    if isinstance(warmup, int) and warmup and processes > 1 and not said:
        notes.append(
            f"lr_warmup_steps = {warmup}: {warmup} optimizer steps under kwrap; plain sd-scripts on {processes} "
            f"processes makes it {-(-warmup // processes)}."
        )
    if plan and isinstance(warmup, int) and warmup >= plan.total_optimizer_steps:
        notes.append(f"lr_warmup_steps = {warmup:,} is the whole run: the rates are never reached.")
    if plan:
        notes += note_rare_saves(effective, plan.total_optimizer_steps)
    every, saved = effective.get("states.every"), effective.get("save_every_n_steps")
    if every and saved and every % saved:
        notes.append(f"states.every = {every}: only states whose step is a multiple of it and of {saved} are kept.")
    return notes


def dataset(effective: Effective, name: str) -> object:
    return effective.get(f"dataset_options.{name}")


def refuse_idle_separator(effective: Effective) -> Faults:
    """sd-scripts removes the separator only where it has work to do on the caption."""
    working = ("shuffle_caption", "caption_tag_dropout_rate")
    if dataset(effective, "keep_tokens_separator") and not any(dataset(effective, name) for name in working):
        yield (
            "dataset_options.keep_tokens_separator",
            "reaches the tokenizer as text: it is only removed with shuffle_caption or caption_tag_dropout_rate",
        )
    if dataset(effective, "caption_separator") == "" and any(dataset(effective, name) for name in working):
        yield "dataset_options.caption_separator", "is empty: there is nothing to tell tags apart by"


def refuse_half_vae(effective: Effective) -> Faults:
    """The SDXL VAE overflows in fp16."""
    if (effective.get("mixed_precision") == "fp16" or effective.get("full_fp16")) and not effective.get("no_half_vae"):
        key = "mixed_precision" if effective.get("mixed_precision") == "fp16" else "full_fp16"
        yield key, "fp16 without no_half_vae = true: the SDXL VAE gives NaN, which the trainer turns into zeros"


def refuse_bucket_steps(effective: Effective) -> Faults:
    steps = dataset(effective, "bucket_reso_steps")
    if dataset(effective, "enable_bucket") and isinstance(steps, int) and steps % 32:
        yield "dataset_options.bucket_reso_steps", f"{steps} is no multiple of 32, which SDXL needs"


NEEDED: Mapping[str, str] = {
    "seed": "is not set: order, captions and noise follow from it, and a resume needs it",
    # What is too long loses its end, and the end is the rating and quality tags.
    "max_token_length": "is not set, which means 75 tokens: longer captions lose their end. Write 150 or 225",
    "dataset_options.resolution": "is not set: the trainer has no default",
}
"""Options that a template to train with must set, and why."""


def refuse_missing(effective: Effective) -> Faults:
    """What a template to train with must set."""
    if is_complete(effective):
        yield from ((key, why) for key, why in NEEDED.items() if effective.get(key) is None)


def refuse_crossed_timesteps(effective: Effective) -> Faults:
    """The trainer then takes the upper one for every image."""
    lowest, highest = effective.get("min_timestep", 0), effective.get("max_timestep", 1000)
    if lowest > highest >= 0:
        yield "min_timestep", f"{lowest} is above max_timestep = {highest} ({effective.origin('max_timestep')})"


def refuse_two_lengths(effective: Effective) -> Faults:
    steps, epochs = effective.is_set("max_train_steps"), effective.is_set("max_train_epochs")
    if steps and epochs:
        origin = effective.origin("max_train_epochs")
        yield "max_train_steps", f"and max_train_epochs ({origin}) are both given: the trainer would ignore the steps"
    elif is_complete(effective) and not steps and not epochs:
        yield "max_train_epochs", "is not set, nor max_train_steps: the trainer would stop after 1600 steps"
    for key in ("max_train_steps", "max_train_epochs"):
        value = effective.get(key)
        if effective.is_set(key) and isinstance(value, int) and value < 1:
            yield key, f"{value} trains nothing"


def refuse_lost_updates(effective: Effective) -> Faults:
    """An update below half an ulp leaves an fp16 weight as it was."""
    if not effective.get("full_fp16"):
        return
    fallback = effective.get("learning_rate")
    rates = {
        "unet_lr": effective.get("unet_lr", fallback),
        "text_encoder_lr": effective.get("text_encoder_lr", fallback),
    }
    if effective.get("network_train_unet_only"):
        del rates["text_encoder_lr"]
    for key, value in rates.items():
        rate = (value or [fallback])[0] if isinstance(value, list) else value
        if rate and rate < HALF_ULP_FP16:
            shown_key = key if effective.is_set(key) else "learning_rate"
            yield (
                shown_key,
                f"{rate:g} is below {HALF_ULP_FP16:.2g}, half an fp16 step at weights of {TYPICAL_WEIGHT}: with "
                f"full_fp16 ({effective.origin('full_fp16')}) most updates round away. Leave full_fp16 out",
            )


def refuse_full_precision(effective: Effective) -> Faults:
    for key, wanted in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if effective.get(key) and effective.get("mixed_precision") != wanted:
            yield key, f'needs mixed_precision = "{wanted}" ({effective.origin("mixed_precision")})'


def refuse_two_attentions(effective: Effective) -> Faults:
    chosen = [key for key in ("sdpa", "xformers", "mem_eff_attn") if effective.get(key)]
    if len(chosen) > 1:
        others = ", ".join(f"{key} ({effective.origin(key)})" for key in chosen[1:])
        yield chosen[0], f"and {others} are both given: choose one attention back end"


def refuse_two_network_parts(effective: Effective) -> Faults:
    if effective.get("network_train_unet_only") and effective.get("network_train_text_encoder_only"):
        yield "network_train_unet_only", "and network_train_text_encoder_only leave nothing to train"
    rates = effective.get("text_encoder_lr")
    if isinstance(rates, list) and len(set(rates)) > 1 and effective.get("network_module") == LYCORIS:
        yield "text_encoder_lr", "LyCORIS uses only the first rate, for both text encoders: write one"


def refuse_out_of_range(effective: Effective) -> Faults:
    for key, (smallest, largest) in LIMITS.items():
        value = effective.get(key)
        if not effective.is_set(key) or value is None:
            continue
        for one in value if isinstance(value, list) else [value]:
            if one < smallest or (largest is not None and one > largest):
                wanted = f"at least {smallest}" if largest is None else f"between {smallest} and {largest}"
                yield key, f"{one} is out of range: it must be {wanted}"


RULES: tuple[Callable[[Effective], Faults], ...] = (
    refuse_cached_latents,
    refuse_cached_items,
    refuse_cached_captions,
    refuse_idle_separator,
    refuse_half_vae,
    refuse_bucket_steps,
    refuse_missing,
    refuse_crossed_timesteps,
    refuse_two_lengths,
    refuse_lost_updates,
    refuse_full_precision,
    refuse_two_attentions,
    refuse_two_network_parts,
    find_sample_faults,
    find_validation_faults,
    refuse_out_of_range,
    find_network_faults,
    find_unknown_code,
    find_optimizer_faults,
    find_lacks,
    find_bucket_faults,
    find_batch_faults,
)
"""Each looks at the whole and yields what contradicts."""
