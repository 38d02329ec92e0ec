"""What may be cached of a template: latents of images that never change, text encoders' outputs of fixed captions."""

from __future__ import annotations

from contextlib import suppress

from kohaku_wrap.config.base_model import read_sizes
from kohaku_wrap.config.effective import Effective, Faults
from kohaku_wrap.formats.caption_rows import NoImages, read_captions_metadata, read_subsets
from kohaku_wrap.formats.sdxl import CHUNK_TOKENS

CHANGING_IMAGES = ("random_crop", "color_aug")
"""Dataset options that make another image each time."""

CHANGING_CAPTIONS = (
    "shuffle_caption",
    "caption_tag_dropout_rate",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "enable_wildcard",
    "token_warmup_step",
)
"""Dataset options that make another text of a caption each time."""

CHANGING_ENCODERS = ("base_weights", "fp8_base", "weighted_captions")
"""Options of sd-scripts that change the text encoders or their outputs in a way that is not followed."""

LATENTS_KEY, TEXTS_KEY = "cache.latents", "cache.text_encoders"


def refuse_cached_latents(effective: Effective) -> Faults:
    """Latents that sd-scripts caches are those of one crop and one colour."""
    for key in ("cache_latents", "cache_latents_to_disk"):
        for name in CHANGING_IMAGES:
            if effective.get(key) and (origin := find_origin(effective, name)):
                yield key, f"cannot go with {name} ({origin}): cached latents never change"


def refuse_cached_captions(effective: Effective) -> Faults:
    """Outputs of the text encoders that sd-scripts caches are those of one caption and of weights that stay."""
    key = "cache_text_encoder_outputs"
    if not effective.get(key):
        return
    if changing := ", ".join(list_changing(effective)):
        yield key, f"cannot go with {changing}: cached captions never change"
    if not effective.get("network_train_unet_only"):
        yield key, "cannot go with text encoder training: set network_train_unet_only = true, or leave it out"


def refuse_cached_items(effective: Effective) -> Faults:
    """What `[cache]` cannot keep, and what it says for nothing."""
    if effective.get(TEXTS_KEY) and (why := say_why_not_text_encoders(effective)):
        yield TEXTS_KEY, why
    if not effective.get(LATENTS_KEY):
        for name in ("cache.keep", "cache.precision"):
            if effective.is_set(name):
                yield name, "does nothing without latents = true in [cache]"
    for name in CHANGING_IMAGES if effective.get(LATENTS_KEY) else ():
        if origin := find_origin(effective, name):
            yield LATENTS_KEY, f"cannot go with {name} ({origin}): each time the image is another one"
    for key, own in ((LATENTS_KEY, "cache_latents"), (TEXTS_KEY, "cache_text_encoder_outputs")):
        if effective.get(key) and effective.get("kwrap.data") == "sd-scripts":
            origin = effective.origin("kwrap.data")
            yield key, f'works only with data = "kwrap" in [kwrap] ({origin}); sd-scripts has {own} of its own'


def say_why_not_text_encoders(effective: Effective) -> str:
    """Why the outputs of text encoders are not cached for a template, and what to do; empty where they can be."""
    if changing := list_changing(effective):
        these = "this option" if len(changing) == 1 else "these options"
        return f"cannot go with {', '.join(changing)}: the text of an image is another one each time. Leave out {these}"
    if not effective.get("network_train_unet_only"):
        return (
            "cannot go with text encoder training: their outputs change. Set network_train_unet_only = true, or leave "
            "text_encoders out of [cache]"
        )
    for name in CHANGING_ENCODERS:
        if effective.get(name):
            return (
                f"cannot go with {name} ({effective.origin(name)}): the outputs would be others. Leave out one of both"
            )
    if effective.site is not None and effective.site.paths.tokenizers is None:
        return f"needs the folder of both tokenizers: set paths.tokenizers in {effective.site.path}"
    return ""


def note_cache(effective: Effective) -> list[str]:
    """What the cache holds twice, and what it does not hold."""
    if not effective.get(LATENTS_KEY):
        return []
    notes = []
    if not effective.get(TEXTS_KEY):
        why = say_why_not_text_encoders(effective)
        notes.append(f"[cache]: caching the text encoders' outputs {why or 'is possible: text_encoders = true'}.")
    if find_origin(effective, "flip_aug"):
        notes.append("flip_aug: each image is cached as it is and mirrored, which takes twice the disk and time.")
    return notes


def list_changing(effective: Effective) -> list[str]:
    """What makes another text of a caption each time: each option with its origin, and shares of texts."""
    found = [f"{name} ({origin})" for name in CHANGING_CAPTIONS if (origin := find_origin(effective, name))]
    if effective.site is not None:
        shares = read_text_shares(effective)
        if any(0 < share < 1 for share in shares.values()):
            said = ", ".join(f"{name} {share:g}" for name, share in shares.items())
            found.append(f"[caption.text] of its captions ({said})")
    return found


def find_origin(effective: Effective, name: str) -> str:
    """Who switches a dataset option on: the template, or a subset of its images; empty where nobody does."""
    key = f"dataset_options.{name}"
    images = effective.site.paths.images if effective.site else None
    subsets = read_subsets(images) if images else []
    for subset in subsets:
        if subset.options.get(name):
            return f"subset {subset.name} of {images}"
    is_on = effective.get(key) and not (subsets and all(name in subset.options for subset in subsets))
    return effective.origin(key) if is_on else ""


def read_text_shares(effective: Effective) -> dict[str, float]:
    """How many images with a text are trained with tags, text or both; empty without texts and without a site."""
    with suppress(NoImages):
        return dict(read_captions_metadata(effective.site.paths.images).get("text", {})) if effective.site else {}
    return {}


def measure_text_outputs(effective: Effective) -> tuple[int, int, int, int]:
    """Of the text encoders' outputs of one caption: tokens, width of each of both states, width of the pooled state.

    Raises BadBaseModel.
    """
    length = effective.get("max_token_length")
    tokens = CHUNK_TOKENS if length is None else int(length) + 2
    assert effective.site is not None
    sizes = read_sizes(effective.site.paths.base_model)
    first, second = sizes["text_encoder"], sizes["text_encoder_2"]
    return tokens, int(first["hidden_size"]), int(second["hidden_size"]), int(second["projection_dim"])
